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
XLA's matmul on a CPU returns before its threads are done. Gaps in which a device is seen to run no
operation are counted to the last matmul, which may still run, and shown apart.
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
# Time of matmuls in which no operation was seen.
IN_GAPS = "of matmuls, in gaps"
# What contains the operations that are traced as well.
_CONTAINERS = ("while", "call", "conditional")


class Operation(NamedTuple):
    """One execution of an operation of XLA, in nanoseconds."""

    begin: float
    end: float
    name: str


def parts_in(text: str) -> dict[str, str]:
    """Returns the part of each instruction of a compiled program, read from its text."""
    # The scope of a step is where the loss is differentiated.
    steps = set(re.findall(r'op_name="([^"]*/)(?:transpose\()?jvp\(', text))
    multiplies, parts = set(), {}
    computation = ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = opened[1]
        if not (found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?\s([\w-]+)\(", line)):
            continue
        name, opcode = found.groups()
        called = re.search(r"calls=%?([\w.-]+)", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if opcode == "dot" or (called and called[1] in multiplies):
            multiplies.add(computation)
            parts[name] = "matmuls"
        else:
            parts[name] = _part(scope[1] if scope else "", steps)
    return parts


def _part(scope: str, steps: set[str]) -> str:
    """Returns the part of what is no matmul, by the JAX operations it was made of."""
    if "jvp(" in scope:
        return "between them"
    # The update is the arithmetic of a step outside the loss; a gather reads examples.
    outer, _, operation = scope.rpartition("/")
    is_arithmetic = operation in ("add", "sub", "mul", "neg", "select_n")
    return "update" if is_arithmetic and f"{outer}/" in steps else "the rest"


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


def seconds_by_part(
    by_device: dict[int, list[Operation]], parts: dict[str, str]
) -> dict[str, float]:
    """Returns the seconds of all devices together that each part took, and of these `in gaps`."""
    taken: dict[str, float] = {part: 0.0 for part in (*PARTS, IN_GAPS)}
    for of_device in by_device.values():
        has_multiplied = False
        begins = [one.begin for one in of_device[1:]] + [of_device[-1].end]
        for one, following in zip(of_device, begins, strict=True):
            part = parts.get(one.name, "the rest")
            has_multiplied |= part == "matmuls"
            end = min(one.end, following)
            taken[part] += 1e-9 * (end - one.begin)
            gap = 1e-9 * (following - end)
            taken["matmuls" if has_multiplied else "the rest"] += gap
            taken[IN_GAPS] += gap * has_multiplied
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


def floors(network: Network, rate: float, devices: int) -> dict[str, float]:
    """Returns the least milliseconds of a device that some rows can take; `rate` in GFLOP/s.

    Those of matmuls are of their FLOPs alone.
    """
    whole = network.batch / floor.samples_per_second(network, rate)
    multiplying = 1e-9 * network.batch * network.flops / rate
    update = floor.update_share(network) * (whole - multiplying)
    least = {"matmuls": multiplying, "update": update, "a step": whole, "untraced": whole}
    return {part: 1e3 * devices * each for part, each in least.items()}


def rows(traced: list[dict], untraced: list[float]) -> dict[str, list[float]]:
    """Returns the milliseconds of every round, by row of the table."""
    by_part = {part: [each[part] for each in traced] for part in (*PARTS, IN_GAPS)}
    step = [sum(each[part] for part in PARTS) for each in traced]
    return by_part | {"a step": step, "untraced": untraced}


def show(found: dict[str, tuple[dict[str, list[float]], dict[str, float]]], table: Table) -> None:
    """Adds the rows of every network, medians of its rounds, and their floors."""
    for name, (by_row, least) in found.items():
        step = statistics.median(by_row["a step"])
        for part, times in by_row.items():
            took = statistics.median(times)
            table.add_row(
                name if part == PARTS[0] else "",
                part,
                f"{took:.3g} ({min(times):.3g} to {max(times):.3g})",
                f"{took / step:.0%}",
                f"{least[part]:.3g}" if part in least else "",
                f"{took / least[part]:.2f}x" if part in least else "",
                end_section=part == "untraced",
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
    rates, measured = [floor.matmul_rates()], {}
    for name in list(NETWORKS)[: 1 if args.quick else None]:
        print(f"{name} ...", file=sys.stderr)
        measured[name] = profile(NETWORKS[name], args.runs, args.repeats)
        rates.append(floor.matmul_rates())
    rate = max(max(each.values()) for each in rates)
    table = Table(
        title=f"{args.runs} runs; milliseconds of a device for one step of one run; "
        f"matmul {rate:.0f} GFLOP/s"
    )
    for column in ("network", "part", "ms", "share", "floor", "of it"):
        table.add_column(column)
    found = {
        name: (rows(traced, untraced), floors(NETWORKS[name], rate, devices))
        for name, (traced, untraced, devices) in measured.items()
    }
    show(found, table)
    Console(width=120).print(table)
    watch.conclude()


if __name__ == "__main__":
    main()
