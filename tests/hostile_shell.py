"""Attacks every command from the shell: signals at instants of its start, streams, and environment variables.

    python -m tests.hostile_shell
    python -m tests.hostile_shell --groups signals --instants 20

Counts, per group, what was tried and what failed: a traceback, an exit code that is not documented, or more than three
lines on standard error. Signals that come before Python has found the package (some 0.05 s) are Python's own, and left
out. Needs Linux.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests import chaos

# Within which signals are sent, from the moment on that a command handles them.
_SECONDS = 3.0

VARIABLES = [
    *(f"JAX_NUM_CPU_DEVICES={number}" for number in ("100000", "abc", "0", "-1", "")),
    *("JAX_PLATFORMS=nonsense", "JAX_PLATFORMS=cuda", "JAX_PLATFORMS=cpu,nonsense", "JAX_PLATFORM_NAME=nonsense"),
    *("JAX_DEBUG_NANS=1", "JAX_DEBUG_INFS=1", "JAX_DISABLE_JIT=1", "JAX_NO_TRACING=1", "JAX_NO_EXECUTION=1"),
    *("JAX_ENABLE_X64=1", "JAX_ENABLE_X64=maybe", "JAX_ENABLE_X64=", "JAX_CHECK_TRACER_LEAKS=1"),
    *("JAX_NUMPY_RANK_PROMOTION=raise", "JAX_NUMPY_RANK_PROMOTION=x", "JAX_NUMPY_DTYPE_PROMOTION=strict"),
    *("JAX_RANDOM_SEED_OFFSET=5", "JAX_DEFAULT_DEVICE=nonsense", "JAX_TRANSFER_GUARD=disallow"),
    *("JAX_LOGGING_LEVEL=loud", "JAX_DEFAULT_MATMUL_PRECISION=nonsense", "JAX_DEFAULT_PRNG_IMPL=nonsense"),
    *("XLA_FLAGS=--nonsense", "XLA_FLAGS=nonsense", "XLA_FLAGS=--xla_force_host_platform_device_count=abc"),
    *("HOME=", "HOME=/proc/nowhere", "LC_ALL=C", "PYTHONIOENCODING=ascii", "PYTHONUNBUFFERED=1", "COLUMNS=1"),
]
REDIRECTIONS = ["> /dev/full", "| head -1", "| true", ">&-", "2>&-", "2> /dev/full", "<&- >&- 2>&-"]
DOCUMENTED = (0, 1, 2)


def commands(folder: Path) -> dict[str, list[str]]:
    """Every command, with arguments by which it works."""
    features = ["tests/data/features.npz", "--head", "tests/data/head.npz"]
    return {
        "main": ["ncjax.main", *chaos.SMALL, "--dry-run"],
        "show": ["ncjax.show", str(folder / "run")],
        "verify": ["ncjax.show", str(folder / "run"), "--verify", "--run", "weight_decay=0,seed=0"],
        "plots": ["ncjax.plots", str(folder / "run")],
        "measure": ["ncjax.measure", *features, "--json"],
    }


def signals(folder: Path, instants: int) -> Iterator[str | None]:
    """SIGINT and SIGTERM, in turn, at instants of the start of every command."""
    for name, arguments in commands(folder).items():
        for i in range(instants):
            signum = (signal.SIGINT, signal.SIGTERM)[i % 2]
            at = _SECONDS * i / instants
            command = [sys.executable, "-m", *arguments]
            process = subprocess.Popen(
                command, cwd=chaos.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            _wait_for_handlers(process)
            time.sleep(at)
            process.send_signal(signum)
            _, said = process.communicate(timeout=300)
            codes = (0, 128 + signum)
            yield _judge(f"{name}, {signum.name} after {at:.2f} s", process.returncode, said, codes)


def streams(folder: Path, _: int) -> Iterator[str | None]:
    """Standard streams that are full, closed, or not read to the end."""
    for name, arguments in commands(folder).items():
        for redirection in REDIRECTIONS:
            script = f'"$0" -m "$@" {redirection}; exit ${{PIPESTATUS[0]}}'
            done = subprocess.run(
                ["bash", "-c", script, sys.executable, *arguments], cwd=chaos.ROOT, capture_output=True, text=True
            )
            codes = (1,) if redirection == "> /dev/full" else (0,)
            yield _judge(f"{name} {redirection}", done.returncode, done.stderr, codes)


def variables(folder: Path, _: int) -> Iterator[str | None]:
    """Environment variables that JAX, XLA or Python read."""
    for name, arguments in commands(folder).items():
        for variable in VARIABLES:
            key, _, value = variable.partition("=")
            command = [sys.executable, "-m", *arguments]
            done = subprocess.run(
                command, cwd=chaos.ROOT, env=os.environ | {key: value}, capture_output=True, text=True, timeout=300
            )
            yield _judge(f"{variable} {name}", done.returncode, done.stderr, DOCUMENTED)


GROUPS = {"signals": signals, "streams": streams, "variables": variables}


def _wait_for_handlers(process: subprocess.Popen) -> None:
    """Returns once a process handles SIGTERM, which Python by itself does not."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        handled = int(status.partition("SigCgt:")[2].split()[0], 16)
        if handled >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def _judge(what: str, code: int, said: str, codes: tuple[int, ...]) -> str | None:
    """What failed; None: nothing."""
    if code in codes and "Traceback" not in said and len(said.splitlines()) <= 3:
        return None
    return f"{what}: exit code {code}, {said[-500:]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="which, by comma (%(default)s)")
    parser.add_argument("--instants", type=int, default=10, help="of signals, per command (%(default)s)")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chaos.finish(chaos.start(chaos.SMALL, folder / "run", folder))
        os.environ.update(chaos.environment(folder))
        for group in arguments.groups.split(","):
            results = list(GROUPS[group](folder, arguments.instants))
            failures = [result for result in results if result is not None]
            print(f"{group}: {len(results)} tried, {len(failures)} failed", *failures, sep="\n    ", flush=True)
            failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
