"""Several processes, one run: the numbers of one process, a lost process, and what cannot start."""

import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from ncjax import plan
from ncjax.cli import train
from ncjax.errors import InputError
from ncjax.runs import loop, processes
from ncjax.storage import checkpoint, history, lock
from tests import chaos, meshes

# Of `meshes.make_config`, as a command line; a schedule of its own lets a run of 1 epoch go on to
# 3.
FLAGS = (
    "--config.data.name=synthetic",
    "--config.data.num_classes=3",
    "--config.data.per_class=20",
    "--config.model.widths=8,8",
    "--config.model.head_bias=free",
    "--config.train.batch_size=18",
    "--config.train.precision=float64",
    "--config.train.schedule_epochs=3",
    "--config.sweep.weight_decay=0,1e-2",
    "--config.sweep.seed=0,1",
    "--config.log.epochs=0,1",
)
TOLERANCE = 1e-9


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(workdir, cache, *flags, count=2, devices=2):
    """Processes that train together by one command line."""
    joined = (f"--coordinator=localhost:{free_port()}", f"--processes={count}")
    return [
        chaos.start(
            (*flags, *joined, f"--process={i}"), workdir, cache, JAX_NUM_CPU_DEVICES=str(devices)
        )
        for i in range(count)
    ]


def train_together(workdir, cache, *flags):
    """Exit codes must be 0; -> what process 0 said."""
    processes = start(workdir, cache, *flags)
    said = [chaos.finish(process) for process in processes]
    assert "epoch" not in said[1][0]  # process 0 speaks for all
    return said[0][0]


def train_alone(workdir, epochs):
    config = meshes.make_config(train__epochs=epochs, train__schedule_epochs=3, log__epochs=(0, 1))
    config.checkpoint.every = 100
    return loop.train(plan.prepare(config, workdir))


def leaves(workdir, epoch):
    """The parameters in a checkpoint, all runs."""
    facts = checkpoint.read_metadata(workdir / "checkpoints", epoch)
    names = [name for name in facts.crc32 if name.startswith("params.")]
    return [checkpoint.read_leaf(workdir / "checkpoints", facts, name) for name in names]


