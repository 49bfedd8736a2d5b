"""SIGINT and SIGTERM at any instant of every command: no traceback, and what was begun goes on to
the same bits.

Instants count from when the interpreter runs the first line of a program: before, nothing of ours
is there to answer.
"""

import functools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import chaos
from tests.hostile import engine
from tests.hostile.engine import Failure, Ran

_INSTANTS = (0.0, 0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 1.7, 2.3, 3.0)
_FEATURES = ("tests/data/features.npz", "--head", "tests/data/head.npz")
# Command line by name; "{folder}" is the case's own, with a copy of a finished run in it.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("ncjax.main", *chaos.SMALL, "--workdir={folder}/new"),
    "dry run": ("ncjax.main", *chaos.SMALL, "--dry-run"),
    "measure": ("ncjax", "measure", *_FEATURES, "--json"),
    "measure --figures": ("ncjax", "measure", *_FEATURES, "--figures", "{folder}/figures"),
    "show": ("ncjax", "show", "{folder}/run"),
    "show --verify": ("ncjax", "show", "{folder}/run", "--verify"),
    "show --export": (
        "ncjax",
        "show",
        "{folder}/run",
        "--run",
        "weight_decay=0,seed=0",
        "--export",
        "{folder}/x.npz",
    ),
    "plot": ("ncjax", "plot", "{folder}/run"),
}
# Says that it has begun; then as `python -m` does.
_STARTER = """
import os, runpy, sys
os.write({fd}, b".")
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
# Where nothing of ours has a say yet, the signal itself ends the process.
_RIGHT_CODES = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143, -signal.SIGTERM)}


def _begin(folder: Path, command: str):
    """Starts a command; returns it once its program has begun."""
    words = [word.format(folder=folder) for word in _COMMANDS[command]]
    ours, theirs = os.pipe()
    process = chaos.subprocess.Popen(
        [sys.executable, "-c", _STARTER.format(fd=theirs), *words],
        cwd=engine.ROOT,
        stdin=chaos.subprocess.DEVNULL,
        stdout=chaos.subprocess.PIPE,
        stderr=chaos.subprocess.PIPE,
        pass_fds=(theirs,),
        start_new_session=True,
    )
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    return process


def _check(ran: Ran, signum: int) -> None:
    if (
        ran.code == -signal.SIGINT
        and ran.err.startswith("Traceback")
        and f"{engine.ROOT}/ncjax/" not in ran.err
    ):
        return  # Python was still looking for the module: no line of ours had run
    lines = [line for line in ran.err.splitlines() if not line.startswith("warning: ")]
    engine.check(ran, refuses=False, also=_RIGHT_CODES[signal.Signals(signum)])
    if len(lines) > 4:
        raise Failure("other", f"{len(lines)} lines: {ran}")


def _interrupt(command: str, signum: int, instant: float, folder: Path) -> None:
    if "run" in "".join(_COMMANDS[command]):
        shutil.copytree(engine.trained(), folder / "run")
    process = _begin(folder, command)
    time.sleep(instant)
    process.send_signal(signum)
    _check(engine.finish(process), signum)
    if command == "train":
        _continue(folder / "new")
    if command == "show --export" and (folder / "x.npz").exists():
        import numpy as np

        with np.load(folder / "x.npz") as exported:
            assert all(exported[name].size for name in exported.files)
    if (folder / "run").exists():
        engine.check_same(folder / "run", engine.reference(), Ran(0, "", ""))


def _continue(workdir: Path) -> None:
    ran = engine.run_here("train", *chaos.SMALL, f"--workdir={workdir}")
    engine.check(
        ran, functools.partial(engine.check_same, workdir, engine.reference()), refuses=False
    )


def _interrupt_training(signum: int, only: str, number: int, again: bool, folder: Path) -> None:
    """At the moment when a file appears or changes; `again`: with a second signal right after
    the first.
    """
    process = _begin(folder, "train")
    chaos.wait_for_event(process, folder / "new", number, only)
    for _ in range(1 + again):
        process.send_signal(signum)
        time.sleep(0.01)
    _check(engine.finish(process), signum)
    _continue(folder / "new")


def cases(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for command in _COMMANDS:
        for i, instant in enumerate(_INSTANTS):
            later = 0.02 + instant + rng.uniform(0, 0.05 + instant / 10)
            signum = signal.SIGTERM if i % 4 == 3 else signal.SIGINT
            yield (
                f"{command}, {signum.name} after {instant:g} s",
                functools.partial(_interrupt, command, signum, later),
            )
    for i, (only, number) in enumerate(
        (
            ("config.json", 1),
            ("history.nc", 1),
            ("checkpoints/", 1),
            ("checkpoints/", 3),
            ("metrics.jsonl", 2),
            (".tmp", 2),
            ("figures", 1),
        )
    ):
        signum = signal.SIGINT if i % 2 else signal.SIGTERM
        for again in (False, True):
            twice = " twice" if again else ""
            yield (
                f"train, {signum.name}{twice} at change {number} of {only}",
                functools.partial(_interrupt_training, signum, only, number, again),
            )
