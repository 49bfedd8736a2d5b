"""`python -m ncjax show`: what it says is what the files hold; what does not hold is said, with
the right exit code.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xarray as xr

from ncjax import load_run
from ncjax.cli import plot, report, show
from ncjax.config import SWEPT
from ncjax.data import preparation
from ncjax.errors import InputError
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.report.tables import mean_and_sd
from ncjax.runs import inspect
from ncjax.storage import checkpoint, history
from tests.helpers import flip, forge, whole_checkpoint

RUN = "--run=weight_decay=1e-3,seed=0"


@pytest.fixture
def shown(capsys):
    """shown(*arguments) -> (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        code = show.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def bytes_of(folder):
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_ran_and_what_is_in_it_is_said_and_nothing_is_changed(trained, shown):
    before = bytes_of(trained)
    code, out, err = shown(trained)
    assert (code, err) == (0, "")
    assert bytes_of(trained) == before
    assert "4 runs: weight_decay = 0, 0.001; learning_rate = 0.1; " in out
    assert "6 of 6, measured at 0, 1, 2, 3, 4, 5, 6" in out
    assert "its checksum holds" in out
    assert "2 x cpu" in out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line
    ]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["layer_1.kernel"] == ["32 x 8", "float32", "256", "1.02 kB"]
    assert by_name["head.bias"] == ["3", "float32", "3", "12 B"]
    assert by_name["total"][2] == f"{32 * 8 + 8 * 8 + 8 * 3 + 3}"
    assert [row[0] for row in rows].index("layer_2.kernel") < [row[0] for row in rows].index(
        "head.kernel"
    )
    assert by_name["4"][1] == by_name["6"][1] == "hold"
    nc1 = (
        xr.load_dataset(trained / "history.nc")
        .nc1.sel(split="train", epoch=6, weight_decay=1e-3)
        .values
    )
    assert mean_and_sd(nc1) in by_name["0.001"]


def test_json_holds_the_history_at_the_epoch_and_what_the_tables_say(trained, shown):
    recorded = xr.load_dataset(trained / "history.nc")
    for epoch in (6, 3):
        code, out, _ = shown(trained, "--json", f"--epoch={epoch}")
        found = json.loads(out, parse_constant=lambda constant: pytest.fail(constant))
        assert code == 0
        measurements = found["measurements"]
        for name, one in measurements["variables"].items():
            expected = (
                recorded[name].sel(epoch=epoch)
                if "epoch" in recorded[name].dims
                else recorded[name]
            )
            assert one["dims"] == list(expected.dims)
            np.testing.assert_array_equal(np.array(one["values"], float), expected.values)
        kept = {*VOCABULARY} | ({history.COSINES} if epoch == 6 else set())
        assert set(measurements["variables"]) == kept
        assert measurements["coordinates"]["seed"] == [0, 1]
    sweep = json.loads((trained / "config.json").read_text())["sweep"]
    assert found["grid"] == {axis: sweep[axis] for axis in SWEPT}
    assert found["parameter_count"] == 347
    assert [(c["epoch"], c["sound"]) for c in found["checkpoints"]] == [(4, True), (6, True)]
    on_disk = sum(
        p.stat().st_size for p in (trained / "checkpoints" / "6").rglob("*") if p.is_file()
    )
    assert found["checkpoints"][1]["bytes"] == on_disk
    assert found["versions"] == json.loads(recorded.attrs["versions"])


def test_one_run_is_shown_alone(trained, shown):
    code, out, _ = shown(trained, RUN, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["run"]["index"], found["run"]["weight_decay"], found["run"]["seed"]) == (
        2,
        1e-3,
        0,
    )
    recorded = xr.load_dataset(trained / "history.nc").sel(weight_decay=[1e-3], seed=[0], epoch=6)
    np.testing.assert_array_equal(
        found["measurements"]["variables"]["nc3"]["values"], recorded.nc3.values
    )
    _, out, _ = shown(trained, RUN)
    assert "one seed" in out
    assert "index 2 in the grid" in out


