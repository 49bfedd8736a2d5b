"""Ctrl-C and SIGTERM: what was computed is saved, the way on is named, and the run ends at the
same bits.
"""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from ncjax import plan
from ncjax.cli import train
from ncjax.report import draw, tables
from ncjax.runs import loop, signals
from ncjax.storage import checkpoint, history
from tests import chaos

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module", autouse=True)
def program():
    with chaos.one_program():
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("interrupts") / "reference"
    chaos.record(workdir)
    return chaos.Outcome.of(workdir)


def signal_at(monkeypatch, epoch, *signums):
    """The process gets signals once `epoch` is measured."""
    measured = tables.Progress.measured

    def signalled(self, at, nc1):
        measured(self, at, nc1)
        if at == epoch:
            for signum in signums:
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(tables.Progress, "measured", signalled)


@pytest.mark.parametrize("epoch", [0, pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("signum", EXIT_CODES)
def test_a_signal_saves_what_was_computed_and_names_the_command_that_continues(
    signum, epoch, reference, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(draw, "draw_all", lambda history, folder: [])
    argv = ["ncjax", *chaos.SMALL, f"--workdir={tmp_path / 'run 1'}"]
    with monkeypatch.context() as patch:
        signal_at(patch, epoch, signum)
        assert train.main(argv) == EXIT_CODES[signum]
    name = signal.Signals(signum).name
    noted, stopped, command = capfd.readouterr().err.splitlines()
    assert noted == f"{name}: stopping after this chunk and a checkpoint; again: at once"
    assert stopped == f"stopped by {name}; this continues:"
    assert shlex.split(command)[3:] == argv[1:]
    # All that had been trained and measured is on disk.
    folder = tmp_path / "run 1" / "checkpoints"
    assert checkpoint.epochs_in(folder)[-1] == epoch
    assert checkpoint.read_metadata(folder, epoch).measured == list(range(epoch + 1))
    assert history.load(tmp_path / "run 1" / "history.nc")["epoch"].values.tolist() == list(
        range(epoch + 1)
    )
    assert train.main(argv) == 0
    out = capfd.readouterr().out
    assert f"continuing from epoch {epoch}" in out
    reference.check(chaos.Outcome.of(tmp_path / "run 1"))


def test_signals_are_python_s_own_again_once_the_run_is_left(tmp_path, monkeypatch):
    before = [signal.getsignal(signum) for signum in EXIT_CODES]
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGINT)
        with pytest.raises(signals.Interrupted):
            loop.train(plan.prepare(chaos.small_config(), tmp_path))
    assert [signal.getsignal(signum) for signum in EXIT_CODES] == before


def test_a_signal_after_the_last_epoch_stops_nothing(tmp_path, monkeypatch, reference):
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGTERM)
        loop.train(plan.prepare(chaos.small_config(), tmp_path))
    reference.check(chaos.Outcome.of(tmp_path))


def test_a_save_that_failed_is_not_passed_off_as_one_that_continues(tmp_path, monkeypatch, capfd):
    """Interrupted promises that all is on disk; saving ends in the background, with `close`."""
    close = checkpoint.Checkpoints.close

    def fail(self):
        close(self)
        raise OSError("a checkpoint could not be written in checkpoints (No space left on device)")

    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        patch.setattr(checkpoint.Checkpoints, "close", fail)
        assert train.main(["ncjax", *chaos.SMALL, f"--workdir={tmp_path}"]) == 1
    assert "No space left on device" in capfd.readouterr().err


def test_a_request_that_comes_while_it_is_looked_for_still_gets_its_checkpoint(
    tmp_path, monkeypatch
):
    """Between the question whether to save and the question whether to stop."""
    asked = signals.Requests.signum.fget

    def too_late(self):
        answer = asked(self)
        os.kill(os.getpid(), signal.SIGINT) if not answer and state["epoch"] == 3 else None
        return answer

    state = {"epoch": -1}
    measured = tables.Progress.measured

    def note(self, epoch, nc1):
        measured(self, epoch, nc1)
        state["epoch"] = epoch

    with monkeypatch.context() as patch:
        patch.setattr(signals.Requests, "signum", property(too_late))
        patch.setattr(tables.Progress, "measured", note)
        with pytest.raises(signals.Interrupted):
            loop.train(plan.prepare(chaos.small_config(), tmp_path))
    measured_epochs = history.load(tmp_path / "history.nc")["epoch"].values.tolist()
    assert checkpoint.epochs_in(tmp_path / "checkpoints")[-1] == measured_epochs[-1]


TWICE = """
import os, signal
from ncjax.runs.signals import Requests
with Requests() as requests:
    os.kill(os.getpid(), signal.{first})
    assert requests.signum
    os.kill(os.getpid(), signal.{second})
    print("still here")
"""


@pytest.mark.parametrize(
    ("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM")]
)
def test_a_second_signal_exits_at_once(first, second):
    child = TWICE.format(first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, cwd=chaos.ROOT
    )
    assert done.returncode == EXIT_CODES[signal.Signals[second]]
    assert done.stdout == ""
    assert done.stderr == f"{first}: stopping after this chunk and a checkpoint; again: at once\n"


def signalled_process(signum, tmp_path):
    """(WORKDIR of an uninterrupted run, WORKDIR, process in it that has just got a signal)."""
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    chaos.finish(chaos.start(chaos.KILLED, reference, tmp_path))
    process = chaos.start(chaos.KILLED, workdir, tmp_path)
    chaos.wait_for_event(process, workdir, 12, "history.nc")
    process.send_signal(signum)
    return reference, workdir, process


@pytest.mark.slow
@pytest.mark.parametrize("signum", EXIT_CODES)
def test_the_command_stops_saves_and_continues_in_processes_of_its_own(signum, tmp_path):
    reference, workdir, process = signalled_process(signum, tmp_path)
    _, err = chaos.finish(process, EXIT_CODES[signum])
    assert err.splitlines()[-2:] == [
        f"stopped by {signal.Signals(signum).name}; this continues:",
        f"    python -m ncjax.main {shlex.join([*chaos.KILLED, f'--workdir={workdir}'])}",
    ]
    stopped = checkpoint.epochs_in(workdir / "checkpoints")[-1]
    assert 0 < stopped < chaos.EPOCHS
    out, err = chaos.finish(chaos.start(chaos.KILLED, workdir, tmp_path))
    assert f"continuing from epoch {stopped}" in out
    assert err == ""
    chaos.Outcome.of(reference).check(chaos.Outcome.of(workdir))


@pytest.mark.slow
@pytest.mark.parametrize("signum", EXIT_CODES)
def test_a_second_signal_leaves_a_workdir_that_continues(signum, tmp_path):
    reference, workdir, process = signalled_process(signum, tmp_path)
    process.stderr.readline()  # the first has been noted
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_CODES[signum]
    chaos.finish(chaos.start(chaos.KILLED, workdir, tmp_path))
    chaos.Outcome.of(reference).check(chaos.Outcome.of(workdir))
