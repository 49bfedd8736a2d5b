"""benchmarks.machine: no conclusion where other processes computed."""

import subprocess
import sys
import time

import pytest

from benchmarks import machine

pytestmark = pytest.mark.skipif(not machine._STAT.exists(), reason="only Linux says who computes")
SPIN = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"


@pytest.fixture
def computed(monkeypatch):
    """Seconds computed by all and by us, and the time, as a test sets them."""
    seconds = {"all": 100.0, "us": 10.0, "now": 0.0}
    monkeypatch.setattr(machine, "_used_by_all", lambda: seconds["all"])
    monkeypatch.setattr(machine, "_used_by_us", lambda: seconds["us"])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: seconds["now"])
    monkeypatch.setattr(machine.time, "sleep", lambda _: None)
    monkeypatch.setattr(machine, "CORES", 2)
    return seconds


def test_work_of_this_process_and_of_its_children_is_ours():
    before = machine._used_by_us()
    exec(SPIN, {})
    subprocess.run([sys.executable, "-c", SPIN], check=True)
    child = subprocess.Popen([sys.executable, "-c", f"{SPIN}\ntime.sleep(9)"])
    try:
        while (used := machine._used_by_us() - before) < 0.55:  # one tick is 0.01 s
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert used < 3


@pytest.mark.parametrize(("others", "concludes"), [(0.0, True), (0.9, True), (2.0, False)])
def test_no_conclusion_where_others_took_more_than_a_twentieth(others, concludes, computed, capsys):
    watch = machine.Watch(concludes=False)
    # We compute for 15 seconds of 10 on two cores, and others so many.
    computed |= {"all": 115.0 + others, "us": 25.0, "now": 10.0}
    assert watch.concluded() is concludes
    said = capsys.readouterr().err
    assert ("10% of 2 cores" in said) is not concludes
    assert f"numpy {watch.machine['versions']['numpy']}" in said


def test_a_busy_machine_is_refused_before_anything_is_measured(computed, monkeypatch, capsys):
    monkeypatch.setattr(
        machine.time, "sleep", lambda seconds: computed.update(all=101.0, now=seconds)
    )
    with pytest.raises(SystemExit) as end:
        machine.Watch(concludes=True)
    assert end.value.code == 2
    assert "error: other processes take 25% of 2 cores" in capsys.readouterr().err