def test_damage_is_found_in_the_run_that_has_it_and_earlier_checkpoints_stand_in(copied, shown):
    flip(copied, 6, whole_checkpoint(copied, 6)["layer_1.kernel"][1])
    code, out, _ = shown(copied)
    assert code == 0
    assert "params.layer_1.kernel" in next(
        line for line in out.splitlines() if line.startswith("│ 6")
    )
    assert "hold" in next(line for line in out.splitlines() if line.startswith("│ 4"))
    code, out, _ = shown(copied, RUN, "--json")  # another run
    assert [c["sound"] for c in json.loads(out)["checkpoints"]] == [True, True]
    code, out, _ = shown(copied, "--run=weight_decay=0,seed=1", f"--export={copied / 'w.npz'}")
    assert json.loads(str(np.load(copied / "w.npz")["__metadata__"]))["epoch"] == "4"


@pytest.mark.slow
def test_a_history_without_younger_metrics_is_verified_drawn_and_reported(copied, shown):
    """What the version of then did not measure is not compared; what it did is."""
    path = copied / "history.nc"
    lacking = ["nc0", "nc3_bound", "nc2_bound_etf"]
    history.save(history.read(path).drop_vars(lacking), path)
    code, out, _ = shown(copied, RUN, "--verify", "--json")
    found = json.loads(out)["verification"]
    assert (code, found["passed"], found["problems"]) == (0, True, [])
    assert found["variables"] == len(VOCABULARY) + 1 - 6 - len(lacking)
    assert report.main([str(copied)]) == 0
    assert plot.main([str(copied), "--only", "theory_against_lambda"]) == 0
    recorded = history.read(path)
    history.save(recorded.assign(nc3=recorded["nc3"] * 1.5), path)
    assert shown(copied, RUN, "--verify")[0] == 1


def test_what_was_measured_is_measured_again(trained, shown):
    code, out, _ = shown(trained, "--verify", "--json")
    verification = json.loads(out)["verification"]
    assert code == 0
    assert verification["passed"]
    assert verification["problems"] == []
    assert (verification["epoch"], verification["runs"]) == (6, 4)
    assert verification["deviation"] < 1e-4
    # All but the two clocks, the law of NC0 and the three closed forms, which do not depend on
    # weights.
    assert verification["variables"] == len(VOCABULARY) + 1 - 6
    code, out, _ = shown(trained, "--verify", "--epoch=4", RUN)
    assert code == 0
    assert "variables of 1 run at epoch 4" in out
    assert out.splitlines()[-1].endswith("PASS")


@pytest.mark.slow
def test_a_weight_that_was_changed_and_sealed_fails_the_verification(copied, shown):
    def change(leaf):
        leaf = np.array(leaf)
        leaf[1] *= 1.01 if leaf.shape == (4, 8, 8) else 1
        return leaf

    forge(copied, 6, change)
    code, out, _ = shown(copied, "--json", "--verify")
    found = json.loads(out)
    assert code == 1
    assert all(c["sound"] for c in found["checkpoints"])
    verification = found["verification"]
    assert not verification["passed"]
    assert (verification["coordinates"]["weight_decay"], verification["coordinates"]["seed"]) == (
        0,
        1,
    )
    assert 1e-3 < verification["deviation"] < 1
    assert shown(copied, "--verify", RUN)[0] == 0
    assert shown(copied, "--verify", "--epoch=4")[0] == 0
    assert shown(copied, "--verify", "--run=weight_decay=0,seed=1")[0] == 1


def test_a_history_that_was_changed_and_sealed_fails_the_verification(copied, shown):
    recorded = history.load(copied / "history.nc")
    recorded["nc2_equinorm_head"].loc[{"weight_decay": 1e-3, "seed": 1, "epoch": 6}] *= 1.01
    history.save(recorded, copied / "history.nc")
    code, out, _ = shown(copied, "--verify")
    assert code == 1
    assert "nc2_equinorm_head at weight_decay=0.001" in out.splitlines()[-1]
    assert "; FAIL: nc2_equinorm_head deviates by 0.00" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("found", "recorded", "deviation"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([np.nan, np.inf], [np.nan, np.inf], 0),
        ([1.0], [np.nan], np.inf),
        ([np.nan], [1.0], np.inf),
        ([1.0], [np.inf], np.inf),
        ([0.0, 2.001], [1e-4, 2.0], 1e-4 / (1e-4 + inspect.FLOOR)),
        ([0.0, 2.2], [1e-5, 2.0], 0.2 / (2 + inspect.FLOOR)),
    ],
)
def test_deviations_are_relative_with_a_floor_and_nan_equals_nan_alone(found, recorded, deviation):
    assert inspect.deviation(np.array(found), np.array(recorded)) == pytest.approx(deviation)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.npz"])
