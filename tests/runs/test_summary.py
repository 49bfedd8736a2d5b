"""What is said before training, the dry run, and the traces and compiled programs a run keeps."""

import gzip
import json
import os
import socket

import jax
import pytest

from ncjax.cli import train
from ncjax.plan import examine, prepare
from ncjax.runs import loop, summary
from ncjax.training import compilation, sweep
from tests.helpers import run, small_config, unmeasured

SMALL = (
    "--config.data.name=synthetic",
    "--config.data.num_classes=3",
    "--config.data.per_class=20",
    "--config.train.batch_size=16",
    "--config.sweep.weight_decay=1e-3",
)
DRY = (*SMALL, "--dry-run")


@unmeasured()
def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tmp_path, capsys):
    flags = ["--config.model.widths=8,6", "--config.sweep.seed=0,1,2"]
    workdir = tmp_path / "run"
    assert (
        train.main(["ncjax", *DRY, *flags, "--config.train.epochs=5", f"--workdir={workdir}"]) == 0
    )
    rows = [line.strip("│ \n").split("│") for line in capsys.readouterr().out.splitlines()]
    said = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
    assert not workdir.exists()
    assert said["weight_decay"] == "0.001"
    assert said["seed"] == "0, 1, 2"
    assert [said[f"{name}.kernel"] for name in ("layer_1", "layer_2", "head")] == [
        "32 x 8",
        "8 x 6",
        "6 x 3",
    ]
    assert said["parameters"] == "322 a run, 966 in all"
    assert said["epochs"] == "5 of 3 steps"
    assert said["measured at"] == "0, 1, 2, 3, 4, 5"
    assert said["mesh"] == "2 x 1 devices (run x data)"
    assert said["programs"] == "3 runs at once (and 1 repeated, to fill the mesh)"
    # Three runs, three steps of 16: 4 x 32 x 8 + 6 (8 x 6 + 6 x 3) each example.
    assert said["FLOPs"].startswith("204 kFLOP an epoch, 1.02 MFLOP to train")
    assert "does not say how much it has" in said["memory"]


@unmeasured()
def test_a_dry_run_needs_no_workdir_and_still_refuses_bad_input(capsys):
    assert train.main(["ncjax", *DRY]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    for flag, message in (
        ("--config.data.per_class=-1", "config.data.per_class: got -1"),
        ("--config.mesh.data=64", "config.mesh.data: got 64; there is no more than 2 cpu devices"),
    ):
        assert train.main(["ncjax", *DRY, flag]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_a_dry_run_of_a_workdir_of_another_config_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"units": "torch"}')
    assert train.main(["ncjax", *DRY, f"--workdir={tmp_path}"]) == 2
    assert "config.units is 'ours' here and 'torch' there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_says_its_plan_before_it_trains_and_where_its_profile_is(tmp_path, capsys):
    folder = tmp_path / "profile"
    run(tmp_path / "run", sweep__runs_per_program=2, profile__dir=str(folder))
    lines = capsys.readouterr().out.splitlines()
    plan = next(i for i, line in enumerate(lines) if line.startswith("compiled in"))
    assert "2 programs of 2 runs, one after another on 2 x 1 devices" in lines[plan]
    assert "a run has 344 parameters and takes" in lines[plan]
    assert plan < next(i for i, line in enumerate(lines) if line.startswith("epoch 0/6"))
    assert lines.count(f"a trace of one epoch is in {folder}") == 1
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 100
    assert list(folder.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("seconds", "epochs", "said"),
    [
        (0.5, 100, "about 50 s of training left"),
        (2.0, 600, "about 20 min"),
        (36.0, 1000, "about 10 h 0 min"),
    ],
)
def test_what_is_left_is_said_in_a_unit_one_can_read(seconds, epochs, said, tmp_path):
    program = sweep.make_program(prepare(small_config(), tmp_path))
    assert summary.remaining(program, seconds, epochs).startswith(said)


@pytest.mark.parametrize("number", ["x", "0", "-1", "100000", "9" * 5000])
def test_devices_that_cannot_be_are_one_line(number, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", number)
    assert train.main(["ncjax", *DRY]) == 2
    assert f"JAX_NUM_CPU_DEVICES: got '{number[:100]}" in capsys.readouterr().err


def test_a_profile_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flag = f"--config.profile.dir={tmp_path / 'file' / 'below'}"
    assert train.main(["ncjax", f"--workdir={tmp_path / 'run'}", *SMALL, flag]) == 2
    assert "config.profile.dir: got" in capsys.readouterr().err


def test_compiled_programs_are_kept_in_the_users_cache_unless_jax_was_told_otherwise(
    tmp_path, monkeypatch, uncached
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.use_cache("off")
    assert jax.config.jax_compilation_cache_dir is None
    compilation.use_cache("user")
    where = jax.config.jax_compilation_cache_dir
    assert where.startswith(str(tmp_path / "ncjax" / "jax"))
    # What compiles in less than a second, too.
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    compilation.use_cache("user")
    assert jax.config.jax_compilation_cache_dir == where


def test_of_compiled_programs_those_used_the_longest_ago_are_removed(
    tmp_path, monkeypatch, uncached
):
    folder = tmp_path / "ncjax" / "jax" / socket.gethostname()
    folder.mkdir(parents=True)
    (folder / "folder").mkdir()
    for age, name in enumerate(("newest", "middle", "folder", "oldest")):
        if name != "folder":
            (folder / name).write_bytes(bytes(10))
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation, "_MOST_CACHED", 20)
    compilation.use_cache("user")
    assert sorted(file.name for file in folder.iterdir()) == ["folder", "middle", "newest"]


def test_preview_of_a_config_that_does_not_fit_the_devices_is_refused(tmp_path):
    plan = examine(small_config(**{"mesh.run": 5}), None)
    with pytest.raises(ValueError, match=r"config\.mesh\.run: got 5"):
        loop.preview(plan)
