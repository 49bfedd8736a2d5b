"""evaluate on a tiny network against a forward and backward pass written out in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.training import evaluate, layers, models
from ncjax.training.objective import Objective
from tests.helpers import (
    measure_by,
    oracle_bounds,
    oracle_by_class,
    oracle_geometry,
    oracle_nc3_floor,
    oracle_nc4_bounds,
    oracle_row_space_bound,
    oracle_split,
    oracle_symmetric_part,
)

SIZES = {"train": 30, "test": 11}
NAMES = ("layer_1", "layer_2", "head")
SQUARE, CENTERED, CROSS_ENTROPY = (
    Objective(),
    Objective(targets="centered"),
    Objective("cross_entropy"),
)
SCATTER = {"nc1_bound", "nc1_bound_outputs"}
SYMMETRIC = {"predicted_head_norm_sq", "predicted_head_cosine", "symmetric_nc3"}


def make_problem(head_bias):
    """Random layers; the head, half a least-squares fit of the training split and some noise,
    learns its classes.
    """
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": 0.7 * rng.standard_normal(s)}
        for name, s in zip(NAMES, ((6, 8), (8, 7), (7, 3)), strict=True)
    }
    if head_bias != "none":
        params["head"]["bias"] = 0.1 * rng.standard_normal(3)
    splits = {}
    for split, size in SIZES.items():
        labels = rng.permutation(np.arange(size) % 3).astype(np.int32)
        splits[split] = (rng.integers(0, 256, (size, 2, 3)).astype(np.uint8), labels)
    center, scale = rng.uniform(100, 150, (2, 3)), 0.02
    images, labels = splits["train"]
    h = ((images - center) * scale).reshape(-1, 6)
    for name in NAMES[:2]:
        h = np.maximum(h @ params[name]["kernel"], 0)
    fitted = np.linalg.lstsq(h, np.eye(3)[labels], rcond=None)[0]
    params["head"]["kernel"] = 0.5 * fitted + 0.05 * params["head"]["kernel"]
    return params, splits, center, scale, 0.1


def oracle(params, splits, center, scale, weight_decay, head_bias, objective=SQUARE):
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
        y = np.eye(3)[labels] - (1 / 3 if objective.targets == "centered" else 0)
        if objective.loss == "square":
            residual = y - f
            fit = np.sum(residual**2) / (2 * len(x))
        else:
            share = np.exp(f) / np.exp(f).sum(1, keepdims=True)
            residual = y - share
            fit = -np.mean(np.log(share[np.arange(len(x)), labels]))
        metrics = oracle_split(h, f, labels, w[2].T, residual)
        metrics |= oracle_by_class(h, f, labels, w[2].T, residual)
        metrics |= {
            "fit_loss": fit,
            "loss": fit + penalty,
            "accuracy": np.mean(f.argmax(1) == labels),
            **oracle_nc4_bounds(h, f, labels, w[2].T),
            "nc1_row_space_bound": oracle_row_space_bound(h, labels, w[2].T),
        }
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
                + np.sum(residual * (y - bias)) / len(x) / 2
                + bias_penalty
                for k in range(3)
            ]
            predictions = oracle_predictions(h, residual, labels, w, gradients[2].T, weight_decay)
            predictions |= oracle_bounds(h, residual, labels, w[2].T, weight_decay)
    expected = {name: [metrics[name] for metrics in by_split] for name in by_split[0]}
    for name in ("class_mean_cosine", "class_norm_head", "class_cosine_head"):
        expected[name] = by_split[0][name]
    return (
        expected
        | predictions
        | oracle_geometry(w[2].T, "head")
        | {
            "nc0": np.linalg.norm(w[2].T.sum(0)),
            "nc3_floor": oracle_nc3_floor(w[2].T),
            "weight_norm_sq": norms_sq,
            "norm_target": residual_dot_logit / weight_decay if weight_decay else np.nan,
            "equilibrium_residual": [
                np.linalg.norm(weight_decay * a + g) / np.linalg.norm(weight_decay * a)
                if weight_decay
                else np.nan
                for a, g in zip(w, gradients, strict=True)
            ],
            "lemma2_residual": max(abs(loss - r) for r in right) / loss
            if objective.loss == "square"
            else np.nan,
            "finite": 1.0,
        }
    )


def oracle_predictions(h, residual, labels, w, fit_gradient, weight_decay):
    """What theory says of the head, by loops over classes and examples; columns are classes, as
    in docs/theory.md.
    """
    head = w[2].T
    average = np.full((3, 3), 1 / 3)
    means = np.stack([h[labels == c].mean(0) for c in range(3)], axis=1)
    mean_residual = np.stack([residual[labels == c].mean(0) for c in range(3)], axis=1)
    center = means.mean(1)
    within = np.mean(
        [
            np.outer(r - mean_residual[:, c], x - means[:, c])
            for r, x, c in zip(residual, h, labels, strict=True)
        ],
        axis=0,
    )
    t, q, asymmetry = oracle_symmetric_part(mean_residual)
    logits = head @ means
    a, total, _ = oracle_symmetric_part(logits)
    terms = {
        "theorem": t / 3 * (means.T - center),
        "mean": q / 3 * np.outer(np.ones(3), center),
        "asymmetry": asymmetry @ means.T / 3,
        "within": within,
        "gradient": fit_gradient + weight_decay * head,
    }
    whole = weight_decay * head
    undefined = weight_decay == 0
    theorem = (
        np.nan
        if undefined
        else np.mean(np.diag(mean_residual)) / (2 * weight_decay) * (means.T - center)
    )
    exists = not undefined and a * t > 0 and total * q > -0.02 * a * t
    # W W^T of the symmetric solution, and the angle between it and the simplex ETF.
    outer = (
        (a * t * (np.eye(3) - average) + max(total * q, 0) * average) / (3 * weight_decay)
        if exists
        else average * np.nan
    )
    return {
        "class_mean_logits": logits.T,
        "theorem_residual": np.linalg.norm(head - theorem) / np.linalg.norm(head),
        "predicted_head_norm_sq": np.trace(outer),
        "predicted_head_cosine": outer[0, 1] / outer[0, 0],
        "symmetric_nc3": 2 - 2 * np.sqrt(np.sum(outer * (np.eye(3) - average)) / np.trace(outer)),
        "normalized_margin": a / np.prod([np.linalg.norm(matrix) for matrix in w]),
        **{
            f"budget_{n}": np.nan if undefined else np.sum(x * whole) / np.sum(whole**2)
            for n, x in terms.items()
        },
        **{f"budget_{n}_norm": np.linalg.norm(x) for n, x in terms.items()},
        "budget_residual": 0.0,
    }


@functools.cache
def compiled(head_bias, objective, dtype, rows, held, image):
    """One compilation for all tests that read the same batch sizes; `rows` is a global of
    evaluate.
    """
    model = models.MLP(widths=(8, 7), num_classes=3, use_head_bias=head_bias != "none", dtype=dtype)

    structure = layers.find(model, image, head_bias, np.dtype(dtype).name)
    return jax.jit(measure_by(model, structure, head_bias, objective, most_held=held))


def evaluated(
    params,
    splits,
    center,
    scale,
    weight_decay,
    head_bias,
    objective=SQUARE,
    dtype=np.float64,
    held=2**20,
):
    with jax.enable_x64(True):
        train, test = (evaluate.Split(*map(jnp.asarray, split)) for split in splits.values())
        data = evaluate.Data(train, test, jnp.asarray(center, dtype), jnp.asarray(scale, dtype))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        measure = compiled(head_bias, objective, dtype, evaluate._ROWS, held, center.shape)
        return {
            name: np.asarray(v)
            for name, v in measure(params, jnp.asarray(weight_decay, dtype), data).items()
        }


SLOW = pytest.mark.slow
# (rows of a batch, most bytes held, head bias, objective). In batches of at most 8, both splits
# need padding. Features and outputs of the padded test split take 960 bytes, of the other 2,560.
CASES = {
    "one_batch": (256, 2**20, "none", SQUARE),
    "features_held": (8, 2**20, "free", SQUARE),
    "train_recomputed": (8, 1920, "decayed", CENTERED),
    "both_recomputed": (8, 1, "free", CROSS_ENTROPY),
}


@pytest.mark.parametrize(("most_held", "kept"), [(4 * 4 * 10, True), (4 * 4 * 10 - 1, False)])
def test_features_are_kept_if_all_batches_of_them_fit(most_held, kept, monkeypatch):
    monkeypatch.setattr(evaluate, "_ROWS", 2)
    split = evaluate.Split(jnp.ones((4, 10), jnp.float32), jnp.zeros(4, jnp.int32))
    total, held = evaluate._sum_over_batches(
        lambda images, _: (images.sum(), (images,)), split, evaluate.Share(), most_held=most_held
    )
    assert float(total) == 40
    assert [a.shape for a in held] == ([(2, 2, 10)] if kept else [])


def assert_metrics(got, expected, rtol, atol):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("rows", "held", "head_bias", "objective"),
    [
        pytest.param(*case, marks=() if name == "one_batch" else SLOW)
        for name, case in CASES.items()
    ],
    ids=CASES.keys(),
)
def test_every_metric_equals_numpy_however_the_splits_are_batched(
    rows, held, head_bias, objective, monkeypatch
):
    monkeypatch.setattr(evaluate, "_ROWS", rows)
    problem = make_problem(head_bias)
    got = evaluated(*problem, head_bias, objective, held=held)
    expected = oracle(*problem, head_bias, objective)
    assert_metrics(got, expected, rtol=1e-9, atol=1e-12)
    undefined = {name for name, value in got.items() if np.isnan(value).any()}
    # Lemma 2 is of the square loss; centred targets ask for no sum of the outputs, and this head
    # has one.
    expected = {CROSS_ENTROPY: {"lemma2_residual"}, CENTERED: SYMMETRIC, SQUARE: set()}
    assert undefined == expected[objective]


@pytest.mark.slow
def test_float32_runs_are_measured_in_float32_to_four_digits():
    problem = make_problem("none")
    got = evaluated(*problem, "none", dtype=np.float32)
    assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}
    assert_metrics(got, oracle(*problem, "none"), rtol=1e-4, atol=1e-5)


def test_without_decay_only_the_equilibrium_is_undefined():
    params, splits, center, scale, _ = make_problem("none")
    got = evaluated(params, splits, center, scale, 0.0, "none")
    undefined = {name for name, value in got.items() if np.isnan(value).any()}
    terms = {"theorem", "mean", "asymmetry", "within", "gradient"}
    shares = {f"budget_{term}" for term in terms}
    assert (
        undefined
        == {"equilibrium_residual", "norm_target", "theorem_residual", *SCATTER}
        | SYMMETRIC
        | shares
    )
    assert got["budget_residual"] < 1e-12
    np.testing.assert_array_equal(got["loss"], got["fit_loss"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_run_that_is_not_finite_is_nan_in_every_metric_but_finite(bad):
    params, *rest = make_problem("none")
    params["layer_2"]["kernel"][0, 0] = bad
    got = evaluated(params, *rest, "none")
    assert got.pop("finite") == 0
    assert all(np.isnan(value).all() for value in got.values())
