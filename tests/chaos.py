"""Kills runs at random instants and damages the files they leave; nothing may be lost, nothing may
be silent.

    python -m tests.chaos --kills 40 --corruptions 200

Kills: `python -m ncjax.main` on digits in a process of its own (figures left out: they take longer
than the run), ended by SIGKILL at an instant drawn over what is left of the run, start-up included,
or just after a file of WORKDIR appeared or changed. After every kill what is on disk must be
readable; the same command must continue; and parameters, optimizer states, history and metrics of
the finished run must be those of an uninterrupted one, bit for bit.

Corruptions: one file of a finished or of an unfinished WORKDIR is truncated, deleted, exchanged
with another, or has one bit flipped. Every reader must then report it (InputError, Damaged,
OSError, or a warning on standard error) or give what it gave before, bit for bit; and a run that
continues must end at the bits of the undamaged one, whatever it reports. A traceback on standard
error, even one that is only logged, counts as a failure.
"""

import argparse
import collections
import contextlib
import functools
import gc
import io
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import xarray as xr

from ncjax.errors import InputError
from ncjax.storage import checkpoint, history

ROOT = Path(__file__).resolve().parents[1]

# The command itself but for what is drawn and tabulated at the end.
CHILD = """
import sys
from ncjax.cli import train
from ncjax.report import draw, tables
draw.draw_all = lambda *_: []
tables.show_results = lambda *_: None
sys.exit(train.main(sys.argv))
"""
EPOCHS = 60
KILLED = (
    "--config=configs/digits.py",
    "--config.sweep.weight_decay=0,1e-3",
    "--config.sweep.seed=0",
    f"--config.train.epochs={EPOCHS}",
    "--config.checkpoint.every=5",
    f"--config.log.epochs={','.join(map(str, range(0, EPOCHS + 1, 2)))}",
)
# The command line of `small_config`.
SMALL = (
    "--config.data.name=synthetic",
    "--config.data.num_classes=3",
    "--config.data.per_class=20",
    "--config.model.widths=8,8",
    "--config.train.epochs=6",
    "--config.train.batch_size=16",
    "--config.checkpoint.every=2",
    "--config.sweep.weight_decay=0,1e-2",
    "--config.sweep.seed=0,1",
)
REPORTS = (InputError, checkpoint.Damaged, OSError)


class Failure(Exception):
    """Something was lost, or was wrong without a word; the message says what."""


def environment(cache: Path, **more: str) -> dict[str, str]:
    """For subprocesses: two devices, and programs compiled once for all of them."""
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XDG_CACHE_HOME": str(cache / "data"),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def start(
    flags: tuple[str, ...], workdir: Path, cache: Path, child: str = CHILD, **more: str
) -> subprocess.Popen:
    """The command on WORKDIR, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", child, *flags, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# What a WORKDIR holds, as bits --------------------------------------------------------------------


def leaves(folder: Path, epoch: int) -> dict[str, bytes]:
    """Every leaf of a checkpoint, read without ncjax but for the names."""
    import tensorstore

    read = {}
    for name in checkpoint.read_metadata(folder, epoch).crc32:
        base = {"driver": "file", "path": f"{(folder / str(epoch) / 'state').resolve()}/"}
        spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        leaf = np.asarray(tensorstore.open(spec, read=True).result().read().result())
        read[name] = str((leaf.dtype, leaf.shape)).encode() + leaf.tobytes()
    return read


def history_bits(recorded: xr.Dataset) -> dict[str, bytes]:
    """Of every variable and coordinate, whether it was just measured or comes from the file
    (big-endian).
    """
    bits = {}
    for name, variable in recorded.variables.items():
        values = np.asarray(variable.values)
        if values.dtype.kind in "OU":
            values = np.asarray(values.tolist())
        if values.dtype.kind == "i":
            values = values.astype(np.int64)  # netCDF 3 knows 32 bits
        values = values.astype(values.dtype.newbyteorder("="))
        attrs = {key: np.asarray(value).tolist() for key, value in sorted(variable.attrs.items())}
        bits[str(name)] = (
            repr((variable.dims, values.shape, values.dtype, attrs)).encode() + values.tobytes()
        )
    bits["its config"] = recorded.attrs["config"].encode()
    return bits


def metrics(workdir: Path) -> dict[int, dict]:
    """Epoch -> metrics, of a metrics.jsonl that must be whole; wall times are left out."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["epoch"] for line in lines]
    if epochs != sorted(set(epochs)):
        raise Failure(f"metrics.jsonl holds epochs {epochs}")
    return {line["epoch"]: line["metrics"] for line in lines}


