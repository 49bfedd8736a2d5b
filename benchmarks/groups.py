"""How runs are best spread over CPU cores: devices x runs side by side, for training and for
measuring.

    python -m benchmarks.groups

Prints the median of five epochs, and of five measurements, for every choice; docs/performance.md
quotes it.
"""

import statistics
import time
from unittest import mock

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Watch
from benchmarks.noise import noise
from ncjax.training import layers, models, parallel, program

# widths, shape of an input, runs, batch size, training examples
CASES = {
    "64-128-128-128-10": ((128, 128, 128), (64,), 18, 64, 1450),
    "784-512-512-512-10": ((512, 512, 512), (784,), 16, 128, 2048),
    "784-2048-2048-10": ((2048, 2048), (784,), 4, 128, 1024),
    "32x32x3-32-64-128-256-10": ((32, 64, 128, 256), (32, 32, 3), 8, 128, 640),
}


def seconds(name: str, devices: int, train_group: int, measure_group: int) -> tuple[float, float]:
    """Median seconds of (an epoch, a measurement) of all runs."""
    widths, image, runs, batch_size, examples = CASES[name]
    dataset = noise(image, examples, examples // 5)
    mesh = parallel.make_mesh(runs, run=devices)
    network = models.MLP if len(image) == 1 else models.ConvNet
    model = network(widths, 10)
    recipe = program.Recipe(
        model,
        layers.find(model, image, "none", "float32"),
        "none",
        "constant",
        batch_size,
        10,
        len(dataset.train.labels),
    )
    columns = {
        "weight_decay": [1e-3],
        "learning_rate": [0.05],
        "momentum": [0.9],
        "init_scale": [1.0],
    }
    columns = {key: values * runs for key, values in columns.items()} | {"seed": list(range(runs))}
    arrays = program.place_data(dataset, mesh, "float32")
    states, keys, hyper = program.start(recipe, mesh, columns, arrays)
    advance = program.make_advance(recipe, mesh)
    medians = []
    with mock.patch.object(parallel, "group_sizes", return_value=(train_group, measure_group)):
        for epochs, measured in ((1, False), (0, True)):
            times = []
            for _ in range(6):  # the first compiles
                begin = time.perf_counter()
                states, metrics = advance(states, keys, hyper, arrays, epochs, measured)
                jax.block_until_ready((states, metrics))
                times.append(time.perf_counter() - begin)
            medians.append(statistics.median(times[1:]))
    return medians[0], medians[1]


def main() -> None:
    parallel.use_every_core()
    watch = Watch(concludes=True)
    table = Table(title="milliseconds for all runs, median of 5")
    for heading in ("network", "runs", "devices", "side by side", "epoch", "measurement"):
        table.add_column(heading, justify="right")
    for name, (_, _, runs, _, _) in CASES.items():
        for devices in sorted({1, min(jax.device_count(), runs)}):
            local = runs // devices
            for group in sorted({1, *(g for g in (2, 3, 4) if local % g == 0), local}):
                epoch, measurement = seconds(name, devices, group, group)
                cells = (
                    name,
                    runs,
                    devices,
                    group,
                    f"{1e3 * epoch:.1f}",
                    f"{1e3 * measurement:.1f}",
                )
                table.add_row(*map(str, cells))
    Console(width=100).print(table)
    watch.conclude()


if __name__ == "__main__":
    main()
