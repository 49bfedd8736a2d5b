"""Samples per second of a compiled sweep, of the same runs one at a time, and of PyTorch, in one
process.

    pip install -e ".[bench]"
    python -m benchmarks.sweep # a table, benchmarks/results/sweep.json and docs/benchmark_sweep.png
    python -m benchmarks.sweep --quick # half a minute, writes nothing: does it still work?

Contenders, taking turns; every one trains on the same examples, with the same batch size and number
of steps:
    sweep            all runs in one call of `program.make_advance`
    one at a time    the same step, compiled for a single run and called once per run
    pytorch          an eager loop, one run at a time on all cores; the fastest of `VARIANTS`,
                     tried first
    pytorch x cores  that loop in one process per core, one thread each, the runs dealt out

Whoever trains one run at a time goes on with the same weights for the next run, so pays for no
fresh start.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import ncjax
from benchmarks.noise import noise
from ncjax.training import evaluate, layers, models, parallel, program

try:
    import torch
except ImportError:
    print('benchmarks.sweep needs PyTorch: pip install -e ".[bench]"', file=sys.stderr)
    raise SystemExit(2) from None

REPO = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CLASSES = 10
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-3
# Okabe & Ito's colours, safe for the colour-blind.
COLORS = {
    "sweep": "#0072B2",
    "one at a time": "#56B4E9",
    "pytorch": "#D55E00",
    "pytorch x cores": "#E69F00",
}
MARKERS = {"sweep": "o", "one at a time": "s", "pytorch": "^", "pytorch x cores": "v"}
# Threads, whether compiled, and the layout of images (others have one).
VARIANTS = {
    "eager, all cores": (CORES, False, "channels_last"),
    "eager, all cores, channels first": (CORES, False, "contiguous_format"),
    "eager, 1 thread": (1, False, "channels_last"),
    "torch.compile, all cores": (CORES, True, "channels_last"),
}


class Network(NamedTuple):
    """Without biases; of images (H, W, channels) a convolutional one.

    `samples`: how many a timed call trains on, over all runs; a second or two of work.
    """

    image: tuple[int, ...]
    widths: tuple[int, ...]
    batch: int
    examples: int
    samples: int
    batch_norm: bool = False

    def epochs(self, runs: int) -> int:
        return max(1, round(self.samples / (runs * self.samples_per_epoch)))

    @property
    def samples_per_epoch(self) -> int:
        return self.examples // self.batch * self.batch

    @property
    def flops(self) -> int:
        """Executed per sample: forward and both gradients, except that the input needs no
        gradient.
        """
        products = list(self.products())
        return 6 * sum(products) - 2 * products[0]

    @property
    def convolves(self) -> bool:
        return len(self.image) == 3

    @property
    def model(self) -> models.Network:
        normalization = "batch" if self.batch_norm else "none"
        network = models.ConvNet if self.convolves else models.MLP
        return network(self.widths, CLASSES, normalization=normalization)

    def products(self) -> Iterator[int]:
        """Multiplications of each layer, per example."""
        *sides, width = self.image
        for next_width in self.widths:
            sides = [-(-side // 2) for side in sides]
            yield (9 if self.convolves else 1) * width * next_width * math.prod(sides)
            width = next_width
        yield width * math.prod(sides) * CLASSES


NETWORKS = {
    "64-128-128-128-10": Network((64,), (128, 128, 128), 64, 1450, 600_000),
    "784-512-512-512-10": Network((784,), (512, 512, 512), 128, 1024, 65_536),
    "784-2048-2048-10": Network((784,), (2048, 2048), 128, 1024, 16_384),
    "32x32x3-32-64-128-256-10": Network((32, 32, 3), (32, 64, 128, 256), 128, 1024, 16_384),
}
# A measurement is compared with an epoch of this many (runs, training, test examples): digits'
# default sweep, MNIST, a fifth of MNIST, a tenth of CIFAR-10.
MEASURED = {
    "64-128-128-128-10": (18, 1450, 347),
    "784-512-512-512-10": (4, 60_000, 10_000),
    "784-2048-2048-10": (2, 12_000, 2_000),
    "32x32x3-32-64-128-256-10": (4, 5_000, 1_000),
}


# The sweep, and one run at a time


class Program(NamedTuple):
    advance: Callable
    start: Callable[[], tuple]
    data: evaluate.Data


@functools.cache
def compiled(network: Network, runs: int, train_size: int, test_size: int) -> Program:
    """The sweep's program for `runs` runs, and its first states."""
    mesh = parallel.make_mesh(runs)
    structure = layers.find(network.model, network.image, "none", "float32")
    recipe = program.Recipe(
        network.model, structure, "none", "constant", network.batch, 1, train_size
    )
    data = program.place_data(noise(network.image, train_size, test_size), mesh, "float32")
    constant = {
        "weight_decay": WEIGHT_DECAY,
        "learning_rate": LEARNING_RATE,
        "momentum": MOMENTUM,
        "init_scale": 1.0,
    }
    columns = {name: [value] * runs for name, value in constant.items()} | {
        "seed": list(range(runs))
    }
    return Program(
        program.make_advance(recipe, mesh), lambda: program.start(recipe, mesh, columns, data), data
    )


