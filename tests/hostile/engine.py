"""Runs cases side by side in processes that may crash or hang, and says what came of each.

A case is a function of a fresh folder that raises `Failure` where the outcome is not right.
Commands run in this process where that will do (`run_here`), or in one of their own (`run`); both
give `Ran`, which `check` judges.
"""

import collections
import contextlib
import fcntl
import functools
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests import chaos

ROOT = chaos.ROOT
KINDS = ("traceback", "silent", "hang", "other")
# Seconds that any case may take on a busy machine, and that a single command may.
CASE_LIMIT, COMMAND_LIMIT = 240, 120
# Seconds until a new process may be given cases: it, or another, trains what they share.
_START_LIMIT = 600
UNDRAWN = "ncjax.main, undrawn"
# Bytes that a command may allocate: what reads without an end must not take the machine with it.
_MEMORY = 8 * 2**30
_TRACES = (
    "Traceback (most recent call last)",
    "Fatal Python error",
    "Exception ignored",
    "Segmentation fault",
)


class Failure(Exception):
    """An outcome that is not right. `kind` is one of KINDS."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


class Skipped(Exception):
    """This machine cannot try the case; the message says why."""


class Case(NamedTuple):
    """`attack` gets a folder of its own and raises Failure where what happens in it is not
    right.
    """

    group: str
    name: str
    attack: Callable[[Path], None]


class Ran(NamedTuple):
    """A command that has ended: its exit code (minus a signal's number, if one ended it) and
    what it said.
    """

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}, stdout {_short(self.out)!r}, stderr {_short(self.err)!r}"


def _short(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:200]} ... {text[-400:]}"


# Judging ------------------------------------------------------------------------------------------


def check(
    ran: Ran,
    right: Callable[[Ran], None] | None = None,
    *,
    works: bool = True,
    refuses: bool = True,
    also: tuple = (),
) -> None:
    """Raises Failure unless a command worked and was right, or refused in one line with exit code
    2.

    Args:
      right: raises Failure where exit code 0 came with something wrong.
      works, refuses: whether exit code 0 and exit code 2 may be.
      also: exit codes that are right besides, whatever was said but a traceback.
    """
    if any(trace in text for trace in _TRACES for text in (ran.out, ran.err)):
        raise Failure("traceback", str(ran))
    if ran.code in also:
        return
    if ran.code == 0 and works:
        if right is not None:
            right(ran)
        return
    if ran.code == 2 and refuses:
        lines = [
            line
            for line in ran.err.splitlines()
            if line.strip() and not line.lower().startswith("warning")
        ]
        # Argparse's: several lines, the last of which is the message.
        is_usage = ran.err.startswith("usage: ")
        if "error: " in (lines or [""])[-1] and (is_usage or len(lines) == 1):
            return
        raise Failure("other", f"exit code 2 without a single line that says why: {ran}")
    kind = "silent" if ran.code == 0 else "other"
    raise Failure(kind, f"{'must be refused' if ran.code == 0 else 'a wrong exit code'}: {ran}")


def is_said(ran: Ran) -> bool:
    """A warning or a note reached the user."""
    return any(
        word in line.lower() for line in ran.err.splitlines() for word in ("warning", "note:")
    )


# Running ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _captured(descriptor: int) -> Iterator[list[str]]:
    """Puts what reaches a descriptor into the list, once it is left."""
    stream = {1: sys.stdout, 2: sys.stderr}[descriptor]
    stream.flush()
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(descriptor)
        os.dup2(file.fileno(), descriptor)
        try:
            yield said
        finally:
            with contextlib.suppress(Exception):
                stream.flush()
            os.dup2(kept, descriptor)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


@functools.cache
def _main(command: str) -> Callable[..., int]:
    main = importlib.import_module(f"ncjax.cli.{command}").main
    return (lambda argv: main(["ncjax", *argv])) if command == "train" else main


def run_here(command: str, *argv: object, draw: bool = False, **environment: str) -> Ran:
    """Runs `python -m ncjax COMMAND` in this process. Unless `draw`, a run's own figures are
    left out.
    """
    undrawn = (
        contextlib.nullcontext()
        if draw
        else mock.patch("ncjax.report.draw.draw_all", return_value=[])
    )
    with (
        _captured(1) as out,
        _captured(2) as err,
        mock.patch.dict(os.environ, environment),
        undrawn,
    ):
        try:
            code = _main(command)([str(word) for word in argv])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
            code = 1
    return Ran(code, out[0], err[0])


def start(
    module: str, *argv: object, prefix: tuple = (), env: dict | None = None, **options
) -> subprocess.Popen:
    """Starts `python -m MODULE ...` in a process of its own; an `env` value of None removes a
    variable.

    UNDRAWN is `ncjax.main` without the figures and tables at the end, which take longer than a
    small run.
    """
    variables = {k: v for k, v in (os.environ | (env or {})).items() if v is not None}
    program = ("-c", chaos.CHILD) if module == UNDRAWN else ("-m", module)
    command = [*prefix, sys.executable, *program, *argv]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [
            os.fsencode(os.fspath(word)) if isinstance(word, str | Path) else str(word).encode()
            for word in command
        ],
        env=variables,
        start_new_session=True,
        **{"cwd": ROOT} | pipes | options,
    )


def finish(process: subprocess.Popen, limit: float = COMMAND_LIMIT) -> Ran:
    """Waits for a process; Failure where it hangs."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        said = Ran(
            process.returncode, *((text or b"").decode(errors="replace") for text in (out, err))
        )
        raise Failure("hang", f"no end within {limit} s: {said}") from None
    return Ran(process.returncode, *((text or b"").decode(errors="replace") for text in (out, err)))


