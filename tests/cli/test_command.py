"""Every command: signals, closed and full streams, mistakes and environment variables end in one
line at most.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

from ncjax import environment, plan
from ncjax.cli import measure, plot, report, show, train
from ncjax.config import default_config
from ncjax.errors import InputError
from ncjax.report import draw, panels
from ncjax.training import compilation, parallel
from tests import chaos

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
PYTHON = [sys.executable, "-W", "ignore::DeprecationWarning"]


def run(*arguments, **options):
    return subprocess.run(
        [*PYTHON, *arguments],
        capture_output=True,
        text=True,
        cwd=chaos.ROOT,
        timeout=120,
        **options,
    )


# Signals ------------------------------------------------------------------------------------------

# A signal comes when a module is looked for, and the importer swallows what is raised.
IMPORTING = """
import os, runpy, signal, sys
command, name, signum, *sys.argv = sys.argv[1:]

class Importer:
    def find_spec(self, wanted, path=None, target=None):
        if wanted == name:
            try:
                os.kill(os.getpid(), getattr(signal, signum))
            except BaseException:
                pass

sys.meta_path.insert(0, Importer())
runpy.run_module(command, run_name="__main__", alter_sys=True)
"""
IMPORTS = [
    ("main", "absl", "SIGINT"),
    ("main", "numpy", "SIGTERM"),
    ("main", "jax", "SIGINT"),
    ("train", "ncjax.cli.choose", "SIGTERM"),
    ("train", "ncjax.cli.train", "SIGINT"),
    ("show", "ncjax.errors", "SIGINT"),
    ("show", "jax", "SIGTERM"),
    ("measure", "numpy", "SIGINT"),
    ("measure", "jax._src.config", "SIGINT"),
    ("plot", "xarray", "SIGINT"),
    ("plot", "pandas", "SIGTERM"),
    ("report", "ncjax.report.page", "SIGTERM"),
]
COMMANDS = {
    "main": ("ncjax.main", *chaos.SMALL, "--dry-run"),
    "train": ("ncjax", "train", *chaos.SMALL, "--dry-run"),
    "show": ("ncjax", "show", "nowhere"),
    "measure": ("ncjax", "measure", "tests/data/features.npz"),
    "plot": ("ncjax", "plot", "nowhere"),
    "report": ("ncjax", "report", "nowhere"),
}


@pytest.mark.parametrize(("command", "name", "signum"), IMPORTS)
def test_a_signal_during_an_import_that_swallows_it_ends_the_command_in_one_line(
    command, name, signum
):
    words = COMMANDS[command]
    done = run("-c", IMPORTING, words[0], name, signum, *words)
    assert (done.returncode, done.stdout, done.stderr) == (
        EXIT_CODES[signum],
        "",
        f"stopped by {signum}\n",
    )


KILL = "os.kill(os.getpid(), signal.SIGINT)"
PLACES = {
    "in the open": KILL,
    "swallowed": f"try: {KILL}\n    except BaseException: pass",
    "turned into another": f"try: {KILL}\n    except BaseException: raise ImportError('numpy') "
    "from None",
    "in a destructor": f"class Dying:\n        def __del__(self): {KILL}\n    Dying(); "
    "time.sleep(30)",
    "below a library that does not return": f"threading.Timer(0.2, lambda: {KILL}).start()\n"
    "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)",
    "twice": f"try: {KILL}\n    finally: {KILL}",
}


def fake(folder: Path, body: str):
    """A command, run as the others are."""
    source = (
        f"import atexit, hashlib, os, signal, sys, threading, time\n\ndef main():\n    {body}\n"
    )
    (folder / "fake.py").write_text(source)
    return ["-c", "from ncjax.cli import command; command.run('fake')"], os.environ | {
        "PYTHONPATH": f"{folder}:{chaos.ROOT}"
    }


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_a_command_in_one_line_wherever_it_comes(place, tmp_path):
    arguments, variables = fake(tmp_path, f"{PLACES[place]}\n    return 0")
    done = run(*arguments, env=variables)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n")


def test_a_signal_that_comes_before_the_command_is_looked_for_ends_it_in_one_line(tmp_path):
    (_, script), variables = fake(tmp_path, "return 0")
    early = f"import os, signal, threading; threading.Thread.start = lambda self: {KILL}; {script}"
    done = run("-c", early, env=variables)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n")


def test_a_signal_while_the_interpreter_shuts_down_leaves_the_exit_code(tmp_path):
    arguments, variables = fake(
        tmp_path, f"atexit.register(lambda: {KILL})\n    print('all')\n    return 7"
    )
    done = run(*arguments, env=variables)
    assert (done.returncode, done.stdout, done.stderr) == (7, "all\n", "")


def test_a_fault_of_ours_keeps_its_traceback(tmp_path):
    arguments, variables = fake(tmp_path, "raise ZeroDivisionError")
    done = run(*arguments, env=variables)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError"


# Streams ------------------------------------------------------------------------------------------

TALKING = """for _ in range(1000): print('a line of text' * 9)
    sys.stdout.flush()
    print('a warning', file=sys.stderr, flush=True)
    open('done', 'w').close()
    return 0"""


def talk(folder, redirections):
    arguments, variables = fake(folder, TALKING)
    script = f'"$0" "$@" {redirections}'
    done = subprocess.run(
        ["bash", "-c", script, *PYTHON, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=variables,
    )
    assert (folder / "done").exists()
    return done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line_once_all_is_done(tmp_path):
    done = talk(tmp_path, "> /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "a warning"
    assert "No space left" in done.stderr.splitlines()[1]
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "redirections", ["| head -1; exit ${PIPESTATUS[0]}", ">&-", "2>&- | tail -1", "<&- >&- 2>&-"]
)
def test_a_reader_that_is_gone_is_no_error(redirections, tmp_path):
    done = talk(tmp_path, redirections)
    assert done.returncode == 0
    assert done.stderr in ("a warning\n", "")
    assert done.stdout in ("a line of text" * 9 + "\n", "")


def test_what_was_meant_for_a_closed_stream_reaches_no_file(tmp_path):
    body = (
        "file = open('data', 'w')\n    os.write(1, b'?')\n    os.write(2, b'?')\n    "
        "file.close()\n    return 0"
    )
    arguments, variables = fake(tmp_path, body)
    subprocess.run(
        ["bash", "-c", '"$0" "$@" >&- 2>&-', *PYTHON, *arguments],
        cwd=tmp_path,
        env=variables,
        check=True,
    )
    assert (tmp_path / "data").read_text() == ""


def test_a_file_name_that_is_no_text_is_printed_as_it_is(tmp_path):
    arguments, variables = fake(tmp_path, r"print('b\udcff±')" + "\n    return 0")
    utf8 = subprocess.run(
        [*PYTHON, *arguments], capture_output=True, env=variables | {"PYTHONIOENCODING": "utf-8"}
    )
    ascii_ = subprocess.run(
        [*PYTHON, *arguments], capture_output=True, env=variables | {"PYTHONIOENCODING": "ascii"}
    )
    assert (utf8.stdout, ascii_.stdout) == (b"b\xff\xc2\xb1\n", b"b\\udcff\\xb1\n")
    assert (utf8.returncode, ascii_.returncode) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirections", "code"), [("> /dev/full", 1), ("| head -1; exit ${PIPESTATUS[0]}", 0)]
)
def test_training_loses_nothing_where_nobody_reads(redirections, code, tmp_path):
    chaos.record(tmp_path / "reference")
    command = [*PYTHON, "-m", "ncjax.main", *chaos.SMALL, f"--workdir={tmp_path / 'run'}"]
    script = f'"$0" "$@" {redirections}'
    done = subprocess.run(
        ["bash", "-c", script, *command],
        stderr=subprocess.PIPE,
        cwd=chaos.ROOT,
        env=chaos.environment(tmp_path),
    )
    assert done.returncode == code, done.stderr
    chaos.Outcome.of(tmp_path / "reference").check(chaos.Outcome.of(tmp_path / "run"))
    assert (tmp_path / "run" / "figures" / "collapse_against_epoch.png").exists()


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "word"),
    [
        (show, ["run", "--epoch", "x"], "--epoch"),
        (show, [], "WORKDIR"),
        (show, ["run", "--colour"], "--colour"),
        (measure, ["a.npz", "--loss", "hinge"], "--loss"),
        (measure, ["a.npz", "--batch=\n"], "--batch"),
        (plot, ["run", "--weight-decay", "x"], "--weight-decay"),
        (plot, ["run", "--width", "3.25"], "--width"),
        (plot, ["run", "--width", "0.1in"], "--width"),
        (measure, ["a.npz", "--width", "nanin"], "--width"),
        (report, [], "WORKDIR"),
        (report, ["run", "--colour"], "--colour"),
    ],
)
def test_a_mistake_is_one_line_without_the_usage(command, arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ")
    assert word in message
    assert message.count("\n") == 1


# The environment ----------------------------------------------------------------------------------

REFUSED = [
    ("JAX_DEBUG_NANS", "1"),
    ("JAX_DEBUG_INFS", "true"),
    ("JAX_DISABLE_JIT", "on"),
    ("JAX_NO_TRACING", "1"),
    ("JAX_NO_EXECUTION", "1"),
    ("JAX_DEFAULT_DEVICE", "nonsense"),
    ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
    ("JAX_RANDOM_SEED_OFFSET", "5"),
    ("JAX_TRANSFER_GUARD", "disallow"),
    *(("JAX_NUM_CPU_DEVICES", number) for number in ("100000", "abc", "0", "-1", "", "9" * 5000)),
    ("XLA_FLAGS", "--nonsense"),
    ("XLA_FLAGS", "nonsense"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=abc"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_variable_that_would_end_or_change_a_run_is_refused_before_jax_is_imported(name, value):
    with pytest.raises(InputError, match=f"^{name}: got '{value[:100]}"):
        environment.check({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_DEBUG_NANS", "False"),
        ("JAX_RANDOM_SEED_OFFSET", "0"),
        ("JAX_TRANSFER_GUARD", "log"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "standard"),
        ("JAX_NUM_CPU_DEVICES", "512"),
        ("JAX_ENABLE_X64", "1"),
        ("JAX_LOG_COMPILES", "1"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=3"),
    ],
)
def test_a_variable_that_does_no_harm_is_let_be(name, value):
    environment.check({name: value})


@pytest.mark.parametrize("command", [train, show, measure])
def test_every_command_that_uses_jax_looks_at_its_variables(command, monkeypatch, capsys):
    arguments = {
        train: ["ncjax", *chaos.SMALL, "--dry-run"],
        show: ["run"],
        measure: ["tests/data/features.npz"],
    }
    monkeypatch.setenv("JAX_DEBUG_NANS", "1")
    assert command.main(arguments[command]) == 2
    assert capsys.readouterr().err.startswith("error: JAX_DEBUG_NANS: got '1'; ")


def test_a_value_that_jax_does_not_know_is_one_line():
    done = run(
        "-m",
        "ncjax",
        "measure",
        "tests/data/features.npz",
        env=os.environ | {"JAX_LOGGING_LEVEL": "loud"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX_LOGGING_LEVEL: got 'loud'; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'nonsense'"), AssertionError()]
)
def test_a_platform_that_is_not_here_is_named(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    for start in (parallel.use_every_core, parallel.find_devices):
        with pytest.raises(InputError, match=r"^JAX_PLATFORMS: got 'nonsense'; "):
            start()


@pytest.mark.slow
def test_a_float64_default_of_jax_changes_no_bit_of_a_run(tmp_path):
    """`train.precision` decides."""
    with jax.enable_x64(False):
        expected, _ = chaos.record(tmp_path / "off")
    with jax.enable_x64(True):
        found, _ = chaos.record(tmp_path / "on")
    assert chaos.history_bits(found) == chaos.history_bits(expected)


def test_cores_are_counted_where_the_system_does_not_say_which_are_ours(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert parallel._cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert parallel._cores() == 1


def test_windows_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    assert train.main(["ncjax", *chaos.SMALL, f"--workdir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: platform: got 'win32'; ")
    assert "flock" in message


# Another user -------------------------------------------------------------------------------------


@pytest.fixture
def another_user(tmp_path):
    """How to become a user who has no home and can read everything, and write only below /tmp
    and its like.
    """
    if os.getuid() != 0:
        tmp_path.chmod(0o555)
        return []
    capability = "+dac_read_search"  # the interpreter may lie in the home of root
    become = [
        "setpriv",
        "--reuid=4242",
        "--regid=4242",
        "--clear-groups",
        f"--inh-caps={capability}",
    ]
    become.append(f"--ambient-caps={capability}")
    try:
        subprocess.run([*become, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nobody else to become here")
    return become


PREFLIGHT = """
import os, sys
from ncjax import config, plan
assert not os.access(".", os.W_OK)
settings = config.default_config()
settings.data.name = "synthetic"
plan.examine(settings, sys.argv[1])
print("sound")
"""


def nobody():
    return {name: value for name, value in os.environ.items() if name != "HOME"} | {
        "PYTHONPATH": str(chaos.ROOT)
    }


def test_a_run_is_not_refused_in_a_current_folder_that_cannot_be_written(another_user, tmp_path):
    command = [*another_user, *PYTHON, "-c", PREFLIGHT, "/tmp/ncjax-of-nobody"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=nobody())
    assert (done.stdout, done.stderr) == ("sound\n", "")


def test_a_user_without_a_home_has_no_cache_of_programs(monkeypatch, uncached):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compilation.use_cache("user")
    assert jax.config.jax_compilation_cache_dir is None


# Names --------------------------------------------------------------------------------------------

NO_TEXT = os.fsdecode(b"b\xff")


def test_a_workdir_whose_name_is_no_utf8_is_refused(tmp_path, capsys):
    workdir = tmp_path / NO_TEXT
    for command, argv in (
        (train, ["ncjax", *chaos.SMALL, f"--workdir={workdir}"]),
        (show, [str(workdir)]),
    ):
        assert command.main(argv) == 2
        message = capsys.readouterr().err
        assert "UTF-8" in message
        assert "b\\udcff" in message
        assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_whose_name_is_no_utf8_is_seen(tmp_path, monkeypatch):
    (tmp_path / NO_TEXT).mkdir()
    monkeypatch.chdir(tmp_path / NO_TEXT)
    with pytest.raises(InputError, match=r"^--workdir: got 'run'; "):
        plan.prepare(default_config(), "run")


def test_names_that_are_no_utf8_are_drawn_and_stay_apart(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(draw, "draw_all", lambda *_: [])
    monkeypatch.setattr(
        draw, "draw_comparison", lambda histories, *_: drawn.update(histories) or []
    )
    monkeypatch.setattr(plot, "_load", lambda path: xr.Dataset({"number": np.array(1)}))
    names = [os.fsdecode(name) for name in (b"b\xff", b"b\xfe")]
    assert plot.main([str(tmp_path / name) for name in names]) == 0
    assert [panels.literal(name) for name in drawn] == [r"b\udcff", r"b\udcfe"]