def jax_contender(network: Network, per_call: int, calls: int) -> Callable[[int], None]:
    advance, start, data = compiled(network, per_call, network.examples, network.batch)
    states, keys, hyper = start()

    def run(epochs: int) -> None:
        nonlocal states
        for _ in range(calls):
            states, _ = advance(states, keys, hyper, data, epochs, False)
            jax.block_until_ready(states)

    return run


# PyTorch


class TorchLoop:
    """A tuned loop: inputs normalized and targets one-hot beforehand, one shuffled copy per epoch,
    fused SGD.

    Of images, in the layout of `VARIANTS` (channels_last or PyTorch's own).
    """

    def __init__(self, network: Network, threads: int, compile_it: bool, layout: str) -> None:
        torch.manual_seed(0)
        self.network, self.threads = network, threads
        layout = getattr(torch, layout)
        self.net = torch_network(network)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        data = noise(network.image, network.examples, network.batch)
        self.inputs = torch.from_numpy(
            ((data.train.images - data.center) * data.scale).astype(np.float32)
        )
        if network.convolves:
            self.net.to(memory_format=layout)
            self.inputs = self.inputs.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        self.targets = torch.eye(CLASSES)[torch.from_numpy(data.train.labels).long()]
        self.loss = torch.compile(self.square_loss) if compile_it else self.square_loss

    def square_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        squares = torch.nn.functional.mse_loss(self.net(inputs), targets, reduction="sum")
        return squares * (0.5 / len(inputs))

    def __call__(self, epochs: int) -> None:
        torch.set_num_threads(self.threads)
        for _ in range(epochs):
            order = torch.randperm(len(self.inputs))[: self.network.samples_per_epoch]
            batches = (
                a.index_select(0, order).split(self.network.batch)
                for a in (self.inputs, self.targets)
            )
            for inputs, targets in zip(*batches, strict=True):
                self.optimizer.zero_grad(set_to_none=True)
                self.loss(inputs, targets).backward()
                self.optimizer.step()


def torch_network(network: Network) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in pairwise((network.image[-1], *network.widths)):
        layer = (
            torch.nn.Conv2d(a, b, 3, 2, 1, bias=False)
            if network.convolves
            else torch.nn.Linear(a, b, bias=False)
        )
        layers += [layer, *[torch.nn.BatchNorm2d(b)] * network.batch_norm, torch.nn.ReLU()]
    features = list(network.products())[-1] // CLASSES
    return torch.nn.Sequential(
        *layers, torch.nn.Flatten(), torch.nn.Linear(features, CLASSES, bias=False)
    )


