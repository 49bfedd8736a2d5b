"""What a run makes of the WORKDIR that it finds: damaged, mended, grown, of another config, or
gone under its feet.
"""

import contextlib
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import xarray as xr

from ncjax import plan
from ncjax.cli import show, train
from ncjax.data import preparation
from ncjax.errors import InputError
from ncjax.report import draw, tables
from ncjax.runs import inspect as holdings
from ncjax.runs import loop, provenance
from ncjax.runs.load import load_run
from ncjax.storage import checkpoint, history
from tests import chaos

DEEP = b"[" * 100_000  # deeper than Python's JSON goes


@pytest.fixture(scope="module", autouse=True)
def program():
    """All runs of this file share their compiled programs."""
    with chaos.one_program():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("resume") / "finished"
    chaos.record(workdir)
    return workdir, chaos.Outcome.of(workdir)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished WORKDIR, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def data_file(workdir, epoch):
    """The largest file of a checkpoint: the numbers themselves."""
    return max(
        (workdir / "checkpoints" / str(epoch) / "state").rglob("*"),
        key=lambda path: path.stat().st_size,
    )


def run(workdir, **changes):
    """`changes` to the small config, with __ for a dot."""
    config = chaos.small_config()
    config.update({name.replace("__", "."): value for name, value in changes.items()})
    return loop.train(plan.prepare(config, workdir))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_continues(
    workdir, finished, capfd
):
    flip(data_file(workdir, 6))
    run(workdir)
    err = capfd.readouterr().err
    assert err.startswith(f"warning: checkpoint 6 in {workdir} is not used: ")
    assert err.count("\n") == 1
    finished[1].check(chaos.Outcome.of(workdir))


def test_a_truncated_newest_checkpoint_is_named_in_one_line(workdir, finished, capfd):
    path = data_file(workdir, 6)
    path.write_bytes(path.read_bytes()[:100])
    run(workdir)
    err = capfd.readouterr().err
    assert err.startswith(f"warning: checkpoint 6 in {workdir} is not used: ")
    assert err.count("\n") == 1
    finished[1].check(chaos.Outcome.of(workdir))