class Outcome(NamedTuple):
    """All that must not depend on what a run went through."""

    params: dict[str, bytes]
    history: dict[str, bytes]
    metrics: dict[int, dict]
    config: str

    @classmethod
    def of(cls, workdir: Path) -> "Outcome":
        folder = workdir / "checkpoints"
        return cls(
            leaves(folder, checkpoint.epochs_in(folder)[-1]),
            history_bits(history.load(workdir / "history.nc")),
            metrics(workdir),
            (workdir / "config.json").read_text(),
        )

    def check(self, other: "Outcome") -> None:
        """Raises Failure naming what differs in `other`. A mended line of metrics.jsonl may lack
        the cosines.
        """
        for part in ("params", "history"):
            mine, theirs = getattr(self, part), getattr(other, part)
            wrong = [
                name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
            ]
            if wrong:
                raise Failure(f"{part} differ in {sorted(wrong)}")
        if self.metrics.keys() != other.metrics.keys():
            raise Failure(f"metrics.jsonl holds epochs {list(other.metrics)}")
        for epoch, expected in self.metrics.items():
            found = {history.COSINES: expected[history.COSINES]} | other.metrics[epoch]
            wrong = [
                name
                for name in expected.keys() | found.keys()
                if expected.get(name) != found.get(name)
            ]
            if wrong:
                raise Failure(f"metrics.jsonl differs at epoch {epoch} in {sorted(wrong)}")
        if self.config != other.config:
            raise Failure("config.json differs")


# Kills --------------------------------------------------------------------------------------------


class Kills(NamedTuple):
    count: int
    continued: int
    runs: int
    notes: list[str]


def files(workdir: Path) -> dict[str, tuple]:
    """Files and folders of WORKDIR, two levels deep, with what changes when they do."""
    found = {}
    folders = [workdir, workdir / "checkpoints"]
    for folder in folders:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found[f"{folder.name}/{entry.name}"] = (
                        status.st_ino,
                        status.st_size,
                        status.st_mtime_ns,
                    )
    return found


def wait_for_event(process: subprocess.Popen, workdir: Path, number: int, only: str) -> None:
    """Returns once the `number`th change of a file whose name contains `only` was seen, or the
    process has ended.
    """
    before = files(workdir)
    while process.poll() is None:
        after = files(workdir)
        number -= sum(
            only in name
            for name in after.keys() | before.keys()
            if after.get(name) != before.get(name)
        )
        if number <= 0:
            return
        before = after
        time.sleep(0.0005)


