"""Users and machines: without a home, a name, a place to write, room on the disk, inodes or open
files.
"""

import contextlib
import functools
import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests import chaos
from tests.hostile import engine
from tests.hostile.engine import Failure, Ran, Skipped

_NOBODY, _UNKNOWN = 65534, 54321  # the second has no entry in the list of users
_MEASURE = (
    "ncjax",
    "measure",
    "tests/data/features.npz",
    "--head",
    "tests/data/head.npz",
    "--json",
)


def _as(uid: int) -> tuple[str, ...]:
    """What runs a command as another user, who may read what root may (the interpreter can lie in
    root's home) and write only what is his."""
    if os.getuid():
        raise Skipped("only root can be another user")
    if not shutil.which("setpriv"):
        raise Skipped("there is no setpriv")
    capability = "+dac_read_search"
    ids = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    return ("setpriv", *ids, f"--inh-caps={capability}", f"--ambient-caps={capability}")


def _command(kind: str, folder: Path) -> tuple:
    """Command lines that write into the folder where they must, from any current folder."""
    config = f"--config={engine.ROOT / 'configs' / 'digits.py'}"
    return {
        "measure": _MEASURE,
        "train": (engine.UNDRAWN, config, *chaos.SMALL, f"--workdir={folder / 'own' / 'new'}"),
        "dry run": ("ncjax.main", config, *chaos.SMALL, "--dry-run"),
        "digits": ("ncjax.main", config, "--config.train.epochs=1", "--dry-run"),
        "show": ("ncjax", "show", folder / "run"),
        "verify": ("ncjax", "show", folder / "run", "--verify"),
        "plot": ("ncjax", "plot", folder / "run"),
        "continue": (engine.UNDRAWN, config, *chaos.SMALL, f"--workdir={folder / 'run'}"),
        "export": (
            "ncjax",
            "show",
            folder / "run",
            "--run",
            "weight_decay=0,seed=0",
            "--export",
            folder / "no/x.npz",
        ),
    }[kind]


def _right(kind: str, folder: Path, ran: Ran) -> None:
    if kind == "measure":
        if json.loads(ran.out)["metrics"] != _numbers():
            raise Failure("silent", f"other numbers: {ran}")
    elif kind == "train":
        engine.check_same(folder / "own" / "new", engine.reference(), ran)
    elif kind in ("export",):
        raise Failure("silent", f"exported where nothing can be written: {ran}")


@functools.cache
def _numbers() -> dict:
    return json.loads(engine.run_here(*_MEASURE[1:]).out)["metrics"]


def _user(uid: int, kind: str, environment: dict, works: bool, folder: Path) -> None:
    """Own folder `own`; `no` and the run belong to root, and so does the current folder."""
    prefix = _as(uid)
    (folder / "own").mkdir()
    (folder / "no").mkdir()
    shutil.copytree(engine.unfinished() if kind == "continue" else engine.trained(), folder / "run")
    shutil.copytree(engine.ROOT / "tests/data", folder / "no/tests/data")
    os.chmod(folder, 0o755)
    os.chown(folder / "own", uid, uid)
    caches = {"XDG_CACHE_HOME": None, "MPLCONFIGDIR": None, "JAX_COMPILATION_CACHE_DIR": None}
    env = caches | {
        name: str(value).format(folder=folder) if value else value
        for name, value in environment.items()
    }
    ran = engine.run(*_command(kind, folder), prefix=prefix, env=env, cwd=folder / "no")
    engine.check(
        ran, functools.partial(_right, kind, folder), refuses=not works, also=() if works else (1,)
    )


_HOMES: dict[str, dict] = {
    "no HOME": {"HOME": None},
    "HOME empty": {"HOME": ""},
    "HOME of root": {"HOME": "/root"},
    "HOME nowhere": {"HOME": "/nonexistent"},
    "HOME a file": {"HOME": "/etc/passwd"},
    "HOME relative": {"HOME": "home"},
    "cache a file": {"XDG_CACHE_HOME": "/etc/passwd"},
    "cache unwritable": {"XDG_CACHE_HOME": "{folder}/no"},
    "cache relative": {"XDG_CACHE_HOME": "cache"},
    "compiled programs unwritable": {
        "JAX_COMPILATION_CACHE_DIR": "{folder}/no",
        "HOME": "{folder}/own",
    },
    "TMPDIR unwritable": {"TMPDIR": "{folder}/no", "HOME": "{folder}/own"},
    "TMPDIR nowhere": {"TMPDIR": "/nonexistent", "HOME": "{folder}/own"},
    "own HOME": {"HOME": "{folder}/own"},
}

# Limits -------------------------------------------------------------------------------------------


