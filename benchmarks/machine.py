"""Says on what machine a benchmark runs, and whether others left it alone.

A ratio of two programs means nothing where a third one takes a core from either. `Watch` refuses to
begin on a busy machine, and says at the end whether it stayed idle.
"""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ncjax

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# The share of all cores that others may take: about what a timing differs by from one round to the
# next.
_IDLE = 0.05
_LOOK_SECONDS = 2.0
_STAT = Path("/proc/stat")


def describe() -> dict[str, Any]:
    """Returns processor, cores, load and versions of what takes part."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [
        line.partition(":")[2].strip()
        for line in info.splitlines()
        if line.startswith("model name")
    ]
    versions = {"ncjax": ncjax.__version__}
    for name in ("jax", "jaxlib", "torch", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": CORES,
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions,
    }


def seconds(call: Callable[..., object], *args: object) -> float:
    """Returns how long a call takes."""
    begin = time.perf_counter()
    call(*args)
    return time.perf_counter() - begin


class Watch:
    """Watches from its creation on what share of all cores other processes take.

    Attributes:
      machine: what `describe` returns.
    """

    def __init__(self, *, concludes: bool) -> None:
        """Prints the machine; ends the process where it is busy and the benchmark `concludes`."""
        self.machine, self._concludes = describe(), concludes
        versions = ", ".join(f"{name} {v}" for name, v in self.machine["versions"].items())
        print(
            f"{self.machine['cpu']}, {CORES} cores, Python {self.machine['python']}, {versions}; "
            f"load {self.machine['load_average_before'][0]:.2f}",
            file=sys.stderr,
        )
        self._restart()
        if concludes:
            time.sleep(_LOOK_SECONDS)
            if busy := self.busy():
                print(f"error: {busy}; end them, or take --quick", file=sys.stderr)
                raise SystemExit(2)
        self._restart()

    def _restart(self) -> None:
        self._before = time.perf_counter(), _used_by_all(), _used_by_us()

    def busy(self) -> str:
        """Returns what to say if other processes took a twentieth of all cores or more, or ""."""
        if not _STAT.exists():  # not Linux: nobody can tell
            return ""
        begin, of_all, of_us = self._before
        others = (_used_by_all() - of_all) - (_used_by_us() - of_us)
        share = others / (CORES * (time.perf_counter() - begin))
        return f"other processes take {share:.0%} of {CORES} cores" if share > _IDLE else ""

    def conclude(self) -> None:
        """Ends the process with exit code 1 if the benchmark concludes and the machine was busy."""
        if self._concludes and not self.concluded():
            raise SystemExit(1)

    def concluded(self) -> bool:
        """Returns whether the machine stayed idle; says so if not."""
        busy = self.busy()
        if busy:
            print(
                f"This machine was busy ({busy}): no conclusion, and nothing is written.",
                file=sys.stderr,
            )
        return not busy


def _used_by_all() -> float:
    """Returns the seconds that all cores have computed, or were taken from this machine by its
    host.
    """
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, _STAT.read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _used_by_us() -> float:
    """Returns the seconds that this process and all that it began have computed."""
    parents, ticks = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended; its parent's times have it
            continue
        parents[folder.name], ticks[folder.name] = fields[1], sum(map(int, fields[11:15]))

    def is_ours(process: str) -> bool:
        while process in parents and process != str(os.getpid()):
            process = parents[process]
        return process == str(os.getpid())

    return sum(ticks[p] for p in ticks if is_ours(p)) / os.sysconf("SC_CLK_TCK")
