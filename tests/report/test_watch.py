"""`ncjax report --watch`: a page renewed from the files of a WORKDIR, on this machine alone."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ncjax.cli import report
from ncjax.report import page, watch
from tests.report.test_figures import make_history, save
from tests.report.test_page import Parsed


@pytest.fixture
def served(tmp_path):
    """A server of tmp_path/run, and what it answers: (status, text)."""
    workdir = tmp_path / "run"
    workdir.mkdir()

    def read():
        return [page.Source("run", report._load(workdir), {})]

    with watch.Server([workdir / "history.nc"], read) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def get(path="/", host=None):
            connection = http.client.HTTPConnection(watch.HOST, server.server_port, timeout=30)
            try:
                connection.request("GET", path, headers={"Host": host} if host else {})
                response = connection.getresponse()
                return response.status, response.read().decode()
            finally:
                connection.close()

        get.server, get.workdir = server, workdir
        yield get
        server.shutdown()
        thread.join()


def write(workdir, epochs):
    """Replaces a history, as a run does, at a later time than all before."""
    scratch = workdir.parent / "scratch"
    save(make_history(epochs=epochs), scratch)
    later = time.time_ns() + 10**9 * epochs[-1]
    for name in ("history.nc.sha256", "history.nc"):
        os.utime(scratch / name, ns=(later, later))
        os.replace(scratch / name, workdir / name)
    scratch.rmdir()


def epochs(text):
    return Parsed(text).data("page")["sources"][0]["epochs"]


def test_the_page_follows_the_files_through_damage_and_what_comes_after(served):
    status, text = served()
    assert status == 200
    assert "script" not in text  # nothing has been measured yet
    assert served("/version") == (200, "")
    write(served.workdir, (0, 1))
    first = served("/version")[1]
    text = served()[1]
    assert epochs(text) == [0, 1]
    assert Parsed(text).data("page")["version"] == first
    # A run was killed while it wrote, and another continues.
    history = served.workdir / "history.nc"
    history.write_bytes(history.read_bytes()[:100])
    assert served("/version")[1] == first
    assert epochs(served()[1]) == [0, 1]
    history.unlink()
    assert epochs(served()[1]) == [0, 1]
    write(served.workdir, (0, 1, 10))
    assert served("/version")[1] != first
    assert epochs(served()[1]) == [0, 1, 10]


def test_it_is_of_this_machine_and_of_no_other_site(served):
    assert served.server.server_address[0] == "127.0.0.1"
    port = served.server.server_port
    assert served(host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1:1"):
        assert served(host=host)[0] == 403
    for path in ("/history.nc", "/../history.nc", "/version/"):
        assert served(path)[0] == 404


def test_only_a_watched_page_asks_for_more():
    sources = [page.Source("run", make_history(), {})]
    for version, asks in (("", False), ("1", True)):
        (policy,) = (
            attrs["content"]
            for tag, attrs in Parsed(page.render(sources, version)).tags
            if "http-equiv" in attrs
        )
        assert ("connect-src 'self'" in policy) == asks


@pytest.mark.parametrize("words", [["run", "--watch", "--out", "x.html"], ["nowhere", "--watch"]])
def test_what_cannot_be_watched_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(make_history(), tmp_path / "run")
    assert report.main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path):
    save(make_history(), tmp_path / "run")
    command = [sys.executable, "-m", "ncjax", "report", str(tmp_path / "run"), "--watch"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as ran:
        address = ran.stdout.readline().split()[0]
        port = int(address.rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        ran.send_signal(signal.SIGINT)
        assert ran.wait(30) == 130
        assert "Traceback" not in ran.stderr.read()