def check_readable(workdir: Path, grid_size: int) -> list[str]:
    """After a kill at any instant: the history is whole, and so is every checkpoint that counts
    as finished.
    """
    if (workdir / "history.nc").exists():
        history.load(workdir / "history.nc")
    folder, notes = workdir / "checkpoints", []
    epochs = checkpoint.epochs_in(folder)
    for epoch in epochs:
        try:
            for run in range(grid_size):
                checkpoint.read_run(folder, epoch, run)
        except checkpoint.Damaged as damage:
            if epoch == epochs[-1]:  # an older one may be half deleted
                raise Failure(f"checkpoint {epoch} is damaged by a kill: {damage}") from damage
            notes.append(
                f"checkpoint {epoch} of {epochs} was killed while it was deleted ({damage})"
            )
    return notes


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for a process that must end with `code` and without a traceback; returns what it
    said.
    """
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Failure(f"hung: {process.communicate()}") from None
    if process.returncode != code or "Traceback" in err:
        raise Failure(f"exit code {process.returncode} instead of {code}: {err[-2000:]}")
    return out, err


def kills(
    count: int, rng: random.Random, folder: Path, say: Callable[[str], None] = print
) -> Kills:
    """Kills `count` processes; raises Failure where one does not continue to the same bits."""
    begin = time.perf_counter()
    finish(start(KILLED, folder / "reference", folder))
    reference = Outcome.of(folder / "reference")
    say(f"an uninterrupted run with compilation took {time.perf_counter() - begin:.1f} s")
    begin = time.perf_counter()
    process = start(KILLED, folder / "again", folder)
    wait_for_event(process, folder / "again", 1, "history.nc")
    startup = time.perf_counter() - begin
    finish(process)
    training = time.perf_counter() - begin - startup
    reference.check(Outcome.of(folder / "again"))
    say(f"again: {startup:.1f} s to the first measurement, {training:.1f} s from there")
    killed, continued, runs, notes, pending = 0, 0, 0, [], 0
    workdir, left = folder / "run-0", rng.randint(2, 8)
    while killed < count or pending:
        process = start(KILLED, workdir, folder)
        begin = time.perf_counter()
        if left and killed < count:
            done = max([0, *checkpoint.epochs_in(workdir / "checkpoints")]) / EPOCHS
            if rng.random() < 0.5:
                instant = rng.uniform(0, startup + (1 - done) * training)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(instant)
                how = f"{instant:.2f} s"
            else:
                only = rng.choice(
                    ["", "checkpoints/", "history.nc", ".sha256", "metrics.jsonl", ".tmp"]
                )
                number = rng.randint(1, 12)
                wait_for_event(process, workdir, number, only)
                time.sleep(rng.choice([0, rng.uniform(0, 0.005), rng.uniform(0, 0.05)]))
                how = f"change {number} of {only or 'any file'}"
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                _, err = process.communicate()
                killed, left, pending = killed + 1, left - 1, pending + 1
                if "Traceback" in err:
                    raise Failure(f"before kill {killed}: {err[-2000:]}")
                said = [line for line in err.splitlines() if line.startswith("warning:")]
                news = [*said, *check_readable(workdir, 2)]
                notes += news
                at = checkpoint.epochs_in(workdir / "checkpoints")
                say(
                    f"kill {killed}/{count} at {how}, checkpoints {at}"
                    + "".join(f"; {line}" for line in news)
                )
                continue
        _, err = finish(process)
        notes += [line for line in err.splitlines() if line.startswith("warning:")]
        reference.check(Outcome.of(workdir))
        continued, pending, runs = continued + pending, 0, runs + 1
        leftover = [path.name for path in workdir.iterdir() if path.name.endswith(".tmp")]
        if leftover:
            notes.append(f"{workdir.name} finished with leftovers of killed processes: {leftover}")
        say(f"{workdir.name} is complete, bit for bit, after {time.perf_counter() - begin:.1f} s")
        shutil.rmtree(workdir)
        workdir, left = folder / f"run-{runs}", rng.randint(2, 8)
    return Kills(killed, continued, runs, notes)


# Corruptions --------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """What was done to a WORKDIR, and what came of it: `reports` is empty where it was harmless."""

    what: str
    reports: list[str]


@contextlib.contextmanager
def one_program() -> Iterator[None]:
    """Within it, experiments of one recipe, mesh and size share their compiled programs and drawn
    initialization.
    """
    import jax
    import jax.numpy as jnp

    from ncjax.training import program as train
    from ncjax.training import sweep

    made, begun, compile_, begin = {}, {}, sweep.Program.compiled, sweep.start

    def compile_once(program):
        passes = train.sums_of_runs  # tests replace it
        key = (program.recipe, program.mesh, program.runs, program.image_shape, passes)
        if key not in made:
            made[key] = compile_.func(program)
        return made[key]

    def start_once(recipe, mesh, columns, data):
        key = (recipe, mesh, data.center.shape, str(columns))
        if key not in begun:
            begun[key] = begin(recipe, mesh, columns, data)
        states, keys, hyper = begun[key]
        return jax.tree.map(jnp.copy, states), keys, hyper  # states are donated

    with (
        mock.patch.object(sweep.Program, "compiled", property(compile_once)),
        mock.patch.object(sweep, "start", start_once),
    ):
        yield


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """Tracebacks that reach standard error without being raised: what is logged, or lost in a
    coroutine.
    """
    heard: list[str] = []

    class Handler(logging.Handler):
        def emit(self, log: logging.LogRecord) -> None:
            if log.exc_info:
                heard.append(f"{log.name} logged {log.getMessage()[:300]!r} with a traceback")

    handler, hook = Handler(), sys.unraisablehook
    logging.getLogger().addHandler(handler)
    sys.unraisablehook = lambda lost: heard.append(
        f"{lost.exc_type.__name__} was ignored in {str(lost.object)[:100]}"
    )
    try:
        yield heard
        gc.collect()
    finally:
        sys.unraisablehook = hook
        logging.getLogger().removeHandler(handler)


def small_config():
    from ncjax.config import default_config

    config = default_config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", 3, 20
    config.model.widths = (8, 8)
    config.train.epochs, config.train.batch_size, config.checkpoint.every = 6, 16, 2
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-2), (0, 1)
    return config


def record(workdir: Path, stop_at: int | None = None) -> tuple[xr.Dataset | None, str]:
    """The run in this process -> its history and what it said on standard error. Stops once
    `stop_at` is measured.
    """
    from ncjax import plan
    from ncjax.report import tables
    from ncjax.runs import loop

    class Stop(Exception):
        pass

    measured = tables.Progress.measured

    def stop(self, epoch, nc1):
        if epoch == stop_at:
            raise Stop

    said = io.StringIO()
    tables.Progress.measured = stop
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(Stop),
        ):
            return loop.train(plan.prepare(small_config(), workdir)), said.getvalue()
    finally:
        tables.Progress.measured = measured
    return None, said.getvalue()


def corrupt(workdir: Path, rng: random.Random) -> str:
    """One random operation on one random file of WORKDIR -> what it was."""
    paths = sorted(path for path in workdir.rglob("*") if path.is_file())
    # The few files at the top as often as the many of checkpoints/.
    top = [path for path in paths if path.parent == workdir]
    path = rng.choice(top if rng.random() < 0.5 else paths)
    name, content = path.relative_to(workdir), path.read_bytes()
    operation = rng.choice(["truncate", "flip", "flip", "delete", "swap"])
    if not content and operation in ("truncate", "flip"):
        operation = "delete"
    if operation == "truncate":
        size = rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"{name} truncated from {len(content)} to {size} bytes"
    if operation == "flip":
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        return f"bit {bit} of {name} flipped"
    if operation == "delete":
        path.unlink()
        return f"{name} deleted"
    # Half of the time with its namesake of another checkpoint, if it has one.
    namesakes = [p for p in paths if p.name == path.name and p != path]
    other = rng.choice(
        namesakes if namesakes and rng.random() < 0.5 else [p for p in paths if p != path]
    )
    theirs = other.read_bytes()
    other.write_bytes(content)
    path.write_bytes(theirs)
    return f"{name} and {other.relative_to(workdir)} swapped"


class Reader(NamedTuple):
    name: str
    read: Callable[[Path], object]
    expected: object


def _same(found: object, expected: object) -> bool:
    if isinstance(expected, np.ndarray):
        return (
            isinstance(found, np.ndarray)
            and found.dtype == expected.dtype
            and found.tobytes() == expected.tobytes()
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_same(found[key], value) for key, value in expected.items())
        )
    return found == expected


def readers(workdir: Path) -> list[Reader]:
    """Everything that reads a WORKDIR without training, and what it reads of an undamaged one."""
    folder, made = workdir / "checkpoints", []
    calls: dict[str, Callable[[Path], object]] = {
        "history.load": lambda workdir: history_bits(history.load(workdir / "history.nc"))
    }

    def facts(workdir: Path, epoch: int) -> dict:
        return checkpoint.read_metadata(workdir / "checkpoints", epoch)._asdict()

    def one_run(workdir: Path, epoch: int, run: int) -> dict:
        return checkpoint.read_run(workdir / "checkpoints", epoch, run)

    for epoch in checkpoint.epochs_in(folder):
        calls[f"read_metadata of {epoch}"] = functools.partial(facts, epoch=epoch)
        for run in (0, 3):
            calls[f"read_run {run} of {epoch}"] = functools.partial(one_run, epoch=epoch, run=run)
    try:
        from ncjax.runs.load import load_run
    except ImportError:
        pass
    else:
        calls["load_run"] = functools.partial(loaded_run, load=load_run)
    for name, call in calls.items():
        made.append(Reader(name, call, call(workdir)))
    return made


def loaded_run(workdir: Path, load: Callable) -> dict:
    """The parameters and the numbers that `load.load_run` gives of the last run."""
    found = load(workdir, weight_decay=1e-2, seed=1.0)
    return {"params": found.params, "hyper": repr(getattr(found, "hyper", None))}


def reported(read: Callable[[], object], expected: object, name: str, what: str) -> list[str]:
    """What a reader said, [] if it gave what it should; raises Failure if it gave anything else,
    or fell over.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read()
    except REPORTS as error:
        lines = str(error).splitlines()
        if len(lines) != 1:
            raise Failure(f"{what}: {name} said {lines}") from error
        return [f"{name}: {error}"]
    except Exception as error:
        raise Failure(f"{what}: {name} fell over with {type(error).__name__}: {error}") from error
    lines = [
        *(line for line in said.getvalue().splitlines() if line.startswith("warning:")),
        *map(str, caught),
    ]
    if not _same(found, expected) and not lines:
        wrong = (
            sorted(key for key in expected if found.get(key) != expected[key])
            if name == "the same command"
            else ""
        )
        raise Failure(f"{what}: {name} gave something else without a word {wrong}")
    return [f"{name}: {line}" for line in lines]


