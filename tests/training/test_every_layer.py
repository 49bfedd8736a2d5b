"""log.layers: what a run then records of its layers, against NumPy on its checkpoints."""

import numpy as np
import pytest

import ncjax
from ncjax.metrics.vocabulary import LAYER_VOCABULARY, VOCABULARY
from ncjax.storage.history import COSINES
from ncjax.training import every_layer, layers, models, wiring
from tests.helpers import small_config, whole_checkpoint

WEIGHTS = ("layer_rank", "layer_effective_rank", "layer_condition", "layer_imbalance")


def oracle_of_weights(kernels, pairs):
    """Of one run; `pairs` as the attribute of `layer`."""
    found = {name: np.full(len(kernels), np.nan) for name in WEIGHTS}
    for k, kernel in enumerate(kernels):
        values = np.linalg.svd(kernel.astype(np.float64), compute_uv=False)
        shares = values / values.sum()
        found["layer_rank"][k] = np.sum(values > 0.01 * values[0])
        found["layer_effective_rank"][k] = np.exp(-np.sum(shares * np.log(shares)))
        found["layer_condition"][k] = values[0] / values[-1]
        if k + 1 < len(kernels) and pairs[k] != "other":
            w, above = (a.astype(np.float64).T for a in kernels[k : k + 2])
            found["layer_imbalance"][k] = np.linalg.norm(above.T @ above - w @ w.T)
    return found


def test_weights_of_a_run_that_is_not_finite_are_nan_and_its_neighbours_stay():
    model = models.MLP((5, 4), 3, linear_head_depth=2)
    structure = layers.find(model, (6,), "none", "float32")
    wired = wiring.find(model, structure, (6,))
    rng = np.random.default_rng(0)
    shapes = {layer.name: layer.shape for layer in structure.layers}
    params = {
        name: {"kernel": rng.standard_normal((3, *shape)).astype(np.float32)}
        for name, shape in shapes.items()
    }
    params["layer_2"]["kernel"][1, 0, 0] = np.nan
    finite = np.array([1, 0, 1], np.float32)
    found = every_layer.weight_metrics(params, finite, structure, wired)
    for run in (0, 2):
        kernels = [params[name]["kernel"][run] for name in shapes]
        for name, expected in oracle_of_weights(kernels, ("relu", "linear")).items():
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name][run], expected, rtol=1e-5, err_msg=name)
    assert all(np.isnan(values[1]).all() for values in found.values())


def measured(workdir, **fields):
    return ncjax.train(
        small_config(**{"log.layers": True, "report.enabled": False} | fields), workdir
    )


@pytest.mark.slow
def test_a_run_records_its_layers_and_all_else_as_without(tmp_path):
    fields = {"model.linear_head_depth": 2, "report.enabled": False}
    with_layers = measured(tmp_path / "with", **fields)
    without = ncjax.train(small_config(**fields), tmp_path / "without")
    assert set(map(str, without.data_vars)) == {*VOCABULARY, COSINES}
    assert set(with_layers.data_vars) - set(without.data_vars) == set(LAYER_VOCABULARY)
    for name in without.data_vars:
        np.testing.assert_array_equal(with_layers[name].values, without[name].values)
    assert "pairs" not in without["layer"].attrs
    pairs = with_layers["layer"].attrs["pairs"].split()
    assert pairs == ["relu", "linear"]
    leaves = whole_checkpoint(tmp_path / "with", 6)
    names = with_layers["layer"].values.tolist()
    final = with_layers.isel(epoch=-1).transpose("weight_decay", "seed", ...)
    for run, (i, j) in enumerate(np.ndindex(2, 2)):
        kernels = [leaves[f"{name}.kernel"][run] for name in names]
        for name, expected in oracle_of_weights(kernels, pairs).items():
            np.testing.assert_allclose(final[name].values[i, j], expected, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_linear_pairs_lose_their_imbalance_as_gradient_flow_does_and_relu_pairs_do_not(tmp_path):
    """Full batches in small steps: exp(-2 lambda t) of its start, to the size of a step."""
    history = measured(
        tmp_path / "run",
        **{
            "model.widths": (8, 8, 8),
            "model.linear_head_depth": 3,
            "train.batch_size": 0,
            "train.schedule": "constant",
            "train.epochs": 3000,
            "train.precision": "float64",
            "log.epochs": (0, 500, 3000),
            "checkpoint.every": 0,
            "sweep.learning_rate": (0.03,),
            "sweep.momentum": (0.0,),
            "sweep.weight_decay": (0.02, 0.03),
            "sweep.seed": (0, 1),
        },
    )
    assert history["layer"].attrs["pairs"] == "relu linear linear"
    imbalance = history["layer_imbalance"]
    share = (imbalance / imbalance.sel(epoch=0)).transpose("layer", ...)
    law = np.exp(-history["relaxation_time"]).transpose("weight_decay", "seed", "epoch")
    for layer in ("layer_2", "layer_3"):
        one = share.sel(layer=layer, drop=True).transpose(*law.dims)
        np.testing.assert_allclose(one, law, rtol=2e-2)
    relu = share.sel(layer="layer_1", drop=True).transpose(*law.dims).isel(epoch=-1)
    assert (relu > 2 * law.isel(epoch=-1)).all()
