"""Environment variables, terminals, locales and closed streams."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import chaos
from tests.hostile import engine
from tests.hostile.engine import Failure, Ran

_MEASURE = ("ncjax", "measure", "tests/data/features.npz", "--head", "tests/data/head.npz")
_TOLERANCE = 1e-4

# Of the command that measures: numbers must be right, or refused.
_MEASURED: dict[str, dict[str, str | None]] = {
    **{f"JAX_ENABLE_X64={v}": {"JAX_ENABLE_X64": v} for v in ("1", "0", "x")},
    **{
        f"JAX_PLATFORMS={v}": {"JAX_PLATFORMS": v}
        for v in ("nonsense", "cuda", "tpu", "cpu,nonsense", "", "CPU")
    },
    **{
        f"JAX_NUM_CPU_DEVICES={v}": {"JAX_NUM_CPU_DEVICES": v}
        for v in ("1", "3", "0", "-1", "x", "", "100000", "9" * 30, "1.5", "٣")
    },
    **{
        f"{name}=1": {name: "1"}
        for name in ("JAX_DEBUG_NANS", "JAX_DEBUG_INFS", "JAX_DISABLE_JIT")
    },
    **{
        f"{name}={value}": {name: value}
        for name, value in (
            *(("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16"),),
            *(("JAX_DEFAULT_MATMUL_PRECISION", "nonsense"),),
            *(("JAX_NUMPY_DTYPE_PROMOTION", "strict"), ("JAX_NUMPY_RANK_PROMOTION", "raise")),
            *(("JAX_TRANSFER_GUARD", "disallow"), ("JAX_CHECK_TRACER_LEAKS", "1")),
            *(("JAX_DEFAULT_DTYPE_BITS", "32"),),
            *(("JAX_ENABLE_COMPILATION_CACHE", "0"), ("JAX_COMPILATION_CACHE_DIR", "/dev/null")),
            *(("JAX_COMPILATION_CACHE_DIR", "/nonexistent/x"), ("JAX_COMPILATION_CACHE_DIR", "")),
            *(("XLA_FLAGS", "--nonsense"),),
            *(("XLA_FLAGS", "--xla_force_host_platform_device_count=3"),),
            *(("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), ("XLA_FLAGS", "x")),
            *(("XLA_FLAGS", " "),),
            *(("LANG", "C"), ("LC_ALL", "POSIX"), ("LC_ALL", "nonsense"), ("PYTHONUTF8", "0")),
            *(("PYTHONUTF8", "1"),),
            *(("PYTHONOPTIMIZE", "2"), ("PYTHONWARNINGS", "error"), ("PYTHONWARNINGS", "always")),
            *(("PYTHONDEVMODE", "1"), ("JAX_LOG_COMPILES", "1")),
            *(("PYTHONHASHSEED", "7"), ("PYTHONDONTWRITEBYTECODE", "1"), ("PYTHONNOUSERSITE", "1")),
            *(("TERM", "dumb"), ("TERM", ""), ("TERM", "nonsense"), ("COLUMNS", "1")),
            *(("COLUMNS", "0"),),
            *(("COLUMNS", "-5"), ("COLUMNS", "x"), ("COLUMNS", "100000"), ("NO_COLOR", "1")),
            *(("FORCE_COLOR", "1"),),
            *(("TTY_COMPATIBLE", "1"), ("TTY_INTERACTIVE", "1"), ("MPLBACKEND", "nonsense")),
            *(("MPLBACKEND", "TkAgg"),),
            *(("MPLCONFIGDIR", "/dev/null"), ("OMP_NUM_THREADS", "x"), ("OMP_NUM_THREADS", "0")),
            *(("TMPDIR", "/dev/null"), ("XDG_RUNTIME_DIR", "/dev/null")),
            *(("XDG_CACHE_HOME", "/dev/null"), ("XDG_CACHE_HOME", "a\tb"), ("HOME", "~")),
            *(("TZ", "nonsense"),),
            *(("SLURM_STEP_NUM_TASKS", "4"), ("TPU_WORKER_HOSTNAMES", "a,b")),
            *(("TF_CPP_MIN_LOG_LEVEL", "0"),),
        )
    },
    "no variable but PATH": dict.fromkeys(
        [name for name in os.environ if name not in ("PATH", "HOSTILE_FOLDER")]
    ),
    **{
        f"PYTHONIOENCODING={v}": {"PYTHONIOENCODING": v}
        for v in ("ascii", "latin-1", "ascii:strict", "cp1252")
    },
}  # fmt: skip
# Of a run that goes on from an unfinished one: what decides its bits must be the same, or be spoken
# of.
_CONTINUED: dict[str, dict[str, str | None]] = {
    f"{name}={value}": {name: value}
    for name, value in (
        *(("JAX_DEFAULT_PRNG_IMPL", "rbg"), ("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg")),
        *(("JAX_DEFAULT_PRNG_IMPL", "x"),),
        *(("JAX_THREEFRY_PARTITIONABLE", "0"), ("JAX_ENABLE_CUSTOM_PRNG", "1")),
        *(("JAX_RANDOM_SEED_OFFSET", "5"),),
        *(("JAX_ENABLE_X64", "1"), ("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16")),
        *(("JAX_NUMPY_RANK_PROMOTION", "raise"),),
        *(("JAX_NUMPY_DTYPE_PROMOTION", "strict"), ("JAX_DEBUG_NANS", "1")),
        *(("JAX_DISABLE_JIT", "1"),),
        *(("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),),
        *(("XLA_FLAGS", "--xla_backend_optimization_level=0"),),
        *(("JAX_PLATFORMS", "nonsense"), ("JAX_NUM_CPU_DEVICES", "100000")),
        *(("JAX_TRANSFER_GUARD", "disallow"),),
        *(("PYTHONOPTIMIZE", "2"), ("LC_ALL", "C"), ("PYTHONWARNINGS", "error"), ("COLUMNS", "1")),
        *(("TERM", "dumb"),),
        *(("PYTHONIOENCODING", "ascii"), ("FORCE_COLOR", "1"), ("PYTHONHASHSEED", "7")),
        *(("SLURM_STEP_NUM_TASKS", "2"),),
    )
}  # fmt: skip
# A command's end when nobody can hear it: (stdin, stdout, stderr) closed or full.
_STREAMS = {
    "stdin closed": "<&-",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "both full": ">/dev/full 2>/dev/full",
    "stdout read-only": "1</dev/null",
}
_SPEAKING: dict[str, str] = {
    "measure": "ncjax measure tests/data/features.npz --head tests/data/head.npz",
    "measure --json": "ncjax measure tests/data/features.npz --json",
    "a refusal": "ncjax measure nowhere.npz",
    "main --help": "ncjax.main --help",
    "show": "ncjax show {run}",
    "dry run": f"ncjax.main {' '.join(chaos.SMALL)} --dry-run",
}


@functools.cache
def _numbers() -> dict:
    return json.loads(engine.run_here(*_MEASURE[1:], "--json").out)["metrics"]


def _near(found: dict, ran: Ran) -> None:
    for name, value in _numbers().items():
        if (
            found[name] is None
            or abs(found[name] - value) > _TOLERANCE * abs(value) + _TOLERANCE / 10
        ):
            raise Failure("silent", f"{name} is {found[name]}, must be {value}: {ran}")


def _measure(env: dict, folder: Path) -> None:
    ran = engine.run(*_MEASURE, "--json", env=env, limit=100)
    if ran.code == 1 and "XLA_FLAGS" in ran.err and len(ran.err.splitlines()) == 1:
        return  # XLA itself ends a process so
    engine.check(ran, lambda ran: _near(json.loads(ran.out)["metrics"], ran))
    if ran.code == 0 and any(
        name.startswith(("COLUMNS", "TERM", "PYTHONIO", "LC", "LANG", "NO_", "FORCE", "TTY"))
        for name in env
    ):
        engine.check(engine.run(*_MEASURE, env=env))  # a table, for people


def _continue(env: dict, folder: Path) -> None:
    workdir = shutil.copytree(engine.unfinished(), folder / "run")
    ran = engine.run(engine.UNDRAWN, *chaos.SMALL, f"--workdir={workdir}", env=env)
    engine.check(ran, functools.partial(engine.check_same, workdir, engine.reference()))


def _shell(command: str, streams: str, folder: Path) -> subprocess.Popen:
    python = f"exec {engine.sys.executable} -m {command.format(run=engine.trained())} {streams}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", "-c", python], cwd=engine.ROOT, stdout=pipe, stderr=pipe, start_new_session=True
    )


def _stream(command: str, streams: str, folder: Path) -> None:
    """Codes: of the command itself; 1 or 120 where what it had to say could not be said; a
    signal's.
    """
    ran = engine.finish(_shell(command, streams, folder))
    unheard = (1, 120, 141, 74) if ">" in streams or "1<" in streams else ()
    engine.check(ran, also=(2, *unheard) if "2>" in streams else unheard)
    if ">/dev/full" in streams and "2>" not in streams and ran.code == 0:
        raise Failure("silent", f"nothing could be written, and exit code 0: {ran}")


def _head(command: str, folder: Path) -> None:
    """`command | head -1`: whoever reads has enough, and that is no error."""
    process = _shell(command, "", folder)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode(errors="replace")
    engine.check(
        Ran(process.wait(engine.COMMAND_LIMIT), "", err), also=(141, -signal.SIGPIPE, 1, 2)
    )
    if err.strip() and "error: " not in err:
        raise Failure("other", f"it said {err!r}")


def _hang_up(folder: Path) -> None:
    """The terminal is closed while a run trains: it goes on later."""
    process = engine.start("ncjax.main", *chaos.SMALL, f"--workdir={folder / 'run'}")
    chaos.wait_for_event(process, folder / "run", 1, "history.nc")
    process.send_signal(signal.SIGHUP)
    engine.check(engine.finish(process), also=(-signal.SIGHUP, 129))
    ran = engine.run_here("train", *chaos.SMALL, f"--workdir={folder / 'run'}")
    engine.check(
        ran, functools.partial(engine.check_same, folder / "run", engine.reference()), refuses=False
    )


def _train_into_head(folder: Path) -> None:
    """Nobody reads what a run says any more: it trains on, or ends and can go on."""
    process = _shell(f"ncjax.main {' '.join(chaos.SMALL)} --workdir={folder / 'run'}", "", folder)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode(errors="replace")
    engine.check(Ran(process.wait(engine.COMMAND_LIMIT), "", err), also=(141, -signal.SIGPIPE, 1))
    ran = engine.run_here("train", *chaos.SMALL, f"--workdir={folder / 'run'}")
    engine.check(
        ran, functools.partial(engine.check_same, folder / "run", engine.reference()), refuses=False
    )


def cases(_: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for what, env in _MEASURED.items():
        yield f"measure, {what!a}", functools.partial(_measure, env)
    for what, env in _CONTINUED.items():
        yield f"train on, {what!a}", functools.partial(_continue, env)
    for what, streams in _STREAMS.items():
        for command in ("measure", "measure --json", "a refusal", "show"):
            yield f"{command}, {what}", functools.partial(_stream, _SPEAKING[command], streams)
    for what, command in _SPEAKING.items():
        yield f"{what} | head -1", functools.partial(_head, command)
    yield "train | head -1", _train_into_head
    yield "SIGHUP while training", _hang_up
