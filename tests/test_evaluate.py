"""evaluate on a tiny network against a forward and backward pass written out in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import oracle_geometry, oracle_split

from ncjax import evaluate, models

SIZES = {"train": 30, "test": 11}
NAMES = ("layer_1", "layer_2", "head")


def make_problem(head_bias):
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": 0.7 * rng.standard_normal(s)} for name, s in zip(NAMES, ((6, 8), (8, 7), (7, 3)), strict=True)
    }
    if head_bias != "none":
        params["head"]["bias"] = rng.standard_normal(3)
    splits = {}
    for split, size in SIZES.items():
        labels = rng.permutation(np.arange(size) % 3).astype(np.int32)
        splits[split] = (rng.integers(0, 256, (size, 2, 3)).astype(np.uint8), labels)
    return params, splits, rng.uniform(100, 150, (2, 3)), 0.02, 0.1


def oracle(params, splits, center, scale, weight_decay, head_bias):
    """Every metric, by the chain rule written out. Per-split metrics are pairs (train, test)."""
    w = [params[name]["kernel"] for name in NAMES]
    bias = params["head"].get("bias", np.zeros(3))
    norms_sq = np.array([np.sum(a**2) for a in w])
    bias_penalty = weight_decay / 2 * bias @ bias if head_bias == "decayed" else 0.0
    penalty = weight_decay / 2 * norms_sq.sum() + bias_penalty
    by_split = []
    for images, labels in splits.values():
        x = ((images - center) * scale).reshape(len(images), -1)
        z1 = x @ w[0]
        z2 = np.maximum(z1, 0) @ w[1]
        h = np.maximum(z2, 0)
        f = h @ w[2] + bias
        residual = np.eye(3)[labels] - f
        fit = np.sum(residual**2) / (2 * len(x))
        metrics = oracle_split(h, f, labels, w[2].T)
        metrics |= {"fit_loss": fit, "loss": fit + penalty, "accuracy": np.mean(f.argmax(1) == labels)}
        by_split.append(metrics)
        if not by_split[1:]:
            back2 = -(residual @ w[2].T) * (z2 > 0) / len(x)
            back1 = back2 @ w[1].T * (z1 > 0)
            gradients = [x.T @ back1, np.maximum(z1, 0).T @ back2, -h.T @ residual / len(x)]
            residual_dot_logit = np.sum(residual * (f - bias)) / len(x)
            loss = fit + penalty
            right = [
                np.sum(w[k] * gradients[k]) / 2
                + weight_decay / 2 * norms_sq.sum()
                + np.sum(residual * (np.eye(3)[labels] - bias)) / len(x) / 2
                + bias_penalty
                for k in range(3)
            ]
    expected = {name: [metrics[name] for metrics in by_split] for name in by_split[0]}
    expected["class_mean_cosine"] = by_split[0]["class_mean_cosine"]
    return expected | oracle_geometry(w[2].T, "head") | {
        "weight_norm_sq": norms_sq,
        "norm_target": residual_dot_logit / weight_decay if weight_decay else np.nan,
        "equilibrium_residual": [
            np.linalg.norm(weight_decay * a + g) / np.linalg.norm(weight_decay * a) if weight_decay else np.nan
            for a, g in zip(w, gradients, strict=True)
        ],
        "lemma2_residual": max(abs(loss - r) for r in right) / loss,
        "finite": 1.0,
    }  # fmt: skip


@functools.cache
def compiled(head_bias, dtype, rows, held):
    """One compilation for all tests that read the same batch sizes (`rows` and `held` are globals of evaluate)."""
    model = models.HomogeneousMLP(widths=(8, 7), num_classes=3, use_head_bias=head_bias != "none", dtype=dtype)

    def measure(params, weight_decay, data):
        decayed = models.is_decayed(params, head_bias)
        return evaluate.evaluate(params, weight_decay, data, model=model, decayed=decayed)

    return jax.jit(measure)


def evaluated(params, splits, center, scale, weight_decay, head_bias, dtype=np.float64):
    with jax.enable_x64(True):
        train, test = (evaluate.Split(*map(jnp.asarray, split)) for split in splits.values())
        data = evaluate.Data(train, test, jnp.asarray(center, dtype), jnp.asarray(scale, dtype))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        measure = compiled(head_bias, dtype, evaluate._ROWS, evaluate._HELD_ROWS)
        return {name: np.asarray(v) for name, v in measure(params, jnp.asarray(weight_decay, dtype), data).items()}


# (rows of a batch, most rows held, head bias). In batches of at most 8, both splits need padding.
CASES = {
    "one_batch": (256, 2048, "none"),
    "features_held": (8, 2048, "free"),
    "train_recomputed": (8, 20, "decayed"),
    "both_recomputed": (8, 1, "none"),
}


def assert_metrics(got, expected, rtol, atol):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(("rows", "held", "head_bias"), CASES.values(), ids=CASES.keys())
def test_every_metric_equals_numpy_however_the_splits_are_batched(rows, held, head_bias, monkeypatch):
    monkeypatch.setattr(evaluate, "_ROWS", rows)
    monkeypatch.setattr(evaluate, "_HELD_ROWS", held)
    problem = make_problem(head_bias)
    assert_metrics(evaluated(*problem, head_bias), oracle(*problem, head_bias), rtol=1e-9, atol=1e-12)


def test_float32_runs_are_measured_in_float32_to_four_digits():
    problem = make_problem("none")
    got = evaluated(*problem, "none", dtype=np.float32)
    assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}
    assert_metrics(got, oracle(*problem, "none"), rtol=1e-4, atol=1e-5)


def test_without_decay_only_the_equilibrium_is_undefined():
    params, splits, center, scale, _ = make_problem("none")
    got = evaluated(params, splits, center, scale, 0.0, "none")
    undefined = {name for name, value in got.items() if np.isnan(value).any()}
    assert undefined == {"equilibrium_residual", "norm_target"}
    np.testing.assert_array_equal(got["loss"], got["fit_loss"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_run_that_is_not_finite_is_nan_in_every_metric_but_finite(bad):
    params, *rest = make_problem("none")
    params["layer_2"]["kernel"][0, 0] = bad
    got = evaluated(params, *rest, "none")
    assert got.pop("finite") == 0
    assert all(np.isnan(value).all() for value in got.values())