def corruptions(
    count: int, rng: random.Random, folder: Path, say: Callable[[str], None] = print
) -> tuple[list[Corruption], list[str]]:
    """Damages WORKDIRs `count` times -> what was reported each time; and the failures."""
    with one_program():
        record(folder / "finished")
        record(folder / "unfinished", stop_at=5)
        reference = Outcome.of(folder / "finished")
        originals = {name: readers(folder / name) for name in ("finished", "unfinished")}
        done, failures = [], []
        for i, name in zip(range(count), itertools.cycle(originals), strict=False):
            workdir = folder / "damaged"
            shutil.copytree(folder / name, workdir)
            what = f"{name} run, {corrupt(workdir, rng)}"
            try:
                reports = [
                    line
                    for reader in originals[name]
                    for line in reported(
                        functools.partial(reader.read, workdir), reader.expected, reader.name, what
                    )
                ]
                reports += continued(workdir, reference, what)
                done.append(Corruption(what, reports))
                if (i + 1) % 20 == 0:
                    say(f"{i + 1}/{count}: {what}: {reports[-1] if reports else 'harmless'}")
            except Failure as failure:
                failures.append(str(failure))
                say(f"FAILED {i + 1}/{count}: {failure}")
            shutil.rmtree(workdir)
    return done, failures


