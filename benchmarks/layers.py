"""What `log.layers` adds to a measurement of the digits demo: 18 runs of 64-128-128-128-10.

    python -m benchmarks.layers

Prints the medians of alternating rounds in milliseconds and in training epochs, by the wall and by
the time that all cores computed, which other work on the machine changes less; docs/performance.md
quotes it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import Watch
from ncjax.cli.train import load_config
from ncjax.plan import prepare
from ncjax.training import parallel
from ncjax.training.sweep import Sweep

ROUNDS = 15


def make_sweep(layers: bool, folder: Path) -> Sweep:
    config = load_config("digits")
    config.log.layers = layers
    sweep = Sweep(prepare(config, folder / str(layers)))
    sweep.compile()
    return sweep


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds by the wall, and computed."""
    wall, computed = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - computed)


def main() -> None:
    parallel.use_every_core()
    watch = Watch(concludes=True)
    with tempfile.TemporaryDirectory() as folder:
        plain, layered = (make_sweep(layers, Path(folder)) for layers in (False, True))
    works: dict[str, Callable[[], object]] = {
        "epoch of training": lambda: plain.advance(1, measured=False),
        "measurement": lambda: plain.advance(0, measured=True),
        "with log.layers": lambda: layered.advance(0, measured=True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for round_ in range(ROUNDS + 1):
        for name, work in works.items():
            found = timed(work)
            if round_:  # the first warms up
                times[name].append(found)
    medians = {
        name: [statistics.median(t) for t in zip(*of, strict=True)] for name, of in times.items()
    }
    medians["log.layers adds"] = [
        b - a for a, b in zip(medians["measurement"], medians["with log.layers"], strict=True)
    ]
    epoch = medians["epoch of training"]
    table = Table(title=f"medians of {ROUNDS} rounds")
    for heading in ("", "wall, ms", "epochs", "computed, ms", "epochs"):
        table.add_column(heading, justify="right")
    for name, (wall, computed) in medians.items():
        numbers = (wall, wall / epoch[0], computed, computed / epoch[1])
        table.add_row(name, *(f"{number:.3g}" for number in numbers))
    Console(width=100).print(table)
    watch.conclude()


if __name__ == "__main__":
    main()