def check_equal(workdir, reference):
    found, expected = (history.load(folder / "history.nc") for folder in (workdir, reference))
    assert meshes.deviation(found, expected) < TOLERANCE
    for a, b in zip(leaves(workdir, 3), leaves(reference, 3), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """WORKDIR of three epochs in one process."""
    workdir = tmp_path_factory.mktemp("processes") / "reference"
    train_alone(workdir, 3)
    return workdir


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_two_processes_equal_one(reference, tmp_path, cache):
    """2 x 2 devices: runs lie in two processes, and so do the halves of each batch's sums."""
    said = train_together(
        tmp_path / "run", cache, *FLAGS, "--config.train.epochs=3", "--config.mesh.data=2"
    )
    assert "2 x 2 devices (run x data) of 2 processes" in said
    check_equal(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_and_the_other_way_round(reference, tmp_path, cache):
    train_together(tmp_path / "two", cache, *FLAGS, "--config.train.epochs=1")
    shutil.copytree(tmp_path / "two", tmp_path / "two-one")
    train_alone(tmp_path / "two-one", 3)
    check_equal(tmp_path / "two-one", reference)
    train_alone(tmp_path / "one", 1)
    said = train_together(tmp_path / "one", cache, *FLAGS, "--config.train.epochs=3")
    assert "continuing from epoch 1" in said
    check_equal(tmp_path / "one", reference)


# Three runs on 2 x 2 devices: a fourth fills the mesh.
LONG = (
    "--config=configs/digits.py",
    "--config.sweep.weight_decay=0,1e-4,1e-3",
    "--config.sweep.seed=0",
    "--config.train.precision=float64",
    "--config.train.epochs=100",
    "--config.checkpoint.every=5",
    "--config.log.epochs=0,5,10,100",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """The history of LONG in one process."""
    workdir = tmp_path_factory.mktemp("processes") / "uninterrupted"
    chaos.finish(chaos.start(LONG, workdir, cache))
    return history.load(workdir / "history.nc")


def wait_for_checkpoint(process, workdir):
    while process.poll() is None and not checkpoint.epochs_in(workdir / "checkpoints"):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_and_the_run_goes_on(lost, uninterrupted, tmp_path, cache):
    workdir = tmp_path / "run"
    processes = start(workdir, cache, *LONG)
    wait_for_checkpoint(processes[1 - lost], workdir)
    processes[lost].send_signal(signal.SIGKILL)
    for process in (processes[1 - lost], processes[lost]):
        _, err = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
        assert "should one be lost" in err
        assert "Traceback" not in err
    if lost:
        assert "continuing from epoch" in train_together(workdir, cache, *LONG)
    else:  # what is left may go on alone
        assert "continuing from epoch" in chaos.finish(chaos.start(LONG, workdir, cache))[0]
    assert meshes.deviation(history.load(workdir / "history.nc"), uninterrupted) < TOLERANCE


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_epoch(tmp_path, cache):
    workdir = tmp_path / "run"
    processes = start(workdir, cache, *LONG)
    wait_for_checkpoint(processes[0], workdir)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, err = chaos.finish(process, 143)
        assert "stopped by SIGTERM; this continues:" in err
    epochs = checkpoint.epochs_in(workdir / "checkpoints")
    assert 0 < epochs[-1] < 100
    assert checkpoint.read_metadata(workdir / "checkpoints", epochs[-1]).epoch == epochs[-1]


@pytest.mark.slow
def test_processes_of_different_configs_are_refused(tmp_path, cache):
    joined = (*FLAGS, f"--coordinator=localhost:{free_port()}", "--processes=2")
    processes = [
        chaos.start(
            (*joined, f"--process={i}", f"--config.train.epochs={2 + i}"), tmp_path / "run", cache
        )
        for i in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "--process: got 1; it has another config than process 0" in err


BAD = [
    (["--coordinator=localhost"], "--coordinator: got 'localhost'; name process 0 as host:port"),
    (
        ["--coordinator=localhost:x", "--processes=2", "--process=0"],
        "--coordinator: got 'localhost:x'",
    ),
    (["--coordinator=localhost:12355"], "--processes: got None"),
    (["--coordinator=localhost:12355", "--processes=0", "--process=0"], "--processes: got 0"),
    (
        ["--coordinator=localhost:12355", "--processes=2"],
        "--process: got None; must be an integer from 0 to 1",
    ),
    (["--coordinator=localhost:12355", "--processes=2", "--process=2"], "--process: got 2"),
    (["--processes=2"], "--coordinator: got ''"),
    (["--coordinator=localhost:12355", "--processes=two", "--process=0"], "two"),
    (
        ["--coordinator=no.host.invalid:12355", "--processes=2", "--process=1"],
        "got 'no.host.invalid:12355'; ",
    ),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_process_that_cannot_be_is_one_line(flags, message, tmp_path, capsys):
    assert train.main(["ncjax", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_one_line(tmp_path, capsys):
    with socket.create_server(("", 0)) as taken:
        flags = [
            f"--coordinator=localhost:{taken.getsockname()[1]}",
            "--processes=2",
            "--process=0",
        ]
        assert train.main(["ncjax", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, plan.Processes(None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, plan.Processes(None, None, None)),
    ],
)
def test_several_tasks_and_hosts_are_found_in_the_environment(environment, expected):
    assert plan.find_processes("", None, None, environment) == expected


def test_flags_go_before_the_environment():
    found = plan.find_processes("localhost:1234", 2, 1, {"SLURM_STEP_NUM_TASKS": "4"})
    assert found == plan.Processes("localhost:1234", 2, 1)
    assert plan.find_processes("auto", None, None, {}) == plan.Processes(None, None, None)


def check_same(workdir):
    config = meshes.make_config()
    processes.check_same(plan.examine(config, workdir))


@pytest.fixture
def beside(monkeypatch):
    """beside(position): another process, whose checksum at that position is another; None: the
    same.
    """

    def start(position):
        def gather(mine):
            other = np.array(mine)
            if position is not None:
                other[position] += 1
            return np.stack([mine, other])

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
        monkeypatch.setattr(
            "jax.experimental.multihost_utils.sync_global_devices", lambda name: None
        )

    return start


@pytest.mark.parametrize(
    ("position", "what"),
    [(0, "another config"), (1, "another data"), (2, "another PRNG"), (3, "another version")],
)
def test_a_process_that_would_train_something_else_is_refused(beside, tmp_path, position, what):
    beside(position)
    with pytest.raises(InputError, match=f"^--process: got 1; it has {what}"):
        check_same(tmp_path)
    beside(None)
    check_same(tmp_path)


def test_a_process_that_does_not_see_the_folder_or_the_checkpoint_is_refused(beside, tmp_path):
    with lock.owned(tmp_path):
        beside(0)
        for check in (processes.check_shared, lambda folder: processes.check_read(folder, 4)):
            with pytest.raises(InputError, match=f"^--workdir: got '{tmp_path}'; process 1 "):
                check(tmp_path)
        beside(None)
        processes.check_shared(tmp_path)
        processes.check_read(tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["another folder", "no checkpoints"])
def test_processes_of_different_folders_are_refused(tmp_path, cache, way):
    folders = [tmp_path / "run", tmp_path / "other"]
    if way == "no checkpoints":  # on hosts that do not share them, one --workdir is two folders too
        train_alone(folders[0], 1)
    flags = (
        *FLAGS,
        "--config.train.epochs=3",
        f"--coordinator=localhost:{free_port()}",
        "--processes=2",
    )
    processes = [
        chaos.start((*flags, f"--process={i}"), folder, cache) for i, folder in enumerate(folders)
    ]
    for process, folder in zip(processes, folders, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert f"error: --workdir: got '{folder}'; process 1 does not see the same folder" in err
    assert not (folders[1] / "checkpoints").exists()


def test_one_process_agrees_with_itself():
    assert jax.process_count() == 1
    assert processes.is_leader()
    assert processes.agree(15, 7) == (15, 7)
