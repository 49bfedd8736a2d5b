"""Where the time of a training step goes, by JAX's profiler, beside the floor of each part.

    pip install -e ".[bench]"
    python -m benchmarks.profile # a table
    python -m benchmarks.profile --quick # the smallest network

Every operation that XLA executes on a device is traced, with the time until the next one begins, so
that the parts add up to the whole:
    matmuls       products of the forward and backward pass
    between them  what else these two do: ReLU, loss and, of convolutions, patches
    update        decay, momenta and weights
    the rest      drawing batches, reading examples, copies
XLA's matmul on a CPU returns before its threads are done, so that time in which a device runs no
operation is the last matmul's.
"""

import argparse
import collections
import itertools
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions
from rich.console import Console
from rich.table import Table

from benchmarks import floor
from benchmarks.machine import Watch, seconds
from benchmarks.networks import NETWORKS, Network
from benchmarks.sweep import compiled
from ncjax.training import parallel

PARTS = ("matmuls", "between them", "update", "the rest")
# What contains the operations that are traced as well.
_CONTAINERS = ("while", "call", "conditional")


class Operation(NamedTuple):
    """One execution of an operation of XLA, in nanoseconds."""

    begin: float
    end: float
    name: str


def parts_in(text: str) -> dict[str, str]:
    """Returns the part of each instruction of a compiled program, read from its text."""
    multiplies, parts = set(), {}
    computation = ""
    for line in text.splitlines():
        if opened := re.match(r"%?([\w.-]+) \(.*\{$", line):
            computation = opened[1]
        if not (found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?\s([\w-]+)\(", line)):
            continue
        name, opcode = found.groups()
        if opcode == "dot":
            multiplies.add(computation)
        called = re.search(r"calls=%?([\w.-]+)", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        is_matmul = opcode == "dot" or (called and called[1] in multiplies)
        parts[name] = "matmuls" if is_matmul else _part(scope[1] if scope else "")
    return parts


def _part(scope: str) -> str:
    """Returns the part of what is no matmul, by the JAX operations it was made of."""
    if "jvp(" in scope:
        return "between them"
    # The update is the arithmetic of the loop of steps, inside that of epochs, outside the loss.
    in_step = re.search(r"while/body/while/body/closed_call/(add|sub|mul|neg|select_n)$", scope)
    return "update" if in_step else "the rest"


def operations(folder: Path) -> dict[int, list[Operation]]:
    """Reads a trace: the operations of the program that trains, by device, as they began."""
    (path,) = folder.rglob("*.xplane.pb")
    found = collections.defaultdict(list)
    for plane in ProfileData.from_file(str(path)).planes:
        for event in itertools.chain.from_iterable(line.events for line in plane.lines):
            stats = dict(event.stats)
            name = stats.get("hlo_op", "")
            if stats.get("hlo_module") == "jit_train" and not name.startswith(_CONTAINERS):
                begin = event.start_ns
                operation = Operation(begin, begin + event.duration_ns, name)
                found[stats["device_ordinal"]].append(operation)
    return {device: sorted(each) for device, each in found.items()}


def seconds_by_part(by_device: dict[int, list[Operation]], parts: dict[str, str]) -> dict:
    """Returns the seconds of all devices together that each part took."""
    taken: dict[str, float] = {part: 0.0 for part in PARTS}
    for of_device in by_device.values():
        has_multiplied = False
        for one, following in itertools.pairwise(of_device):
            part = parts.get(one.name, "the rest")
            has_multiplied |= part == "matmuls"
            end = min(one.end, following.begin)
            taken[part] += 1e-9 * (end - one.begin)
            taken["matmuls" if has_multiplied else "the rest"] += 1e-9 * (following.begin - end)
    return taken


def profile(network: Network, runs: int, repeats: int) -> tuple[list[dict], list[float], int]:
    """Traces a call of a quarter of the epochs that `benchmarks.sweep` times, `repeats` times.

    Returns:
      Milliseconds of a device for one step of one run, by part; what the same is without a trace,
      from the clock; and the number of devices.
    """
    advance, start, data = compiled(network, runs, network.examples, network.batch)
    states, keys, hyper = start()
    advance = advance.compile(states, keys, hyper, data)
    parts = parts_in(advance.train.as_text())

    epochs = -(-network.epochs(runs) // 4)

    def train() -> None:
        nonlocal states
        states, _ = advance(states, keys, hyper, data, epochs, False)
        jax.block_until_ready(states)

    options = ProfileOptions()
    options.python_tracer_level = 0
    train()
    steps = runs * epochs * (network.samples_per_epoch // network.batch)
    traced, untraced, devices = [], [], 0
    for _ in range(repeats):
        untraced.append(seconds(train))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                train()
            by_device = operations(Path(folder))
        devices = len(by_device)
        taken = seconds_by_part(by_device, parts)
        traced.append({part: 1e3 * each / steps for part, each in taken.items()})
    return traced, [1e3 * devices * each / steps for each in untraced], devices


def show(name: str, runs: int, repeats: int, table: Table) -> None:
    """Adds the rows of a network, medians of its rounds."""
    network = NETWORKS[name]
    traced, untraced, devices = profile(network, runs, repeats)
    rate = max(floor.matmul_rates().values())
    whole = 1e3 * network.batch / floor.samples_per_second(network, rate)
    multiplying = 1e-6 * network.batch * network.flops / rate
    # The floor is of all devices together, and the time that of one.
    least = {"matmuls": devices * multiplying, "all but matmuls": devices * (whole - multiplying)}
    rows = [
        *((part, [each[part] for each in traced]) for part in PARTS),
        ("all but matmuls", [sum(each.values()) - each["matmuls"] for each in traced]),
        ("a step", [sum(each.values()) for each in traced]),
        ("a step, untraced", untraced),
    ]
    step = statistics.median(rows[-2][1])
    least |= dict.fromkeys(("a step", "a step, untraced"), devices * whole)
    for part, times in rows:
        took = statistics.median(times)
        table.add_row(
            f"{name}, {rate:.0f} GFLOP/s" if part == "matmuls" else "",
            part,
            f"{took:.3g} ({min(times):.3g} to {max(times):.3g})",
            f"{took / step:.0%}",
            f"{least[part]:.3g}" if part in least else "",
            f"{took / least[part]:.2f}x" if part in least else "",
            end_section=part == "a step, untraced",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="the first network only, on any machine"
    )
    args = parser.parse_args()
    parallel.use_every_core()
    watch = Watch(concludes=not args.quick)
    table = Table(title=f"{args.runs} runs; milliseconds of a device for one step of one run")
    for column in ("network, rate of matmuls", "part", "ms", "share", "floor", "of it"):
        table.add_column(column)
    for name in list(NETWORKS)[: 1 if args.quick else None]:
        print(f"{name} ...", file=sys.stderr)
        show(name, args.runs, args.repeats, table)
    Console(width=120).print(table)
    watch.conclude()


if __name__ == "__main__":
    main()
