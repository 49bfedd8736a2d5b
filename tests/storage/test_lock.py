"""One process at a time in a WORKDIR, and none that outlives its process."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from ncjax.errors import InputError
from ncjax.storage import lock
from tests import chaos

HOLDER = """
import sys, time
from pathlib import Path
from ncjax.storage import lock
with lock.owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=chaos.ROOT
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_told_whose_the_workdir_is(holder, tmp_path):
    with pytest.raises(InputError) as refusal, lock.owned(tmp_path):
        pass
    message = str(refusal.value)
    assert message.startswith(
        f"--workdir: got '{tmp_path}'; process {holder.pid} on {socket.gethostname()}, since "
    )
    assert "choose another WORKDIR" in message
    assert "\n" not in message


def test_the_command_is_refused_before_it_touches_anything(holder, tmp_path, capsys):
    from ncjax.cli import train

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert train.main(["ncjax", *chaos.SMALL, f"--workdir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --workdir: got ")
    assert f"process {holder.pid} on {socket.gethostname()}" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_died_holds_nothing(holder, tmp_path, signum):
    holder.send_signal(signum)
    holder.wait()
    with lock.owned(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()


def test_it_is_let_go_of_when_it_is_left_however_it_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.owned(tmp_path):
        raise ZeroDivisionError
    with (
        lock.owned(tmp_path),
        pytest.raises(InputError, match=f"process {os.getpid()} on"),
        lock.owned(tmp_path),
    ):
        pass
    with lock.owned(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": 1}', b"\xff\xfe", b"[" * 100_000])
def test_an_owner_that_cannot_be_read_is_another_process(tmp_path, content):
    with lock.owned(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with (
            pytest.raises(InputError, match="another process is training in it"),
            lock.owned(tmp_path),
        ):
            pass


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises((OSError, InputError), match="No locks available"), lock.owned(tmp_path):
        pass


@pytest.mark.parametrize("way", ["removed", "replaced", "folder"])
def test_whoever_holds_a_lock_that_is_gone_is_told(tmp_path, way):
    folder = tmp_path / "run"
    folder.mkdir()
    with lock.owned(folder) as check:
        check()
        if way == "folder":
            folder.rename(tmp_path / "elsewhere")
        else:
            (folder / ".lock").unlink()
        if way == "replaced":
            with lock.owned(folder):  # another process would get it
                check_fails(check, folder)
        check_fails(check, folder)


def check_fails(check, folder):
    with pytest.raises(OSError, match="another may have begun") as lost:
        check()
    assert str(folder / ".lock") in str(lost.value)
    assert "\n" not in str(lost.value)
