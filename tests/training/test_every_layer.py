"""log.layers: what a run then records of its layers, against NumPy on its parameters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax import plan
from ncjax.cli import merge
from ncjax.metrics.vocabulary import LAYER_VOCABULARY, VOCABULARY
from ncjax.storage.history import COSINES
from ncjax.training import evaluate, every_layer, layers, models, wiring
from tests.helpers import measure_by, small_config, whole_checkpoint

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


def oracle_of_features(features, labels, outputs):
    """nc1, cdnv and nc4 from the definitions, by loops."""
    h = np.asarray(features, np.float64)
    classes = range(labels.max() + 1)
    means = np.stack([h[labels == c].mean(0) for c in classes])
    centred = means - means.mean(0)
    deviations = h - means[labels]
    within = deviations.T @ deviations / len(h)
    between = centred.T @ centred / len(means)
    spreads = [np.mean(np.sum(deviations[labels == c] ** 2, 1)) for c in classes]
    pairs = [
        (spreads[a] + spreads[b]) / (2 * np.sum((means[a] - means[b]) ** 2))
        for a, b in itertools.permutations(classes, 2)
    ]
    nearest = [int(np.argmin([np.sum((one - mu) ** 2) for mu in means])) for one in h]
    return {
        "layer_nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-9, hermitian=True))
        / len(means),
        "layer_cdnv": np.mean(pairs),
        "layer_nc4": np.mean(np.array(nearest) != outputs.argmax(1)),
    }


def assert_features(found, states, labels):
    """`found`: metrics of a split; `states`: features after every layer, the outputs last."""
    expected = [oracle_of_features(h, labels, states[-1]) for h in states]
    for name in expected[0]:
        values = [one[name] for one in expected]
        np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=1e-6, err_msg=name)
    h = states[-2].astype(np.float64)
    centred = np.stack([h[labels == c].mean(0) for c in range(labels.max() + 1)])
    centred -= centred.mean(0)
    values = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(found["class_mean_singular_values"], values, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(np.mean(np.sum(h**2, 1)))
    np.testing.assert_allclose(found["mean_feature_norm"], norm, rtol=1e-5)


def test_collapse_after_every_layer_is_what_numpy_computes_from_the_parameters(monkeypatch):
    """In two batches, the second padded with an example that must not count."""
    monkeypatch.setattr(evaluate, "_ROWS", 16)
    rng = np.random.default_rng(0)
    model = models.MLP((6, 5), 3, linear_head_depth=2, use_head_bias=True)
    structure = layers.find(model, (7,), "free", "float32")
    probe = every_layer.Probe(model, structure, wiring.find(model, structure, (7,)))
    params = {
        layer.name: {"kernel": rng.standard_normal(layer.shape).astype(np.float32)}
        for layer in structure.layers
    }
    params["head"]["bias"] = np.array([0.5, -0.5, 0.1], np.float32)
    x = rng.standard_normal((31, 7)).astype(np.float32)
    labels = (np.arange(31) % 3).astype(np.int32)
    split = evaluate.Split(jnp.asarray(x), jnp.asarray(labels))
    data = evaluate.Data(split, split, jnp.zeros(7, jnp.float32), jnp.ones((), jnp.float32))

    measure = jax.jit(measure_by(model, structure, "free", probe=probe))
    with jax.enable_x64(True):
        found = measure(params, jnp.float32(1e-3), data)
    after_first = np.maximum(x @ params["layer_1"]["kernel"], 0)
    after_second = after_first @ params["layer_2"]["kernel"]
    outputs = after_second @ params["head"]["kernel"] + params["head"]["bias"]
    names = ("layer_nc1", "layer_cdnv", "layer_nc4", *every_layer.OF_FEATURES)
    for of_split in range(2):
        of_one = {name: found[name][of_split] for name in names}
        assert_features(of_one, [after_first, after_second, outputs], labels)


CONFIG = {"log.layers": True, "report.enabled": False, "model.linear_head_depth": 2}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("layers") / "run"
    return workdir, ncjax.train(small_config(**CONFIG), workdir)


@pytest.mark.slow
def test_a_run_records_its_layers_and_all_else_as_without(recorded, tmp_path):
    _, history = recorded
    without = ncjax.train(small_config(**CONFIG | {"log.layers": False}), tmp_path / "without")
    assert set(map(str, without.data_vars)) == {*VOCABULARY, COSINES}
    assert set(history.data_vars) - set(without.data_vars) == set(LAYER_VOCABULARY)
    for name in set(without.data_vars) - {"budget_residual", "lemma2_residual"}:
        found, expected = history[name].values, without[name].values
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert "pairs" not in without["layer"].attrs
    assert history["layer"].attrs["pairs"].split() == ["relu", "linear"]
    for name, metric in LAYER_VOCABULARY.items():
        values = history[name].values[np.isfinite(history[name].values)]
        assert values.size
        assert ((values >= metric.least) & (values <= metric.most)).all(), name
    # After the last hidden layer are the features that collapse is measured of.
    for name in ("nc1", "cdnv", "nc4"):
        last = history[f"layer_{name}"].isel(layer=-2, drop=True)
        np.testing.assert_allclose(last.values, history[name].values, rtol=1e-4, atol=1e-7)


FEATURES = (
    "layer_nc1",
    "layer_cdnv",
    "layer_nc4",
    "mean_feature_norm",
    "class_mean_singular_values",
)


@pytest.mark.slow
def test_a_run_records_what_numpy_computes_of_its_checkpoint(recorded):
    workdir, history = recorded
    leaves, names = whole_checkpoint(workdir, 6), history["layer"].values.tolist()
    final = history.isel(epoch=-1)
    data = plan.prepare(small_config(**CONFIG), workdir.with_name("plan")).dataset
    for run, (i, j) in enumerate(np.ndindex(2, 2)):
        one = final.isel(weight_decay=i, seed=j)
        kernels = [leaves[f"{name}.kernel"][run] for name in names]
        for name, expected in oracle_of_weights(kernels, ("relu", "linear")).items():
            np.testing.assert_allclose(one[name], expected, rtol=1e-5, err_msg=name)
        for split in ("train", "test"):
            part = getattr(data, split)
            x = ((part.images - data.center) * data.scale).reshape(len(part.images), -1)
            first = np.maximum(x @ kernels[0], 0)
            states = [first, first @ kernels[1], first @ kernels[1] @ kernels[2]]
            at_split = one.sel(split=split)
            assert_features({name: at_split[name] for name in FEATURES}, states, part.labels)


@pytest.mark.slow
def test_a_resumed_a_grown_and_a_merged_sweep_have_the_layers_of_one_from_the_start(
    recorded, tmp_path
):
    _, whole = recorded
    fields = CONFIG | {"sweep.runs_per_program": 2, "train.schedule_epochs": 6}

    def trained(name, **others):
        changes = {field.replace("__", "."): value for field, value in others.items()}
        return ncjax.train(small_config(**fields | changes), tmp_path / name)

    straight = trained("straight")
    trained("resumed", train__epochs=4)
    trained("grown", sweep__seed=(0,))
    for seed in (0, 1):
        trained(f"part{seed}", sweep__seed=(seed,))
    parts = [str(tmp_path / f"part{seed}") for seed in (0, 1)]
    assert merge.main([*parts, "--out", str(tmp_path / "merged")]) == 0
    for name in ("resumed", "grown", "merged"):
        history = trained(name)
        assert history["layer"].attrs["pairs"] == "relu linear"
        for variable in LAYER_VOCABULARY:
            found, expected = history[variable].values, straight[variable].values
            np.testing.assert_array_equal(found, expected, f"{variable} of {name}")
    for variable in LAYER_VOCABULARY:
        found, expected = straight[variable].values, whole[variable].values
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=variable)


@pytest.mark.slow
def test_devices_that_share_a_run_measure_the_same_layers(tmp_path):
    fields = CONFIG | {"train.precision": "float64", "sweep.seed": (0,), "mesh.run": 1}
    alone, shared = (
        ncjax.train(small_config(**fields | {"mesh.data": data}), tmp_path / f"{data}")
        for data in (1, 2)
    )
    for name in LAYER_VOCABULARY:
        found, expected = shared[name].values, alone[name].values
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_convolutions_with_batch_normalization_are_measured_on_their_maps(tmp_path):
    fields = {
        "data.name": "digits",
        "data.num_classes": 0,
        "data.per_class": 12,
        "model.kind": "conv",
        "model.widths": (3, 4),
        "model.normalization": "batch",
        "model.linear_head_depth": 1,
        "sweep.learning_rate": (0.003,),
        "sweep.seed": (0,),
        "sweep.weight_decay": (1e-2,),
    }
    config = small_config(**CONFIG | fields)
    history = ncjax.train(config, tmp_path / "run")
    assert history["layer"].attrs["pairs"] == "other other"
    assert np.isnan(history["layer_imbalance"].values).all()
    one = history.isel(epoch=-1, seed=0, weight_decay=0)
    run = ncjax.load_run(tmp_path / "run")
    for split in ("train", "test"):
        data = getattr(plan.prepare(config, tmp_path / "plan").dataset, split)
        h, outputs = (np.asarray(a) for a in (run.features(data.images), run.logits(data.images)))
        for name, value in oracle_of_features(h, data.labels, outputs).items():
            found = one[name].sel(split=split)[-2]
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_network_of_the_users_is_measured_after_every_layer(tmp_path):
    fields = {"model.network": "tests.networks:Own", "model.linear_head_depth": 1}
    history = ncjax.train(small_config(**CONFIG | fields), tmp_path / "run")
    assert np.isfinite(history["layer_nc1"].values).all()
    last = history["layer_nc1"].isel(layer=-2, drop=True)
    np.testing.assert_allclose(last.values, history["nc1"].values, rtol=1e-4)


@pytest.mark.slow
def test_linear_pairs_lose_their_imbalance_as_gradient_flow_does_and_relu_pairs_do_not(tmp_path):
    """Full batches in small steps: exp(-2 lambda t) of its start, to the size of a step."""
    fields = {
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
    }
    history = ncjax.train(small_config(**CONFIG | fields), tmp_path / "run")
    assert history["layer"].attrs["pairs"] == "relu linear linear"
    imbalance = history["layer_imbalance"]
    share = (imbalance / imbalance.sel(epoch=0)).transpose("layer", ...)
    law = np.exp(-history["relaxation_time"]).transpose("weight_decay", "seed", "epoch")
    for layer in ("layer_2", "layer_3"):
        one = share.sel(layer=layer, drop=True).transpose(*law.dims)
        np.testing.assert_allclose(one, law, rtol=2e-2)
    relu = share.sel(layer="layer_1", drop=True).transpose(*law.dims).isel(epoch=-1)
    assert (relu > 2 * law.isel(epoch=-1)).all()