def test_where_no_checkpoint_is_sound_nothing_is_trained_and_nothing_removed(workdir, capfd):
    for epoch in (4, 6):
        flip(data_file(workdir, epoch))
    before = {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    with pytest.raises(InputError, match="no checkpoint in it can be trusted"):
        run(workdir)
    assert [line[:21] for line in capfd.readouterr().err.splitlines()] == [
        "warning: checkpoint 6",
        "warning: checkpoint 4",
    ]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_history_is_refused_by_name(workdir, damage):
    path = workdir / "history.nc"
    whole = path.read_bytes()
    if damage == "flipped":
        flip(path)
    else:
        path.write_bytes(whole[: len(whole) // 2 if damage == "truncated" else 0])
    with pytest.raises(
        InputError, match=r"^history: got '.*/history\.nc'; does not match history\.nc\.sha256"
    ):
        run(workdir)
    path.write_bytes(whole)
    run(workdir)


def test_a_history_that_lost_epochs_is_not_taken_for_what_the_checkpoint_saw(
    workdir, finished, capfd
):
    path = workdir / "history.nc"
    history.save(history.up_to(history.load(path), 4), path)
    run(workdir)
    assert "checkpoint 6 in" in (err := capfd.readouterr().err)
    assert "history.nc lacks epoch 5" in err
    finished[1].check(chaos.Outcome.of(workdir))


def test_a_missing_history_is_not_trained_around(workdir, capfd):
    (workdir / "history.nc").unlink()
    with pytest.raises(InputError, match=r"remove its checkpoints and history\.nc to train anew"):
        run(workdir)
    assert "history.nc lacks epoch 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"sweep__learning_rate": (0.05,)},
            r"config.sweep.learning_rate is \(0.05,\) here and \(0.1,\) there",
        ),
        pytest.param(
            {"model__widths": (4, 8)},
            r"config.model.widths is \(4, 8\) here and \(8, 8\) there",
            marks=pytest.mark.slow,
        ),
        ({"sweep__seed": (0,)}, r"config.sweep.seed is \(0,\) here and \(0, 1\) there"),
        pytest.param(
            {"train__optimizer": "adam"},
            "config.train.optimizer is 'adam' here and 'sgd' there",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_without_config_json_the_checkpoints_say_what_they_are_of(workdir, change, line):
    (workdir / "config.json").unlink()
    with pytest.raises(InputError, match=f"its checkpoints are of another config: {line}"):
        run(workdir, **change)
    assert checkpoint.epochs_in(workdir / "checkpoints") == [4, 6]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[1]", b'{"train": 3}', b'{"train": {"epochs": "6"}}', DEEP],
)
def test_a_damaged_config_json_is_one_error(workdir, content):
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="--workdir"):
        plan.prepare(chaos.small_config(), workdir)


@pytest.mark.parametrize(
    "damage",
    [
        "lost",
        "cut",
        "flipped",
        "twice",
        "shuffled",
        "junk",
        "no_metrics",
        "other_type",
        "deep",
        "bom",
    ],
)
def test_metrics_are_mended(workdir, finished, damage):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_text("".join(lines)[:-100])
    elif damage == "flipped":
        path.write_text("".join([*lines[:2], lines[2].replace("0.", "1.", 1), *lines[3:]]))
    elif damage == "twice":
        path.write_text("".join([*lines, lines[3]]))
    elif damage == "shuffled":
        path.write_text("".join(reversed(lines)))
    elif damage == "junk":
        path.write_bytes(b"\xff\xfe\n[]\n3\nnull\n" + path.read_bytes())
    elif damage == "no_metrics":
        path.write_text("".join(lines).replace('"metrics"', '"metricr"', 1))
    elif damage == "other_type":
        path.write_text('{"epoch": 0, "metrics": [1]}\n{"epoch": [1]}\n' + "".join(lines[1:]))
    elif damage == "deep":
        path.write_bytes(DEEP + b"\n" + path.read_bytes())
    elif damage == "bom":
        path.write_text("".join([*lines[:2], "\ufeff" + lines[2], *lines[3:]]))
    run(workdir)
    finished[1].check(chaos.Outcome.of(workdir))


def test_a_changed_cosine_in_metrics_does_not_survive(workdir, finished):
    """The history keeps only the newest cosines: nothing but the line itself can tell that they
    changed.
    """
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["metrics"][history.COSINES][0][0][1] += 0.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(workdir)
    finished[1].check(chaos.Outcome.of(workdir))


@pytest.mark.parametrize(
    "fixed",
    [
        pytest.param({"train__schedule": "constant"}, marks=pytest.mark.slow),
        pytest.param({"train__schedule_epochs": 6}, marks=pytest.mark.slow),
        pytest.param({"train__schedule_epochs": 4}, marks=pytest.mark.slow),
    ],
    ids=["constant", "set", "set to what it was"],
)
def test_a_run_grows_to_the_bits_of_one_that_was_as_long_at_once(tmp_path, fixed):
    epochs = {"log__epochs": (0, 2, 4)}
    grown, long = tmp_path / "grown", tmp_path / "long"
    unset = {"train__schedule_epochs": 0} if fixed == {"train__schedule_epochs": 4} else {}
    run(grown, train__epochs=4, **fixed | unset, **epochs)
    recorded = run(grown, train__epochs=6, **fixed, **epochs)
    run(long, train__epochs=6, **fixed, **epochs)
    assert chaos.leaves(grown / "checkpoints", 6) == chaos.leaves(long / "checkpoints", 6)
    assert json.loads((grown / "config.json").read_text())["train"]["epochs"] == 6
    assert json.loads(recorded.attrs["config"])["train"]["epochs"] == 6
    chaos.Outcome.of(long).check(chaos.Outcome.of(grown))


def test_a_run_whose_schedule_depends_on_its_length_does_not_grow(workdir):
    with pytest.raises(InputError) as refusal:
        run(workdir, train__epochs=8)
    message = str(refusal.value)
    assert "config.train.epochs is 8 here and 6 there" in message
    assert "grows with train.schedule=constant" in message
    assert "train.schedule_epochs" in message
    with pytest.raises(InputError, match=r"train\.schedule_epochs is 7 here and 0 there"):
        run(workdir, train__epochs=8, train__schedule_epochs=7)


def test_a_run_does_not_shrink(workdir):
    path = workdir / "config.json"
    path.write_text(path.read_text().replace('"cosine"', '"constant"'))
    with pytest.raises(InputError, match=r"config\.train\.epochs is 2 here and 6 there"):
        run(workdir, train__epochs=2, train__schedule="constant")


@pytest.mark.parametrize("epochs", [(5,), (3, 6)])
def test_a_run_that_measures_late_continues(tmp_path, epochs, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(tables.Progress, "measured", stop)
        run(tmp_path / "stopped", log__epochs=epochs)
    assert checkpoint.epochs_in(tmp_path / "stopped" / "checkpoints")
    run(tmp_path / "stopped", log__epochs=epochs)
    run(tmp_path / "straight", log__epochs=epochs)
    chaos.Outcome.of(tmp_path / "straight").check(chaos.Outcome.of(tmp_path / "stopped"))


def at_epoch(monkeypatch, epoch, act):
    measured = tables.Progress.measured

    def acting(self, at, nc1):
        measured(self, at, nc1)
        if at == epoch:
            act()

    monkeypatch.setattr(tables.Progress, "measured", acting)


def command(workdir, monkeypatch):
    """`main` on the small config -> exit code."""
    monkeypatch.setattr(draw, "draw_all", lambda history, folder: [])
    return train.main(["ncjax", f"--workdir={workdir}", *chaos.SMALL])


@pytest.mark.parametrize("epoch", [1, 4, 6])
def test_a_workdir_removed_under_a_run_is_one_line(tmp_path, monkeypatch, capfd, epoch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_epoch(patch, epoch, lambda: shutil.rmtree(workdir))
        assert command(workdir, patch) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert str(workdir) in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 2  # the second is the command
    assert not (workdir / "history.nc").exists()  # a save under way may have made its folder anew


@pytest.mark.parametrize("target", ["history.nc", "metrics.jsonl", "checkpoints"])
def test_a_full_disk_is_one_line_and_leaves_a_workdir_that_continues(
    tmp_path, finished, monkeypatch, capfd, target
):
    workdir = tmp_path / "run"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(workdir / target))

    def fill():
        if target == "history.nc":
            patch.setattr(history, "write_atomically", full)
        elif target == "metrics.jsonl":
            patch.setattr("os.fsync", full)
        else:
            patch.setattr(checkpoint.ocp.training.Checkpointer, "save_async", full)

    with monkeypatch.context() as patch:
        at_epoch(patch, 3, fill)
        assert command(workdir, patch) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert "No space left on device" in err
    assert len(err.splitlines()) == 2
    assert str(workdir) in err.splitlines()[1]
    history.load(workdir / "history.nc")
    assert not [path.name for path in workdir.iterdir() if path.name.endswith(".tmp")]
    assert command(workdir, monkeypatch) == 0
    finished[1].check(chaos.Outcome.of(workdir))


def test_a_checkpoint_that_could_not_be_written_in_the_background_is_reported(
    tmp_path, monkeypatch, capfd
):
    """Saving is asynchronous: the disk fills once the call has returned."""
    workdir = tmp_path / "run"
    close = checkpoint.ocp.training.Checkpointer.close

    def fail(self):
        close(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.training.Checkpointer, "close", fail)
        assert command(workdir, patch) == 1
    assert "No space left on device" in capfd.readouterr().err


LIMITED = """
import resource, signal, sys
from ncjax.report import tables
measured = tables.Progress.measured
def limit(self, epoch, nc1):
    measured(self, epoch, nc1)
    if epoch == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
tables.Progress.measured = limit
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 20_000])  # not even a line; not a history, nor a checkpoint
def test_a_real_limit_of_file_sizes_is_one_line_and_leaves_a_workdir_that_continues(
    tmp_path, finished, size
):
    workdir = tmp_path / "run"
    flags = chaos.SMALL
    child = LIMITED.format(size=size) + chaos.CHILD
    # Written without a cache: its files would meet the limit too.
    process = chaos.start(flags, workdir, tmp_path, child, JAX_ENABLE_COMPILATION_CACHE="0")
    _, err = chaos.finish(process, 1)
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 2
    chaos.finish(chaos.start(flags, workdir, tmp_path))
    finished[1].check(chaos.Outcome.of(workdir))


def test_sha256sum_agrees(workdir):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    subprocess.run(
        ["sha256sum", "--check", "--strict", "history.nc.sha256"], cwd=workdir, check=True
    )


def test_a_history_is_loaded_without_its_checksum(workdir):
    whole = history.load(workdir / "history.nc")
    (workdir / "history.nc.sha256").unlink()
    xr.testing.assert_identical(history.load(workdir / "history.nc"), whole)


def test_whichever_write_a_crash_cuts_off_the_history_is_loaded(workdir, monkeypatch):
    path, writes = workdir / "history.nc", []
    whole = history.load(path)
    longer = whole.assign_attrs(longer="yes")
    write = history.write_atomically
    for survived in (0, 1, 2):
        writes.clear()

        def cut(path, content, survived=survived):
            if len(writes) == survived:
                raise KeyboardInterrupt
            writes.append(path.name)
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(history, "write_atomically", cut)
            with pytest.raises(KeyboardInterrupt):
                history.save(longer, path)
        assert ("longer" in history.load(path).attrs) == (survived == 2)
        history.save(whole, path)


METADATA = [
    DEEP,
    b'{"a": ' + b"9" * 5000 + b"}",
    b"1e999",
    b'"text"',
    b'{"train": 3}',
    b'{"init_timestamp_nsecs": "x"}',
    b'{"commit_timestamp_nsecs": 1e999}',
    b'{"custom_metadata": 3, "custom_metadata": 3}',
]


@pytest.mark.parametrize("content", METADATA, ids=lambda content: content[:30].decode())
def test_whatever_metadata_of_a_checkpoint_are_the_one_before_continues(
    workdir, finished, capfd, content
):
    (workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA").write_bytes(content)
    run(workdir)
    err = capfd.readouterr().err
    assert err.startswith(
        f"warning: checkpoint 6 in {workdir} is not used: its metadata cannot be read"
    )
    assert err.count("\n") == 1
    finished[1].check(chaos.Outcome.of(workdir))


_NO_HISTORY = {
    "it lacks nc3:": lambda recorded: recorded.drop_vars("nc3"),
    "its coordinates": lambda recorded: recorded.rename(split="spilt"),
    "its seed is 0 and not 0, 1:": lambda recorded: recorded.isel(seed=[0]),
    "its weight_decay is ": lambda recorded: recorded.assign_coords(
        weight_decay=2 * recorded.weight_decay
    ),
    "its attribute config": lambda recorded: recorded.assign_attrs(config="{"),
}


@pytest.mark.parametrize("way_out", _NO_HISTORY)
def test_a_history_that_is_none_is_refused_even_where_no_checksum_tells(workdir, way_out):
    path = workdir / "history.nc"
    history.save(_NO_HISTORY[way_out](history.load(path)), path)
    with pytest.raises(InputError, match=rf"^history: got '{path}'; {way_out}"):
        run(workdir)


def test_a_history_that_is_replaced_while_it_is_read_is_not_called_damaged(workdir, monkeypatch):
    path, sums = workdir / "history.nc", history._sums
    longer = history.load(path).assign_attrs(longer="yes")

    def replaced(of):  # between the two files
        monkeypatch.setattr(history, "_sums", sums)
        history.save(longer, path)
        history.save(longer, path)  # of the one before not even the sum is left
        return sums(of)

    monkeypatch.setattr(history, "_sums", replaced)
    assert history.load(path).attrs["longer"] == "yes"


def everything(workdir):
    return {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_other_data_are_refused_and_named(workdir, monkeypatch):
    load = preparation.load

    def flipped(settings, given=None):
        dataset = load(settings, given)
        dataset.test.images[0, 0] += 1e-6
        return dataset

    before = everything(workdir)
    monkeypatch.setattr(preparation, "load", flipped)
    with pytest.raises(
        InputError, match=r"^config\.data\.name: got 'synthetic'; .*: test_images differ"
    ):
        run(workdir)
    assert everything(workdir) == before


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_default_prng_impl", "rbg"),
        ("jax_random_seed_offset", 1),
    ],
)
def test_other_random_bits_are_refused_and_named(workdir, monkeypatch, setting, value):
    import jax

    before, usual = everything(workdir), getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        with pytest.raises(
            InputError, match=rf"^--workdir: .*: {setting} is '{value}' here and '{usual}' there"
        ):
            run(workdir)
    finally:
        jax.config.update(setting, usual)
    assert everything(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "jaxlib",
            lambda patch: patch.setattr(provenance, "versions", lambda: {"jaxlib": "0.0.1"}),
        ),
        ("XLA_FLAGS", lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")),
        ("NVIDIA_TF32_OVERRIDE", lambda patch: patch.setenv("NVIDIA_TF32_OVERRIDE", "1")),
        ("device", lambda patch: patch.setattr(provenance, "processor", lambda: "Z80")),
    ],
)
def test_other_arithmetic_continues_and_is_named_once(
    workdir, finished, monkeypatch, capfd, name, change
):
    change(monkeypatch)
    run(workdir)  # nothing is left to train
    assert "warning" not in capfd.readouterr().err
    shutil.rmtree(workdir / "checkpoints" / "6")
    run(workdir)
    err = capfd.readouterr().err
    assert err.startswith(
        f"warning: {workdir} continues to rounding, not to the same bits: {name} is "
    )
    assert err.count("\n") == 1
    finished[1].check(chaos.Outcome.of(workdir))  # JAX had started before the change


# Patterns, URLs, markup, and what TensorStore gives a meaning elsewhere.
NAME = "[a-b] [/x]*?#%20|{}&;'\"$HOME ~é漢"


def test_any_name_of_a_folder_will_do(tmp_path, finished):
    workdir = tmp_path / NAME / NAME
    run(workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    run(workdir)
    finished[1].check(chaos.Outcome.of(workdir))
    loaded = load_run(workdir, weight_decay=1e-2, seed=1)
    assert loaded.epoch == 6
    assert loaded.history["epoch"].values[-1] == 6
    assert show.main([str(workdir)]) == 0


@pytest.mark.parametrize("name", ["a\\b", "logs:", "gs:", "\udce9"])
@pytest.mark.parametrize("parent", [False, True])
def test_names_that_are_other_places_to_orbax_are_refused_before_anything_is_made(
    tmp_path, capfd, name, parent
):
    workdir = tmp_path / name / "run" if parent else tmp_path / name
    assert train.main(["ncjax", f"--workdir={workdir}", *chaos.SMALL]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --workdir: got ")
    assert "choose another" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    workdir.mkdir(parents=True)
    for read in (lambda: holdings.read(workdir, {}), lambda: load_run(workdir)):
        with pytest.raises(InputError, match="for another place"):
            read()


@pytest.mark.parametrize("root", ["/gs", "/s3", "/az", "/hf"])
def test_folders_that_are_buckets_to_orbax_are_refused(root):
    with pytest.raises(InputError, match="for another place"):
        plan.check_path("--workdir", Path(root) / "run")
    plan.check_path("--workdir", Path("/data") / root[1:] / "run")


def test_a_run_whose_lock_was_removed_stops_before_it_writes(
    tmp_path, monkeypatch, finished, capfd
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_epoch(patch, 3, (workdir / ".lock").unlink)
        assert command(workdir, patch) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"error: {workdir / '.lock'} was removed")
    assert len(err.splitlines()) == 2  # the second is the command
    assert history.load(workdir / "history.nc")["epoch"].values.tolist() == [0, 1, 2, 3]
    assert checkpoint.epochs_in(workdir / "checkpoints") == [2]
    run(workdir)
    finished[1].check(chaos.Outcome.of(workdir))


@pytest.fixture
def small_disk(tmp_path):
    """limit(inodes) -> a file system of so many; the same one each time."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def limit(inodes):
        how = "remount,nr_inodes" if os.path.ismount(folder) else "nr_inodes"
        command = ["mount", "-t", "tmpfs", "-o", f"{how}={inodes}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no file system can be mounted here")
        return folder

    yield limit
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
# In each of its three saves, in its folders and its files.
@pytest.mark.parametrize("inodes", [10, 25, 41, 43, 48, 53])
def test_no_inodes_are_one_line_and_an_end_and_it_continues(tmp_path, small_disk, finished, inodes):
    workdir = small_disk(inodes) / "run"
    _, err = chaos.finish(chaos.start(chaos.SMALL, workdir, tmp_path), 1)
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 2
    small_disk(1000)
    chaos.finish(chaos.start(chaos.SMALL, workdir, tmp_path))
    finished[1].check(chaos.Outcome.of(workdir))


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["JAX_DEFAULT_PRNG_IMPL=rbg", "JAX_THREEFRY_PARTITIONABLE=0"])
def test_another_prng_of_the_environment_is_one_line(workdir, tmp_path, variable):
    name, _, value = variable.partition("=")
    _, err = chaos.finish(chaos.start(chaos.SMALL, workdir, tmp_path, **{name: value}), 2)
    assert err.startswith(
        f"error: --workdir: got '{workdir}'; its checkpoints are of other random bits: "
        f"{name.lower()}"
    )
    assert err.count("\n") == 1