def run(module: str, *argv: object, limit: float = COMMAND_LIMIT, **options) -> Ran:
    """Runs `python -m MODULE ...` in a process of its own, to its end."""
    return finish(start(module, *argv, **options), limit)


# What cases share ---------------------------------------------------------------------------------


def shared(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that is made once for all processes; nothing in it may be changed."""
    folder = Path(os.environ["HOSTILE_FOLDER"]) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


def trained() -> Path:
    """Returns WORKDIR of a finished run of chaos.SMALL."""
    return shared("finished", lambda folder: chaos.record(folder))


def unfinished() -> Path:
    """Returns WORKDIR of the same run, stopped after epoch 5."""
    return shared("unfinished", lambda folder: chaos.record(folder, stop_at=5))


@functools.cache
def reference() -> chaos.Outcome:
    """Returns what the finished run left."""
    return chaos.Outcome.of(trained())


def check_same(workdir: Path, expected: chaos.Outcome, ran: Ran) -> None:
    """A finished WORKDIR must hold the expected bits, or a warning must have said why it does
    not.
    """
    try:
        expected.check(chaos.Outcome.of(workdir))
    except chaos.Failure as difference:
        if not is_said(ran):
            raise Failure("silent", f"{difference}: {ran}") from difference
    except Exception as error:
        raise Failure(
            "silent", f"what it left cannot be read ({type(error).__name__}: {error}): {ran}"
        ) from error


# Cases, many at a time ----------------------------------------------------------------------------

_GROUPS = ("names", "values", "files", "interrupts", "users", "environments", "commands", "sweeps")


def cases(groups: Iterable[str], seed: int) -> list[Case]:
    """Returns all cases of some groups, in the same order in every process."""
    found = []
    for group in groups:
        module = importlib.import_module(f"tests.hostile.{group}")
        found += [Case(group, name, attack) for name, attack in module.cases(random.Random(seed))]
    repeated = [
        name for name, times in collections.Counter(case[:2] for case in found).items() if times > 1
    ]
    assert not repeated, repeated
    return found


def _try(case: Case) -> tuple[str, str, float]:
    """Returns (passed, skipped or one of KINDS, why, seconds of processors)."""
    begin, folder = sum(os.times()[:4]), Path(tempfile.mkdtemp(dir=os.environ["HOSTILE_FOLDER"]))
    result = ("passed", "")
    try:
        case.attack(folder)
    except Failure as failure:
        result = (failure.kind, str(failure))
    except Skipped as reason:
        result = ("skipped", str(reason))
    except BaseException:
        result = ("other", f"the attack itself failed: {traceback.format_exc()[-1500:]}")
    shutil.rmtree(folder, ignore_errors=True)
    return *result, sum(os.times()[:4]) - begin


def _serve(pipe: Connection, groups: tuple[str, ...], seed: int) -> None:
    """Tries the cases whose numbers arrive, until None does."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    known = cases(groups, seed)
    with chaos.one_program():
        if set(groups) - {"values"}:
            reference(), unfinished()
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            pipe.send(_try(known[number]))


class _Worker:
    """A process that tries one case after the other; a new one after one that crashed or hung."""

    def __init__(self, groups: tuple[str, ...], seed: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, groups, seed), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def attempt(self, number: int) -> tuple[str, str, float] | None:
        """Returns what `_try` does; None: the process is no more."""
        try:
            if not self._is_ready and self._pipe.poll(_START_LIMIT):
                self._is_ready = self._pipe.recv() == "ready"
            self._pipe.send(number)
            if self._pipe.poll(CASE_LIMIT):
                return self._pipe.recv()
        except (EOFError, OSError):
            return None
        self._process.kill()
        return "hang", f"no end within {CASE_LIMIT} s", CASE_LIMIT

    def end(self) -> int | None:
        """Ends the process; returns its exit code."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)
        return self._process.exitcode


def attempt_all(
    chosen: list[int],
    groups: tuple[str, ...],
    seed: int,
    jobs: int,
    say: Callable[[int, tuple], None],
) -> None:
    """Tries the chosen cases in `jobs` processes, and says what came of each as soon as it is
    known. One that fails is tried again, and is unsteady if it passes then.
    """
    numbers, lock = iter(chosen), threading.Lock()

    def attempt(worker: _Worker, number: int) -> tuple[_Worker, tuple]:
        result = worker.attempt(number)
        if result is None or result[2] == CASE_LIMIT:
            code = worker.end()
            result = result or ("other", f"the process ended with exit code {code}", 0.0)
            worker = _Worker(groups, seed)
        return worker, result

    def work() -> None:
        worker = _Worker(groups, seed)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                worker.end()
                return
            worker, result = attempt(worker, number)
            # A signal or a full disk may hit another instant the second time, or a busy machine
            # be too slow: a case that then passes is told apart, and shown all the same.
            if result[0] in KINDS:
                worker, again = attempt(worker, number)
                result = ("unsteady", *result[1:]) if again[0] == "passed" else again
            with lock:
                say(number, result)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def names_of_groups() -> tuple[str, ...]:
    return _GROUPS