def test_exported_weights_come_back_with_what_they_are_of(trained, tmp_path, shown, name):
    code, out, err = shown(trained, RUN, f"--export={tmp_path / name}")
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path / name}" in out
    if name.endswith("npz"):
        tensors = dict(np.load(tmp_path / name))
        metadata = json.loads(str(tensors.pop("__metadata__")))
    else:
        tensors = safetensors.numpy.load_file(tmp_path / name)
        with safetensors.safe_open(tmp_path / name, "numpy") as file:
            metadata = file.metadata()
    whole = whole_checkpoint(trained, 6)
    assert set(tensors) == set(whole)
    for leaf, values in tensors.items():
        np.testing.assert_array_equal(values, whole[leaf][2], strict=True)
    assert json.loads(metadata["config"]) == json.loads((trained / "config.json").read_text())
    assert json.loads(metadata["coordinates"])["weight_decay"] == 1e-3
    assert metadata["epoch"] == "6"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_without_checkpoints_config_and_history_are_still_shown(copied, shown):
    shutil.rmtree(copied / "checkpoints")
    code, out, _ = shown(copied)
    assert code == 0
    assert "no checkpoint yet" in out
    assert "4 runs: weight_decay = 0, 0.001" in out
    assert "Epoch 6" in out
    assert shown(copied, "--verify")[0] == 2
    (copied / "history.nc").unlink()
    code, out, _ = shown(copied)
    assert code == 0
    assert "not there yet" in out
    assert "widths=8,8" in out


def test_a_damaged_or_changed_config_is_named_and_the_checkpoints_own_is_used(copied, shown):
    config = json.loads((copied / "config.json").read_text())
    config["model"]["widths"] = [9, 9]
    (copied / "config.json").write_text(json.dumps(config))
    code, out, _ = shown(copied)
    assert code == 0
    assert "note: config.json is not that of checkpoint 6: config.model.widths is" in out
    for text in ("{", "[1]", '{"train": {}}'):
        (copied / "config.json").write_text(text)
        code, out, _ = shown(copied)
        assert code == 0
        assert "note: config.json is damaged; the config is that of checkpoint 6" in out
        assert "widths=8,8" in out
    shutil.rmtree(copied / "checkpoints")
    (copied / "config.json").unlink()
    _, out, _ = shown(copied)
    assert "note: config.json is missing; the config is that of history.nc" in out