def continued(workdir: Path, reference: Outcome, what: str) -> list[str]:
    """Runs the command on a damaged WORKDIR; if it ends well, everything must be as if nothing
    had happened.
    """
    said: list[str] = []

    def run() -> object:
        recorded, err = record(workdir)
        said.extend(line for line in err.splitlines() if line.startswith("warning:"))
        if "Traceback" in err:
            raise RuntimeError(err)
        assert recorded is not None
        return history_bits(recorded)

    with overheard() as tracebacks:
        refusal = reported(run, reference.history, "the same command", what)
    if tracebacks:
        raise Failure(f"{what}: the same command reported {refusal + said}, but {tracebacks[0]}")
    if not refusal:
        try:
            reference.check(Outcome.of(workdir))
        except Failure as failure:
            raise Failure(
                f"{what}: the same command went on, and {failure} (it said {said})"
            ) from failure
        except Exception as error:
            raise Failure(
                f"{what}: the same command left what cannot be read: {error!r} (it said {said})"
            ) from error
    return refusal + said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "corruptions"))
    arguments = parser.parse_args()
    say = functools.partial(print, flush=True)
    summary, failed = [], False
    with tempfile.TemporaryDirectory(prefix="ncjax-chaos-") as folder:
        os.environ.update(environment(Path(folder)))
        if arguments.only != "corruptions":
            begin = time.perf_counter()
            try:
                found = kills(arguments.kills, random.Random(arguments.seed), Path(folder), say)
            except Failure as failure:
                say(f"FAILED: {failure}")
                failed = True
                summary.append("kills FAILED")
            else:
                for note, times in collections.Counter(found.notes).items():
                    say(f"note ({times} times): {note}")
                summary.append(f"{found.count} kills: {found.continued} continued, all bit for bit")
                say(
                    f"{found.runs} runs were killed {found.count} times in "
                    f"{time.perf_counter() - begin:.0f} s"
                )
        if arguments.only != "kills":
            begin = time.perf_counter()
            done, failures = corruptions(
                arguments.corruptions, random.Random(arguments.seed), Path(folder), say
            )
            loud = sum(bool(one.reports) for one in done)
            for line in failures:
                say(f"FAILED: {line}")
            failed |= bool(failures)
            summary.append(
                f"{len(done) + len(failures)} corruptions: {loud} refused or warned of, "
                f"{len(done) - loud} harmless, "
                f"{len(failures)} silent"
            )
            say(f"corruptions took {time.perf_counter() - begin:.0f} s")
    print("; ".join(summary))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
