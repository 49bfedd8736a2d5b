"""Variants: each is the run that its config alone would be, and the WORKDIR has them all."""

import json
import re
import shutil

import numpy as np
import pytest
import xarray as xr

import ncjax
from ncjax import config as configuration
from ncjax import variation
from ncjax.cli import merge, plot, show, train
from ncjax.errors import InputError
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.runs import inspect, loop, signals, varied
from ncjax.storage import history
from ncjax.storage import varied as stored
from tests.helpers import ROOT
from tests.runs.test_growth import config_of, count_compiled

ONE = {"train.optimizer": ("sgd",)}


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A finished WORKDIR of one variant, whose runs are those of `trained`; not to be changed."""
    workdir = tmp_path_factory.mktemp("varied")
    shutil.copytree(trained, workdir / "optimizer=sgd")
    config = configuration.from_json((trained / "config.json").read_text())
    made = variation.make(ONE)
    text = json.dumps(variation.to_stored(config, made))
    (workdir / "config.json").write_text(text)
    own = history.load(trained / "history.nc")
    history.save(stored.join([own], made.labels, text), workdir / "history.nc")
    return workdir


@pytest.fixture
def one_variant(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_run_of_a_variant_is_loaded_by_its_labels(one_variant, trained):
    run = ncjax.load_run(one_variant, optimizer="sgd", weight_decay=1e-3, seed=1)
    alone = ncjax.load_run(trained, weight_decay=1e-3, seed=1)
    assert run.coordinates == {"optimizer": "sgd", **alone.coordinates}
    np.testing.assert_array_equal(run.params["head"]["kernel"], alone.params["head"]["kernel"])
    assert run.history["nc1"].identical(alone.history["nc1"])
    with pytest.raises(InputError, match=r"^optimizer: got 'adam'; there are sgd$"):
        ncjax.load_run(one_variant, optimizer="adam", weight_decay=1e-3, seed=1)


def test_show_says_what_every_variant_holds(one_variant, capsys):
    assert show.main([str(one_variant), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vary"] == {"config.train.optimizer": ["sgd"]}
    assert found["history"] == {"sound": True, "problem": None}
    (variant,) = found["variants"]
    assert variant["variant"] == {"optimizer": "sgd"}
    assert (variant["runs"], variant["epochs"]["done"]) == (4, 6)
    assert show.main([str(one_variant)]) == 0
    out = capsys.readouterr().out
    assert "optimizer = sgd" in out
    assert "│       sgd │  0.001 │" in out


def test_show_shows_one_run_of_a_variant_and_exports_it(one_variant, tmp_path, capsys):
    run = "--run=optimizer=sgd,weight_decay=1e-3,seed=0"
    assert show.main([str(one_variant), run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["weight_decay"] == 1e-3
    assert show.main([str(one_variant), run, "--export", str(tmp_path / "a.npz")]) == 0
    assert "head.kernel" in np.load(tmp_path / "a.npz")
    for bad in ("--run=optimizer=adam", "--run=optimizer", "--run=optimizer=sgd,seed=7"):
        assert show.main([str(one_variant), bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_verify_finds_a_history_that_is_not_that_of_its_variants(one_variant, monkeypatch, capsys):
    passed = inspect.Verification(6, 4, 1, 0.0, "nc1", {"seed": 0}, 1.0)
    monkeypatch.setattr(inspect, "verify", lambda *_: passed)
    assert show.main([str(one_variant), "--verify"]) == 0
    joined = history.load(one_variant / "history.nc")
    joined["nc1"][:] += 1
    history.save(joined, one_variant / "history.nc")
    assert show.main([str(one_variant), "--verify"]) == 1
    (one_variant / "history.nc").unlink()
    assert show.main([str(one_variant), "--verify"]) == 1
    capsys.readouterr()
    assert show.main([str(one_variant), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["history"]["sound"]


def test_variants_are_known_by_the_history_where_config_json_is_lost(one_variant, capsys):
    (one_variant / "config.json").unlink()
    assert show.main([str(one_variant), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["variants"]) == 1
    assert ncjax.load_run(one_variant, weight_decay=1e-3, seed=1).epoch == 6


def test_a_variant_that_has_not_begun_is_said(one_variant, capsys):
    shutil.rmtree(one_variant / "optimizer=sgd")
    assert show.main([str(one_variant)]) == 0
    assert "not begun yet" in capsys.readouterr().out


@pytest.mark.slow
def test_plot_draws_a_set_of_every_variant_and_the_comparison(one_variant, tmp_path):
    only = ["--only", "collapse_against_lambda"]
    assert plot.main([str(one_variant), "--out", str(tmp_path / "figures"), *only]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {
        "collapse_against_lambda.png",
        "collapse_against_lambda-optimizer=sgd.png",
    }


def test_merge_names_the_folders_of_variants(one_variant, trained, tmp_path, capsys):
    assert merge.main([str(one_variant), str(trained), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "optimizer=sgd" in message
    assert message.count("\n") == 1


def fake(monkeypatch, seen=None):
    """Makes training a matter of the moment: a history that says of its variant what it was."""

    def record(one, on_measurement=None):
        if seen is not None:
            seen.append(one.workdir.name)
        recorded = xr.load_dataset(fake.path)
        config = configuration.to_json(one.config)
        recorded = recorded.assign_attrs(config=config)
        recorded["nc1"] = recorded["nc1"] * 0 + one.config.train.batch_size
        if on_measurement:
            on_measurement(recorded.isel(epoch=-1))
        history.save(recorded, one.workdir / "history.nc")
        (one.workdir / "config.json").write_text(config)
        return recorded

    monkeypatch.setattr(loop, "train", record)
    monkeypatch.setattr(varied, "make_uncompiled", lambda plan: None)


def test_variants_are_trained_in_order_each_with_its_own_plan(trained, tmp_path, monkeypatch):
    fake.path, seen, measured = trained / "history.nc", [], []
    fake(monkeypatch, seen)
    vary = {"train.batch_size": (8, 16), "loss": ("square", "cross_entropy")}

    def note(one):
        measured.append((one["batch_size"].item(), one["loss_function"].item(), dict(one.sizes)))

    config = config_of((0.0, 1e-3), (0, 1))
    found = ncjax.train(config, tmp_path / "run", vary=vary, on_measurement=note)
    combinations = [(loss, size) for loss in vary["loss"] for size in vary["train.batch_size"]]
    assert seen == [f"loss_function={loss},batch_size={size}" for loss, size in combinations]
    assert [(loss, size) for size, loss, _ in measured] == combinations
    assert all("epoch" not in sizes for *_, sizes in measured)
    assert found["nc1"].dims[:4] == ("loss_function", "batch_size", "weight_decay", "seed")
    for size in vary["train.batch_size"]:
        assert (found["nc1"].sel(batch_size=size) == size).all()
    again = history.load(tmp_path / "run" / "history.nc")
    xr.testing.assert_identical(again["nc1"].drop_attrs(), found["nc1"].drop_attrs())


def test_the_example_of_the_documentation_runs(trained, tmp_path, monkeypatch, capsys):
    fake.path = trained / "history.nc"
    fake(monkeypatch)
    text = (ROOT / "docs" / "library.md").read_text()
    (example,) = [e for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "vary=" in e]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    exec(compile(example.replace("epoch=300", "epoch=6"), "example", "exec"), {"ncjax": ncjax})
    assert "weight_decay" in capsys.readouterr().out
    assert (tmp_path / "runs" / "shapes" / "widths=512-512-512,loss_function=square").is_dir()


def test_more_values_are_added_and_fewer_are_refused(trained, tmp_path, monkeypatch):
    fake.path = trained / "history.nc"
    fake(monkeypatch)
    config, workdir = config_of((0.0, 1e-3), (0, 1)), tmp_path / "run"
    ncjax.train(config, workdir, vary={"train.batch_size": (16,)})
    grown = ncjax.train(config, workdir, vary={"train.batch_size": (8, 16)})
    assert grown["batch_size"].values.tolist() == [8, 16]
    for vary in ({"train.batch_size": (8,)}, {"loss": ("square",)}, None):
        with pytest.raises(InputError, match=r"^--workdir: .*choose another WORKDIR$"):
            ncjax.train(config, workdir, vary=vary)


def test_a_network_that_cannot_be_made_is_refused_before_another_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", pytest.fail)
    vary = {"model.network": ("tests.networks:Own", "tests.networks:Featureless")}
    with pytest.raises(InputError, match=r"variant network=tests\.networks:Featureless\)$"):
        ncjax.train(config_of((0.0,), (0,)), tmp_path / "run", vary=vary)


@pytest.mark.slow
def test_each_variant_is_the_run_that_its_config_alone_would_be(tmp_path, monkeypatch, capsys):
    vary = {"train.optimizer": ("sgd", "adamw")}
    config, workdir = config_of((0.0, 1e-3), (0, 1)), tmp_path / "run"
    joined = ncjax.train(config, workdir, vary=vary)
    for optimizer in vary["train.optimizer"]:
        alone = config_of((0.0, 1e-3), (0, 1), **{"train.optimizer": optimizer})
        expected = ncjax.train(alone, tmp_path / optimizer)
        for name in VOCABULARY:
            found = joined[name].sel(optimizer=optimizer)
            assert found.dtype == expected[name].dtype
            np.testing.assert_array_equal(found.values, expected[name].values, err_msg=name)
    trained = count_compiled(monkeypatch)
    xr.testing.assert_identical(ncjax.train(config, workdir, vary=vary), joined)
    assert trained == []
    grown = ncjax.train(config, workdir, vary={"train.optimizer": ("adam", "sgd", "adamw")})
    assert trained == [4]
    assert grown["optimizer"].values.tolist() == ["adam", "sgd", "adamw"]
    for name in VOCABULARY:
        left = grown[name].sel(optimizer=["sgd", "adamw"])
        np.testing.assert_array_equal(left.values, joined[name].values, err_msg=name)
    assert show.main([str(workdir), "--verify"]) == 0
    # Seeds are added to every variant.
    more = ncjax.train(
        config_of((0.0, 1e-3), (0, 1, 2)),
        workdir,
        vary={"train.optimizer": ("adam", "sgd", "adamw")},
    )
    assert trained[1:] == [2, 2, 2]
    assert more["nc1"].sizes["seed"] == 3
    assert np.isfinite(more["loss"].values).all()
    capsys.readouterr()


@pytest.mark.slow
def test_an_interrupted_variant_continues_where_it_stopped(tmp_path, monkeypatch):
    vary = {"model.widths": ((8, 8), (6, 6, 6))}
    config = config_of((0.0, 1e-3), (0,))
    whole = ncjax.train(config, tmp_path / "whole", vary=vary)

    def stop(one):
        if one["widths"].item() == "6-6-6" and int(one["epoch"]) == 3:
            raise signals.Interrupted(2)

    with pytest.raises(signals.Interrupted):
        ncjax.train(config, tmp_path / "run", vary=vary, on_measurement=stop)
    assert not (tmp_path / "run" / "history.nc").exists()
    seen = []
    found = ncjax.train(
        config,
        tmp_path / "run",
        vary=vary,
        on_measurement=lambda one: seen.append((one["widths"].item(), int(one["epoch"]))),
    )
    assert seen == [("6-6-6", 4), ("6-6-6", 5), ("6-6-6", 6)]
    assert found["layer"].values.tolist() == ["layer_1", "layer_2", "layer_3", "head"]
    for name in VOCABULARY:
        np.testing.assert_array_equal(found[name].values, whole[name].values, err_msg=name)
    lost = found["weight_norm_sq"].sel(widths="8-8", layer="layer_3")
    assert np.isnan(lost.values).all()
    assert np.isfinite(found["weight_norm_sq"].sel(widths="8-8", layer="head").values).all()


@pytest.mark.slow
def test_a_command_line_trains_widths_given_with_semicolons(tmp_path, capsys):
    flags = [
        "--config.data.name=synthetic",
        "--config.data.num_classes=3",
        "--config.data.per_class=20",
        "--config.train.epochs=2",
        "--config.train.batch_size=16",
        "--config.sweep.weight_decay=0,1e-3",
        "--config.sweep.seed=0",
        "--config.model.widths=8,8;6",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert train.main(["ncjax", *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("nothing was trained") == 1
    assert "variant widths=8-8" in out
    assert not (tmp_path / "run").exists()
    assert train.main(["ncjax", *flags]) == 0
    capsys.readouterr()
    found = history.load(tmp_path / "run" / "history.nc")
    assert found["nc1"].sizes["widths"] == 2
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"compare_against_epoch.png", "collapse_against_epoch-widths=6.png"} <= figures