def test_a_damaged_history_is_named_and_fails_the_verification(copied, shown):
    content = bytearray((copied / "history.nc").read_bytes())
    content[-9] ^= 1
    (copied / "history.nc").write_bytes(content)
    code, out, _ = shown(copied)
    assert code == 0
    assert "does not match history.nc.sha256" in out
    assert "Epoch 6" not in out
    code, out, _ = shown(copied, "--verify")
    assert code == 1
    assert "FAIL: history" in out
    (copied / "history.nc.sha256").unlink()
    assert "no checksum lies beside it" in shown(copied)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--epoch=77"],
            "--epoch: got 77; measured were 0, 1, 2, 3, 4, 5, 6; there are checkpoints of 4, 6",
        ),
        (["--run=weight_decay"], "--run: got 'weight_decay'; write NAME=VALUE,..."),
        (["--run=seed=a"], "write NAME=VALUE"),
        (["--run=seed=0,seed=1"], "write NAME=VALUE"),
        (["--run=seed=0"], "weight_decay is missing; name one of 0, 0.001"),
        (["--run=weight_decay=5,seed=0"], "weight_decay: got 5.0; the grid has 0, 0.001"),
        (["--run=colour=5"], "colour: got 5.0; no such axis"),
        (["--export=w.bin"], "--export: got 'w.bin'; its name must end in .safetensors or .npz"),
        (
            ["--export=w.npz"],
            "--run: got ''; --export takes one run: give it one of each weight_decay = 0, 0.001",
        ),
        ([RUN, "--export=w.npz", "--epoch=3"], "there is no checkpoint of epoch 3; there are 4, 6"),
        ([RUN, "--export=no/such/folder/w.npz"], "No such file or directory"),
        (["--verify", "--epoch=3"], "there is no checkpoint of epoch 3; there are 4, 6"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    trained, tmp_path, monkeypatch, shown, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = shown(trained, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_workdir_are_refused(tmp_path, shown):
    code, _, err = shown(tmp_path / "missing")
    assert code == 2
    assert "no such folder" in err
    code, _, err = shown(tmp_path)
    assert code == 2
    assert "neither a config.json nor a checkpoint nor a history" in err


@pytest.fixture
def removing(copied, monkeypatch):
    """The WORKDIR `copied`, whose checkpoint 6 a run removes when it is read to be measured or
    exported.
    """
    read = checkpoint.read_run

    def reading(folder, epoch, run):
        if epoch == 6:
            shutil.rmtree(folder / "6", ignore_errors=True)
        return read(folder, epoch, run)

    monkeypatch.setattr(checkpoint, "read_run", reading)
    return copied


def test_a_checkpoint_removed_while_it_is_verified_gives_way_to_the_newest(removing, shown):
    code, out, err = shown(removing, "--verify", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["verification"]["epoch"] == 4


@pytest.mark.parametrize("flags", [["--verify"], [RUN, "--export=w.npz"]])
def test_a_checkpoint_asked_for_and_removed_is_said_in_one_line(
    removing, shown, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(tmp_path)
    code, out, err = shown(removing, "--epoch=6", *flags)
    assert (code, out) == (2, "")
    assert (
        err
        == "error: epoch: got 6; a training process has removed this checkpoint; name a newer one\n"
    )


def test_a_run_whose_checkpoint_is_removed_is_loaded_from_the_newest(removing):
    assert load_run(removing, weight_decay=0, seed=0).epoch == 4


def test_other_data_are_not_verified_against(copied, shown, monkeypatch):
    load = preparation.load

    def flipped(settings, given=None):
        dataset = load(settings, given)
        dataset.train.labels[0] ^= 1
        return dataset

    monkeypatch.setattr(preparation, "load", flipped)
    code, _, err = shown(copied, "--verify")
    assert code == 2
    assert err.startswith("error: config.data.name: got 'synthetic'; ")
    assert "train_labels differ" in err
    assert err.count("\n") == 1
    run = load_run(copied, weight_decay=0, seed=0)
    with pytest.raises(InputError, match="train_labels differ"):
        run.logits(np.zeros((1, 32)))


DAMAGED_CONFIGS = [
    "[" * 100_000,
    '{"a": ' + "9" * 5000 + "}",
    "1e999",
    {"mesh": [1]},
    {"profile": "x"},
    {"loss": None},
    {"train": {"epochs": 1e400}},
    {"train": {"epochs": [[6]]}},
    {"sweep": {"weight_decay": ["x"]}},
    {"sweep": {"seed": []}},
    {"model": {"widths": 8}},
    {"data": 3},
]


@pytest.mark.parametrize("damage", DAMAGED_CONFIGS, ids=lambda damage: str(damage)[:30])
@pytest.mark.parametrize("alone", [False, True])
def test_whatever_config_json_holds_is_shown_or_refused_in_one_line(copied, shown, damage, alone):
    path = copied / "config.json"
    if isinstance(damage, dict):
        config = json.loads(path.read_text())
        for name, value in damage.items():
            config[name] = config[name] | value if isinstance(value, dict) else value
        damage = json.dumps(config)
    path.write_text(damage)
    if alone:
        shutil.rmtree(copied / "checkpoints")
        (copied / "history.nc").unlink()
    code, out, err = shown(copied)
    assert "Traceback" not in err
    assert code == (2 if alone else 0)
    assert err.count("\n") == (1 if alone else 0)
    assert ("config.json is damaged" in out) != alone


def test_a_report_of_a_run_has_the_checksums_of_its_data(copied):
    assert report.main([str(copied)]) == 0
    text = (copied / "report.html").read_text()
    assert "crc32 of train_images" in text
    assert hashlib.sha256((copied / "history.nc").read_bytes()).hexdigest() in text
