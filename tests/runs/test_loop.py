"""End to end: what a run leaves behind, and that an interrupted run continues to the same bits."""

import json
import signal

import jax
import numpy as np
import pytest
import xarray as xr

from ncjax.cli import train
from ncjax.config import default_config
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.plan import prepare
from ncjax.report import tables
from ncjax.runs import loop, signals
from ncjax.storage.checkpoint import Checkpoints
from ncjax.storage.history import COSINES
from tests.helpers import run, small_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(workdir, figures=True)


def test_workdir_holds_what_the_readme_promises(finished):
    workdir, _ = finished
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 6
    assert {figure.name for figure in (workdir / "figures").glob("*.png")} == {
        "collapse_against_epoch.png",
        "collapse_against_lambda.png",
        "collapse_against_clock.png",
        "equilibrium_against_epoch.png",
        "theory_against_lambda.png",
        "budget_against_epoch.png",
        "bounds_against_lambda_and_epoch.png",
        "modes_against_lambda.png",
        "class_mean_cosines.png",
    }
    assert sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir()) == [4, 6]
    stored = xr.load_dataset(workdir / "history.nc")
    xr.testing.assert_identical(stored, xr.load_dataset(workdir / "history.nc", engine="scipy"))
    assert set(map(str, stored.data_vars)) == {*VOCABULARY, COSINES}
    assert stored["epoch"].values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert stored["nc1"].dims == ("weight_decay", "seed", "epoch", "split")
    assert stored["layer"].values.tolist() == ["layer_1", "layer_2", "head"]
    assert all(stored[name].attrs["definition"] for name in map(str, stored.data_vars))
    assert {"config", "versions", "device", "git_revision"} <= set(stored.attrs)
    assert stored.attrs["per_class"] == "20"
    assert not [path for path in workdir.iterdir() if path.name.endswith(".tmp")]


def test_metrics_are_strict_json_with_one_line_per_measured_epoch(finished):
    workdir, history = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == history["epoch"].values.tolist()
    assert "NaN" not in (workdir / "metrics.jsonl").read_text()
    nc3 = np.array(lines[-1]["metrics"]["nc3"], float).reshape(2, 2, 2)
    np.testing.assert_array_equal(nc3, history["nc3"].isel(epoch=-1).values)


def test_clocks_count_flow_time(finished):
    _, history = finished
    # Three steps an epoch at a cosine rate from 0.1, momentum 0.9.
    expected = 0.1 / (1 - 0.9) * sum(0.5 * (1 + np.cos(np.pi * step / 18)) for step in range(18))
    np.testing.assert_allclose(history["flow_time"].isel(epoch=-1).values, expected)
    np.testing.assert_allclose(
        history["relaxation_time"].isel(epoch=-1, weight_decay=1).values, 0.02 * expected
    )
    assert np.isnan(history["relaxation_time"].isel(weight_decay=0).values).all()


def test_what_no_device_measures_stands_beside_what_one_does(finished):
    _, history = finished
    np.testing.assert_array_equal(
        history["effective_decay"].isel(seed=0, epoch=0).values, [0, 1e-2]
    )
    # The modes of square B: their sum is its trace, W_L M at 1 - epsilon without bias.
    modes, epsilon = (
        history["mode_eigenvalues"].values,
        history["epsilon"].sel(split="train").values,
    )
    assert (np.diff(modes) <= 0).all()
    np.testing.assert_allclose(modes.sum(-1) / 3, 1 - epsilon, rtol=1e-4)
    for name in ("closed_form_epsilon", "closed_form_nc3", "closed_form_norm_sq"):
        assert history[name].isnull().all()  # no unconstrained-feature model


@pytest.mark.slow
def test_decoupled_decay_is_measured_at_the_lambda_that_it_acts_as(tmp_path):
    changes = {
        "train__decay": "decoupled",
        "sweep__momentum": (0.0, 0.75),
        "sweep__seed": 0,
        "train__epochs": 1,
    }
    history = run(tmp_path, **changes).isel(epoch=-1, seed=0)
    np.testing.assert_allclose(history["effective_decay"].values, [[0, 0], [1e-2, 2.5e-3]])
    penalty = (history["loss"] - history["fit_loss"]).sel(split="train").values
    norms = history["weight_norm_sq"].sum("layer").values
    np.testing.assert_allclose(
        penalty, history["effective_decay"].values / 2 * norms, rtol=1e-4, atol=1e-7
    )
    clock = 2 * history["effective_decay"] * history["flow_time"]
    np.testing.assert_allclose(history["relaxation_time"].values[1], clock.values[1])


