"""Samples per second of a compiled sweep, of the same runs one at a time, and of PyTorch, in one
process.

    pip install -e ".[bench]"
    python -m benchmarks.sweep # a table, benchmarks/results/sweep.json and docs/benchmark_sweep.png
    python -m benchmarks.sweep --quick # half a minute, writes nothing: does it still work?

Contenders, taking turns; every one trains on the same examples, with the same batch size and number
of steps:
    sweep            all runs in one call of `program.make_advance`
    one at a time    the same step, compiled for a single run and called once per run
    pytorch          a loop, one run at a time; the fastest of `rivals.VARIANTS`, tried first
    pytorch vmap     all runs at once by torch.func.vmap; the faster of `rivals.VMAPPED`
    pytorch x cores  an eager loop in one process per core, one thread each, the runs dealt out

Each is also held against the floor of the machine (`benchmarks.floor`). Whoever trains one run at a
time goes on with the same weights for the next run, so pays for no fresh start.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

try:
    import torch
except ImportError:
    print('benchmarks.sweep needs PyTorch: pip install -e ".[bench]"', file=sys.stderr)
    raise SystemExit(2) from None

from benchmarks import floor
from benchmarks.machine import CORES, Watch, seconds
from benchmarks.networks import (
    CLASSES,
    LEARNING_RATE,
    MEASURED,
    MOMENTUM,
    NETWORKS,
    WEIGHT_DECAY,
    Network,
)
from benchmarks.noise import noise
from benchmarks.rivals import (
    VARIANTS,
    VMAPPED,
    TorchLoop,
    TorchSweep,
    best_variant,
    best_vmapped,
    torch_processes,
)
from ncjax.training import evaluate, layers, parallel, program

REPO = Path(__file__).resolve().parents[1]
# Okabe & Ito's colours, safe for the colour-blind.
COLORS = {
    "sweep": "#0072B2",
    "one at a time": "#56B4E9",
    "pytorch": "#D55E00",
    "pytorch vmap": "#CC79A7",
    "pytorch x cores": "#E69F00",
}
MARKERS = dict(zip(COLORS, "os^Dv", strict=True))


# The sweep, and one run at a time


class Program(NamedTuple):
    advance: program.Advance
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


def check_same_step(network: Network) -> None:
    """Asserts that JAX and PyTorch, from the same weights, reach the same regularized loss in
    three steps.
    """
    advance, start, data = compiled(network, 1, 60, 60)
    states, keys, hyper = start()
    loop = TorchLoop(network, 1, None, "channels_last")
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


def time_contenders(
    network: Network, runs: int, variant: str, vmapped: str, repeats: int
) -> dict[str, list[float]]:
    """Samples/s of every contender in every round; one untimed round first."""
    loop, processes = TorchLoop(network, *VARIANTS[variant]), torch_processes(network, runs)
    contenders = {
        "sweep": jax_contender(network, runs, 1),
        "one at a time": jax_contender(network, 1, runs),
        "pytorch": lambda epochs: loop(epochs * runs),
        "pytorch vmap": TorchSweep(network, runs, VMAPPED[vmapped]),
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
    name: str, runs: int, contender: str, rates: dict[str, list[float]], least: float
) -> dict:
    """Returns a row of the table; `least` is the floor in samples/s."""
    median = statistics.median(rates[contender])
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
        "gflop_per_s": median * NETWORKS[name].flops / 1e9,
        "share_of_floor": median / least,
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
        "of floor",
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
            f"{row['share_of_floor']:.0%}",
            "" if is_sweep else f"{row['sweep_speedup']:.2f}x",
            end_section=row["contender"] == "pytorch x cores",
        )
    console.print(table)
    for name, trial in result["pytorch_variants"].items():
        for way, one in trial.items():
            tried = "; ".join(f"{v} {rate:,.0f}" for v, rate in one["samples_per_s"].items())
            console.print(f"{way} on {name}: {one['chosen']} (samples/s: {tried})", highlight=False)
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
        1, len(names), figsize=(7.4, 3), sharey=True, squeeze=False, layout="constrained"
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
        least = result["floor_samples_per_s"][name] * NETWORKS[name].flops / 1e9
        axis.axhline(least, color="0.4", linestyle=":", linewidth=1, label="the machine's floor")
        axis.set(xlabel="runs", xscale="log", ylim=(0, 1.08 * ceiling))
        axis.set_title(name, size=6.5)
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
    figure.legend(
        handles, labels, loc="outside lower center", ncols=-(-len(labels) // 2), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


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
    watch = Watch(concludes=not args.quick)
    # One batch is all examples, so that their order does not matter.
    for image in ((64,), (8, 8, 3)):
        check_same_step(Network(image, (32, 32), 60, 60, 60))
    result = measured(args, watch.machine)
    show(result, Console(width=110))
    if args.quick and args.out is None:
        return
    watch.conclude()
    json_path = (args.out or REPO / "benchmarks" / "results") / "sweep.json"
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, (args.out or REPO / "docs") / "benchmark_sweep.png")


def measured(args: argparse.Namespace, hardware: dict) -> dict:
    """Returns all that is measured, as it is written to sweep.json."""
    names, runs, repeats = args.networks, args.runs, args.repeats
    networks, variants, of_measurement = NETWORKS, list(VARIANTS), MEASURED
    if args.quick:
        names, runs, repeats, variants = names[:1], [1, 2], 2, variants[:1]
        networks = {
            name: network._replace(samples=network.samples // 50)
            for name, network in NETWORKS.items()
        }
        of_measurement = {
            name: (2, network.examples, network.batch) for name, network in NETWORKS.items()
        }
    result: dict = {"machine": hardware, "rows": [], "pytorch_variants": {}, "measurement": {}}
    result["config"] = {"runs": runs, "repeats": repeats, "networks": {}}
    matmuls, rates = [floor.matmul_rates()], {}
    for name in names:
        network = networks[name]
        result["config"]["networks"][name] = network._asdict()
        tried = [name for name in variants if network.convolves or "channels" not in name]
        chosen, trials = best_variant(network, tried)
        vmapped, vmapped_trials = best_vmapped(network, runs[-1])
        result["pytorch_variants"][name] = {
            "pytorch": {"chosen": chosen, "samples_per_s": trials},
            "pytorch vmap": {"chosen": vmapped, "samples_per_s": vmapped_trials},
        }
        for count in runs:
            print(f"{name}, {count} runs ...", file=sys.stderr)
            rates[name, count] = time_contenders(network, count, chosen, vmapped, repeats)
        result["measurement"][name] = measurement_cost(
            network, *of_measurement[name], repeats=min(repeats, 3)
        )
        matmuls.append(floor.matmul_rates())
    matmul = {library: max(each[library] for each in matmuls) for library in matmuls[0]}
    result["matmul_gflop_per_s"] = matmul
    least = {name: floor.samples_per_second(networks[name], max(matmul.values())) for name in names}
    result["floor_samples_per_s"] = least
    for (name, count), by_contender in rates.items():
        result["rows"] += [
            make_row(name, count, contender, by_contender, least[name])
            for contender in by_contender
        ]
    return result


if __name__ == "__main__":
    main()