def best_variant(network: Network, names: list[str]) -> tuple[str, dict[str, float]]:
    """The fastest of the named `VARIANTS`, and the samples/s of each: the best of three short
    trials.
    """
    epochs = max(1, network.epochs(1) // 4)
    rates = {}
    for name in names:
        loop = TorchLoop(network, *VARIANTS[name])
        loop(1)
        rates[name] = (
            epochs * network.samples_per_epoch / min(seconds(loop, epochs) for _ in range(3))
        )
    return max(rates, key=rates.__getitem__), rates


def _serve(pipe, network: Network) -> None:
    loop = TorchLoop(network, 1, False, "channels_last")
    while epochs := pipe.recv():
        loop(epochs)
        pipe.send(None)


def torch_processes(network: Network, runs: int) -> Callable[[int], None]:
    """A PyTorch process per core, each training its share of the runs one after another. run(0)
    ends them.
    """
    context = multiprocessing.get_context("spawn")
    shares = [len(range(i, runs, CORES)) for i in range(min(CORES, runs))]
    pipes = []
    for _ in shares:
        here, there = context.Pipe()
        context.Process(target=_serve, args=(there, network), daemon=True).start()
        pipes.append(here)

    def run(epochs: int) -> None:
        for pipe, share in zip(pipes, shares, strict=True):
            pipe.send(epochs * share)
        if epochs:
            for pipe in pipes:
                pipe.recv()

    return run


def check_same_step(network: Network) -> None:
    """Asserts that JAX and PyTorch, from the same weights, reach the same regularized loss in
    three steps.
    """
    advance, start, data = compiled(network, 1, 60, 60)
    states, keys, hyper = start()
    loop = TorchLoop(network, 1, False, "channels_last")
    kernels = [
        np.array(states.params[name]["kernel"][0]) for name in ("layer_1", "layer_2", "head")
    ]
    if network.convolves:  # features are (H, W, channels) here and (channels, H, W) there
        kernels[-1] = np.moveaxis(kernels[-1].reshape(2, 2, -1, CLASSES), 2, 0).reshape(-1, CLASSES)
    with torch.no_grad():
        for weight, kernel in zip(loop.net.parameters(), kernels, strict=True):
            weight.copy_(torch.from_numpy(np.moveaxis(kernel, (-1, -2), (0, 1))))

    def torch_loss() -> float:
        penalty = sum(float((weight.detach() ** 2).sum()) for weight in loop.net.parameters())
        return (
            float(loop.square_loss(loop.inputs, loop.targets).detach())
            + 0.5 * WEIGHT_DECAY * penalty
        )

    before = torch_loss()
    _, metrics = advance(states, keys, hyper, data, 3, True)
    loop(3)
    ours, theirs = float(metrics["loss"][0, 0]), torch_loss()
    assert abs(ours - theirs) < 1e-5 * abs(before - theirs) + 1e-6 * theirs, (ours, theirs)


# Timing


def seconds(call: Callable[..., object], *args: object) -> float:
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


def matmul_rates(size: int = 2048, repeats: int = 10) -> dict[str, float]:
    """GFLOP/s of a float32 square matmul on all cores, the best of `repeats`, by library."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    on_jax, on_torch, matmul = jnp.asarray(a), torch.from_numpy(a), jax.jit(jnp.matmul)
    out = torch.empty(size, size)
    torch.set_num_threads(CORES)
    calls = {
        "jax": lambda: matmul(on_jax, on_jax).block_until_ready(),
        "torch": lambda: torch.matmul(on_torch, on_torch, out=out),
    }
    for call in calls.values():
        call()
    return {
        name: 2e-9 * size**3 / min(seconds(call) for _ in range(repeats))
        for name, call in calls.items()
    }


def time_contenders(
    network: Network, runs: int, variant: str, repeats: int
) -> dict[str, list[float]]:
    """Samples/s of every contender in every round; one untimed round first."""
    loop, processes = TorchLoop(network, *VARIANTS[variant]), torch_processes(network, runs)
    contenders = {
        "sweep": jax_contender(network, runs, 1),
        "one at a time": jax_contender(network, 1, runs),
        "pytorch": lambda epochs: loop(epochs * runs),
        "pytorch x cores": processes,
    }
    epochs = network.epochs(runs)
    for contender in contenders.values():
        contender(1)
    rounds = [
        {name: seconds(run, epochs) for name, run in contenders.items()} for _ in range(repeats)
    ]
    processes(0)
    samples = runs * epochs * network.samples_per_epoch
    return {name: [samples / times[name] for times in rounds] for name in contenders}


def measurement_cost(
    network: Network, runs: int, train_size: int, test_size: int, repeats: int
) -> dict:
    """Seconds of a training epoch and of one measurement of `runs` runs, medians, and their
    ratio.
    """
    advance, start, data = compiled(network, runs, train_size, test_size)
    states, keys, hyper = start()

    def step(epochs: int, measured: bool) -> None:
        nonlocal states
        states, metrics = advance(states, keys, hyper, data, epochs, measured)
        jax.block_until_ready((states, metrics))

    step(0, True)
    rounds = [(seconds(step, 1, False), seconds(step, 0, True)) for _ in range(repeats)]
    epoch, measurement = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(measured / trained for trained, measured in rounds)
    sizes = {"runs": runs, "train_examples": train_size, "test_examples": test_size}
    return sizes | {"epoch_s": epoch, "measurement_s": measurement, "epochs_per_measurement": ratio}


# Results


def make_row(
    name: str, runs: int, contender: str, rates: dict[str, list[float]], matmul: dict[str, float]
) -> dict:
    median = statistics.median(rates[contender])
    gflops = median * NETWORKS[name].flops / 1e9
    return {
        "network": name,
        "runs": runs,
        "contender": contender,
        "samples_per_s": {
            "median": median,
            "min": min(rates[contender]),
            "max": max(rates[contender]),
        },
        "rounds": rates[contender],
        "gflop_per_s": gflops,
        "share_of_matmul": gflops / matmul["torch" if "pytorch" in contender else "jax"],
        "sweep_speedup": statistics.median(rates["sweep"]) / median,
    }


def show(result: dict, console: Console) -> None:
    """Prints the tables."""
    matmul = result["matmul_gflop_per_s"]
    title = (
        f"float32 matmul of 2048: JAX {matmul['jax']:.0f}, PyTorch {matmul['torch']:.0f} GFLOP/s "
        f"on {CORES} cores"
    )
    table = Table(title=title)
    for column in (
        "network",
        "runs",
        "contender",
        "samples/s",
        "min-max",
        "GFLOP/s",
        "of matmul",
        "sweep is",
    ):
        table.add_column(column, justify="left" if column in ("network", "contender") else "right")
    for row in result["rows"]:
        rate, is_sweep = row["samples_per_s"], row["contender"] == "sweep"
        table.add_row(
            row["network"] if is_sweep else "",
            str(row["runs"]) if is_sweep else "",
            row["contender"],
            f"{rate['median']:,.0f}",
            f"{rate['min']:,.0f}-{rate['max']:,.0f}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['share_of_matmul']:.0%}",
            "" if is_sweep else f"{row['sweep_speedup']:.2f}x",
            end_section=row["contender"] == "pytorch x cores",
        )
    console.print(table)
    for name, trial in result["pytorch_variants"].items():
        tried = "; ".join(
            f"{variant} {rate:,.0f}" for variant, rate in trial["samples_per_s"].items()
        )
        console.print(
            f"pytorch on {name}: {trial['chosen']} (samples/s of one run: {tried})", highlight=False
        )
    for name, cost in result["measurement"].items():
        console.print(
            f"one measurement of {cost['runs']} runs of {name} on {cost['train_examples']:,} + "
            f"{cost['test_examples']:,} examples: {cost['measurement_s'] * 1e3:.0f} ms = "
            f"{cost['epochs_per_measurement']:.2f} training epochs",
            highlight=False,
        )


def plot(result: dict, path: Path) -> None:
    """GFLOP/s against the number of runs, a panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    names = list(result["pytorch_variants"])
    figure, axes = plt.subplots(
        1, len(names), figsize=(7, 2.7), sharey=True, squeeze=False, layout="constrained"
    )
    ceiling = max(result["matmul_gflop_per_s"].values())
    for name, axis in zip(names, axes[0], strict=True):
        x = []
        for contender, color in COLORS.items():
            rows = [
                row
                for row in result["rows"]
                if (row["network"], row["contender"]) == (name, contender)
            ]
            x, y = [row["runs"] for row in rows], [row["gflop_per_s"] for row in rows]
            spread = [
                [row["samples_per_s"][end] * NETWORKS[name].flops / 1e9 for row in rows]
                for end in ("min", "max")
            ]
            style = {
                "color": color,
                "marker": MARKERS[contender],
                "markersize": 4,
                "linewidth": 1.3,
                "elinewidth": 0.8,
            }
            # The sweep and one run at a time coincide at one run: the sweep lies on top.
            style |= {"zorder": 4 if contender == "sweep" else 3, "capsize": 2}
            axis.errorbar(x, y, np.abs(np.array(spread) - y), label=contender, **style)
        axis.axhline(ceiling, color="0.4", linestyle=":", linewidth=1, label="2048 x 2048 matmul")
        axis.set(title=name, xlabel="runs", xscale="log", ylim=(0, 1.08 * ceiling))
        axis.set_xticks(x, map(str, x), minor=False)
        axis.minorticks_off()
    axes[0, 0].set_ylabel("GFLOP/s")
    rounds, hardware = result["config"]["repeats"], result["machine"]
    caption = (
        f"Median and range of {rounds} rounds; {hardware['cpu']}, {hardware['cores']} cores, "
        "float32"
    )
    figure.suptitle(caption, fontsize=7, color="0.3")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [
        line.partition(":")[2].strip()
        for line in info.splitlines()
        if line.startswith("model name")
    ]
    versions = {"ncjax": ncjax.__version__}
    versions |= {name: metadata.version(name) for name in ("jax", "jaxlib", "torch", "numpy")}
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": CORES,
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME"
    )
    parser.add_argument("--runs", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="first network, 1 and 2 runs; writes nothing without --out",
    )
    parser.add_argument("--out", type=Path, help="folder for sweep.json and benchmark_sweep.png")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    parallel.use_every_core()
    if os.getloadavg()[0] > 0.3 * CORES:
        print(
            "This machine is busy: numbers will be too low, and PyTorch's lowest of all.",
            file=sys.stderr,
        )
    names, runs, repeats = args.networks, args.runs, args.repeats
    networks, variants, measured, out = NETWORKS, list(VARIANTS), MEASURED, args.out
    if args.quick:
        names, runs, repeats, variants = names[:1], [1, 2], 2, variants[:1]
        networks = {
            name: network._replace(samples=network.samples // 50)
            for name, network in NETWORKS.items()
        }
        measured = {
            name: (2, network.examples, network.batch) for name, network in NETWORKS.items()
        }
    # One batch is all examples, so that their order does not matter.
    for image in ((64,), (8, 8, 3)):
        check_same_step(Network(image, (32, 32), 60, 60, 60))
    result = {
        "machine": machine(),
        "config": {"runs": runs, "repeats": repeats, "networks": {}},
        "rows": [],
    }
    result |= {"pytorch_variants": {}, "measurement": {}}
    matmuls = [matmul_rates()]
    rates = {}
    for name in names:
        network = networks[name]
        result["config"]["networks"][name] = network._asdict()
        tried = [name for name in variants if network.convolves or "channels" not in name]
        chosen, trials = best_variant(network, tried)
        result["pytorch_variants"][name] = {"chosen": chosen, "samples_per_s": trials}
        for count in runs:
            print(f"{name}, {count} runs ...", file=sys.stderr)
            rates[name, count] = time_contenders(network, count, chosen, repeats)
        result["measurement"][name] = measurement_cost(
            network, *measured[name], repeats=min(repeats, 3)
        )
        matmuls.append(matmul_rates())
    matmul = {library: max(each[library] for each in matmuls) for library in matmuls[0]}
    result["matmul_gflop_per_s"] = matmul
    for (name, count), by_contender in rates.items():
        result["rows"] += [
            make_row(name, count, contender, by_contender, matmul) for contender in by_contender
        ]
    show(result, Console(width=110))
    if args.quick and out is None:
        return
    json_path = (out or REPO / "benchmarks" / "results") / "sweep.json"
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, (out or REPO / "docs") / "benchmark_sweep.png")


if __name__ == "__main__":
    main()