@pytest.mark.slow
def test_adam_has_no_clock_and_cross_entropy_no_lemma_2(tmp_path, capsys):
    choice = {
        "train__optimizer": "adam",
        "loss": "cross_entropy",
        "sweep__learning_rate": 0.01,
        "sweep__seed": 0,
    }
    history = run(tmp_path, **choice, train__epochs=4)
    assert history["relaxation_time"].isnull().all()
    assert history["flow_time"].isnull().all()
    assert history["lemma2_residual"].isnull().all()
    assert history["budget_residual"].notnull().all()
    assert (
        history["loss"].sel(split="train").isel(epoch=-1)
        < history["loss"].sel(split="train").isel(epoch=0)
    ).all()
    assert "short of equilibrium" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "atol"),
    [("float32", 1e-5), ("float64", 1e-12)],
)
def test_the_budget_and_lemma_2_are_identities_at_every_epoch_of_digits(precision, atol, tmp_path):
    config = default_config()
    config.train.epochs, config.train.precision, config.log.epochs = 3, precision, (0, 1, 2, 3)
    config.sweep.weight_decay, config.checkpoint.every = (0.0, 1e-3), 0
    history = loop.train(prepare(config, tmp_path))
    assert history["epoch"].size == 4
    for name in ("budget_residual", "lemma2_residual"):
        assert float(history[name].max()) < atol, name
    shares = sum(
        history[f"budget_{term}"] for term in ("theorem", "mean", "asymmetry", "within", "gradient")
    )
    np.testing.assert_allclose(shares.sel(weight_decay=1e-3).values, 1, atol=100 * atol)


def test_training_reduces_the_loss_and_seeds_differ(finished):
    _, history = finished
    loss = history["fit_loss"].sel(split="train")
    assert (loss.isel(epoch=-1) < 0.5 * loss.isel(epoch=0)).all()
    assert len(np.unique(loss.isel(epoch=-1).values)) == 4


def test_a_finished_run_says_so_and_stays_as_it_is(finished, capsys):
    workdir, history = finished
    before = (workdir / "history.nc").read_bytes()
    xr.testing.assert_identical(run(workdir), history)
    assert "complete" in capsys.readouterr().out
    assert (workdir / "history.nc").read_bytes() == before


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        3,
        pytest.param(6, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_continues_to_the_same_bits(
    finished, tmp_path, monkeypatch, stop_at, capsys
):
    workdir, _ = finished
    measured = tables.Progress.measured

    def interrupt(self, epoch, nc1):
        measured(self, epoch, nc1)
        if epoch == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables.Progress, "measured", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert (tmp_path / "history.nc").read_bytes() == (workdir / "history.nc").read_bytes()
    epochs = [
        json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert epochs == list(range(7))
    for a, b in zip(final_leaves(tmp_path), final_leaves(workdir), strict=True):
        np.testing.assert_array_equal(a, b)


def final_leaves(workdir):
    plan = prepare(small_config(), workdir)
    sweep = loop.Sweep(plan)
    saved = Checkpoints(workdir / "checkpoints", keep=2)
    try:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(saved.load(6, sweep.shapes))]
    finally:
        saved.close()


def test_interruption_exits_with_130_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(plan):
        raise signals.Stopped(signal.SIGINT)

    monkeypatch.setattr(loop, "train_and_show", interrupted)
    workdir = tmp_path / "run with a space"
    assert train.main(["ncjax", f"--workdir={workdir}"]) == 130
    said, command = capsys.readouterr().err.splitlines()
    assert said == "stopped by SIGINT; this continues:"
    assert command == f"    python -m ncjax.main '--workdir={workdir}'"


@pytest.mark.slow
def test_three_axes_become_three_dimensions_and_padding_is_dropped(tmp_path, capsys):
    history = run(
        tmp_path,
        sweep__weight_decay=(1e-3,),
        sweep__learning_rate=(0.05, 0.1, 0.2),
        sweep__seed=3,
        train__epochs=1,
        units="torch",
    )
    assert dict(history["finite"].sizes) == {
        "weight_decay": 1,
        "learning_rate": 3,
        "seed": 1,
        "epoch": 2,
    }
    np.testing.assert_allclose(history["weight_decay"].values, [1.5e-3])
    np.testing.assert_allclose(history["learning_rate"].values, np.array([0.05, 0.1, 0.2]) * 2 / 3)
    assert history["weight_decay"].attrs["torch_weight_decay"] == [1e-3]
    assert "learning_rate" in capsys.readouterr().out


@pytest.mark.slow
def test_a_diverged_run_is_counted_in_the_table(tmp_path, capsys):
    history = run(
        tmp_path, sweep__learning_rate=(0.1, 1e8), sweep__weight_decay=(1e-3,), train__epochs=3
    )
    assert history["finite"].isel(epoch=-1).values.ravel().tolist() == [1, 1, 0, 0]
    out = capsys.readouterr().out
    assert "2 of 2" in out
    assert "0 of 2" in out


@pytest.mark.slow
def test_float64_and_full_batch_train(tmp_path):
    history = run(tmp_path, train__precision="float64", train__batch_size=0, train__epochs=2)
    assert history["nc1"].dtype == np.float64
    assert float(history["lemma2_residual"].max()) < 1e-12