def _limited(limit: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(limit, (value, value))


def _under_limit(limit: int, value: int, kind: str, folder: Path) -> None:
    (folder / "own").mkdir()
    shutil.copytree(engine.trained(), folder / "run")
    ran = engine.run(*_command(kind, folder), preexec_fn=_limited(limit, value))
    engine.check(ran, functools.partial(_right, kind, folder), also=(1,))
    if kind == "train" and ran.code:
        _goes_on(folder / "own" / "new")


def _goes_on(workdir: Path) -> None:
    ran = engine.run_here("train", *chaos.SMALL, f"--workdir={workdir}")
    engine.check(
        ran, functools.partial(engine.check_same, workdir, engine.reference()), refuses=False
    )


@contextlib.contextmanager
def _small_disk(folder: Path, options: str) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True
    ).returncode:
        raise Skipped("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], capture_output=True, check=True)


def _full_disk(options: str, more: str, folder: Path) -> None:
    """Ends with what is whole and exit code 1 or 2, or works; with room again it goes on to the
    same bits.
    """
    with _small_disk(folder, options) as disk:
        ran = engine.run(engine.UNDRAWN, *chaos.SMALL, f"--workdir={disk / 'run'}")
        engine.check(
            ran, functools.partial(engine.check_same, disk / "run", engine.reference()), also=(1,)
        )
        if ran.code == 1 and not any(line.startswith("error: ") for line in ran.err.splitlines()):
            raise Failure("other", f"no line that says why: {ran}")
        subprocess.run(["mount", "-o", f"remount,{more}", disk], check=True)
        _goes_on(disk / "run")


def _full_disk_for(kind: str, folder: Path) -> None:
    with _small_disk(folder, "size=8k") as disk:
        run = engine.trained()
        command = {
            "export": (
                "ncjax",
                "show",
                run,
                "--run",
                "weight_decay=0,seed=0",
                "--export",
                disk / "x.npz",
            ),
            "figures": (*_MEASURE[:-1], "--figures", disk / "figures"),
            "comparison": (
                "ncjax",
                "plot",
                run,
                shutil.copytree(run, folder / "b"),
                "--out",
                disk / "figures",
            ),
        }[kind]
        engine.check(engine.run(*command), also=(1,))
        if (disk / "x.npz").exists():
            with np.load(disk / "x.npz") as whole:  # raises of a part of a file
                [whole[name] for name in whole.files]


def _full_cache(folder: Path) -> None:
    """Neither decoded data nor compiled programs can be kept: a run does without."""
    with _small_disk(folder, "size=16k") as disk:
        env = {"XDG_CACHE_HOME": str(disk), "JAX_COMPILATION_CACHE_DIR": None}
        ran = engine.run(engine.UNDRAWN, *chaos.SMALL, f"--workdir={folder / 'new'}", env=env)
        engine.check(
            ran,
            functools.partial(engine.check_same, folder / "new", engine.reference()),
            refuses=False,
        )


def _no_current_folder(command: tuple, folder: Path) -> None:
    """The current folder was removed."""
    gone = folder / "gone"
    gone.mkdir()
    ran = engine.run(*command, cwd=gone, preexec_fn=gone.rmdir)
    engine.check(ran)


def _two_at_once(folder: Path) -> None:
    """One trains, and the others say so, at once."""
    command = (engine.UNDRAWN, *chaos.SMALL, f"--workdir={folder / 'new'}")
    first = engine.start(*command)
    chaos.wait_for_event(first, folder / "new", 1, "config.json")
    second = engine.run(*command)
    engine.check(second)
    ended = engine.finish(first)
    engine.check(
        ended,
        functools.partial(engine.check_same, folder / "new", engine.reference()),
        refuses=False,
    )


def _lock_removed(folder: Path) -> None:
    """Someone removes the lock while a run trains and starts another; the files must stay those
    of one.
    """
    command = (engine.UNDRAWN, *chaos.SMALL, f"--workdir={folder / 'new'}")
    first = engine.start(*command)
    chaos.wait_for_event(first, folder / "new", 1, "history.nc")
    (folder / "new" / ".lock").unlink(missing_ok=True)
    second = engine.start(*command)
    for process in (first, second):
        engine.check(engine.finish(process), also=(1,))
    _goes_on(folder / "new")


def cases(_: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for what, environment in _HOMES.items():
        yield (
            f"nobody, {what}: measure",
            functools.partial(_user, _NOBODY, "measure", environment, True),
        )
    for what in ("no HOME", "own HOME", "cache unwritable"):
        for kind in ("train", "digits", "show", "verify"):
            yield (
                f"nobody, {what}: {kind}",
                functools.partial(_user, _NOBODY, kind, _HOMES[what], True),
            )
    for what in ("no HOME", "HOME nowhere", "own HOME"):
        for kind in ("measure", "train", "dry run"):
            yield (
                f"unknown user, {what}: {kind}",
                functools.partial(_user, _UNKNOWN, kind, _HOMES[what], True),
            )
    for kind in ("continue", "plot", "export"):
        yield (
            f"nobody, WORKDIR of another: {kind}",
            functools.partial(_user, _NOBODY, kind, _HOMES["own HOME"], False),
        )
    for files in (16, 32, 64):
        for kind in ("measure", "train"):
            limit = functools.partial(_under_limit, resource.RLIMIT_NOFILE, files)
            yield f"{files} open files: {kind}", functools.partial(limit, kind)
    for size in (0, 1000, 20_000):
        for kind in ("train", "plot"):
            limit = functools.partial(_under_limit, resource.RLIMIT_FSIZE, size)
            yield f"files of {size} bytes: {kind}", functools.partial(limit, kind)
    for size in (4, 12, 40, 120, 400):
        yield f"disk of {size} kB", functools.partial(_full_disk, f"size={size}k", "size=64m")
    for inodes in (2, 6, 12, 20, 30, 45, 60):
        yield (
            f"disk of {inodes} inodes",
            functools.partial(_full_disk, f"nr_inodes={inodes}", "nr_inodes=10000"),
        )
    for kind in ("export", "figures", "comparison"):
        yield f"full disk: {kind}", functools.partial(_full_disk_for, kind)
    yield "full disk: caches", _full_cache
    yield (
        "no current folder: measure",
        functools.partial(
            _no_current_folder, ("ncjax", "measure", engine.ROOT / _MEASURE[2], "--json")
        ),
    )
    yield (
        "no current folder: dry run",
        functools.partial(_no_current_folder, ("ncjax.main", "--dry-run")),
    )
    yield (
        "no current folder: relative WORKDIR",
        functools.partial(_no_current_folder, ("ncjax.main", "--workdir=run")),
    )
    yield "two at once", _two_at_once
    yield "lock removed", _lock_removed
