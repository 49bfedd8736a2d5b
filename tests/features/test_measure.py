"""`ncjax.measure` against explicit float64 NumPy (helpers.oracle_split), invariances, merging,
files, command line.
"""

import importlib
import io
import itertools
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from ncjax.cli import measure as command_line
from ncjax.errors import InputError
from ncjax.features import files, measure, measurement, reference, streaming
from ncjax.metrics import collapse
from ncjax.metrics.statistics import class_statistics
from ncjax.metrics.vocabulary import FEATURE_VOCABULARY, VOCABULARY, Quantities, assemble
from tests.helpers import (
    ROOT,
    oracle_bounds,
    oracle_geometry,
    oracle_nc3_floor,
    oracle_nc4_bounds,
    oracle_row_space_bound,
    oracle_split,
)

DATA = ROOT / "tests" / "data"


def split(num_classes=5, dim=8, per_class=12, seed=0, spread=1.0, dtype=np.float64, sizes=None):
    """(features, labels, head, bias); `sizes`: examples of each class."""
    rng = np.random.default_rng(seed)
    sizes = [per_class] * num_classes if sizes is None else sizes
    labels = rng.permutation(np.repeat(np.arange(num_classes), sizes))
    h = 2 * rng.standard_normal((num_classes, dim))[labels] + spread * rng.standard_normal(
        (len(labels), dim)
    )
    head, bias = rng.standard_normal((num_classes, dim)) / 3, rng.standard_normal(num_classes) / 3
    return h.astype(dtype), labels, head.astype(dtype), bias.astype(dtype)


def outputs_of(h, head, bias):
    h, head, bias = (np.asarray(a, np.float64) for a in (h, head, bias))
    return h @ head.T + bias


def oracle(h, labels, head, bias, outputs=None, residuals=None):
    outputs = outputs_of(h, head, bias) if outputs is None else outputs
    expected = oracle_split(h, outputs, labels, head, residuals) | oracle_geometry(head, "head")
    del expected["class_mean_cosine"]
    return expected | {
        "accuracy": np.mean(outputs.argmax(1) == labels),
        "weight_norm_sq": np.sum(np.float64(head) ** 2),
        "nc3_floor": oracle_nc3_floor(head),
        **oracle_nc4_bounds(h, outputs, labels, head),
        **oracle_of_class_means(h, labels, head),
    }


def oracle_of_class_means(h, labels, head):
    """What is known of class means and head besides, by loops over classes and pairs."""
    h, head = np.float64(h), np.float64(head)
    mu = np.stack([h[labels == c].mean(0) for c in range(len(head))])
    centred = mu - mu.mean(0)
    u = np.stack([row / np.sqrt(row @ row) for row in centred])
    s = np.linalg.svd(centred, compute_uv=False)[: min(len(mu) - 1, h.shape[1])]
    pairs = list(itertools.combinations(range(len(u)), 2))
    logs = [-np.log(np.linalg.norm(u[a] - u[b])) for a, b in pairs]
    cosines = [row @ d / np.linalg.norm(row) for row, d in zip(head, u, strict=True)]
    found = {
        "nc0": np.linalg.norm(sum(head)),
        "mean_feature_norm": np.sqrt(np.mean([x @ x for x in h])),
        "effective_rank": np.exp(-sum(x * np.log(x) for x in s / sum(s))),
        "condition_number": s[0] / s[-1],
        "hyperspherical_uniformity": np.std(logs),
        "uniform_duality": np.std(cosines),
    }
    if len(u) > u.shape[1]:
        found["one_vs_rest_margin"] = oracle_margin(u)
    return found


def oracle_margin(u):
    """The least distance from a hull: SciPy's sequential quadratic programs over its weights."""
    distances = []
    for c in range(len(u)):
        others = np.delete(u, c, axis=0)
        count = len(others)
        found = scipy.optimize.minimize(
            lambda w, others=others, c=c: np.sum((w @ others - u[c]) ** 2),
            np.ones(count) / count,
            method="SLSQP",
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        distances.append(np.sqrt(found.fun))
    return min(distances)


def assert_same(got, expected, rtol, atol=None):
    expected = dict(expected)
    if "one_vs_rest_margin" in expected:  # the oracle is an iteration
        margin = expected.pop("one_vs_rest_margin")
        assert got["one_vs_rest_margin"] == pytest.approx(margin, rel=max(rtol, 1e-5))
    for name, value in expected.items():
        np.testing.assert_allclose(
            got[name], value, rtol=rtol, atol=rtol / 10 if atol is None else atol, err_msg=name
        )


SLOW = pytest.mark.slow
SHAPES = {
    "p_exceeds_C": {},
    "C_exceeds_p": {"num_classes": 9, "dim": 4},
    "two_classes": {"num_classes": 2, "dim": 3},
    "classes_of_many_sizes": {"sizes": [1, 2, 40, 7, 11]},
    "odd_p": {"dim": 13, "per_class": 50},
}


@pytest.mark.filterwarnings("ignore:.*have a single example")
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=() if name in ("p_exceeds_C", "C_exceeds_p") else SLOW)
        for name, shape in SHAPES.items()
    ],
    ids=SHAPES.keys(),
)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [pytest.param(np.float32, 1e-4, marks=SLOW), (np.float64, 1e-10)],
    ids=["float32", "float64"],
)
def test_every_metric_equals_its_definition(shape, dtype, rtol):
    h, labels, head, bias = split(**shape, dtype=dtype)
    expected = oracle(h, labels, head, bias)
    got = measure.measure(h, labels, head=head, bias=bias, rows=16)
    assert got.keys() == expected.keys()
    assert_same(got, expected, rtol)
    # Outputs given are those of the head: the same, by another path.
    assert_same(measure.measure(h, labels, outputs_of(h, head, bias), head=head), expected, rtol)
    no_head = measure.measure(h, labels)
    assert_same(no_head, {name: expected[name] for name in no_head}, rtol)
    assert "nc1" in no_head
    assert "nc4" not in no_head
    assert {*got} <= {*FEATURE_VOCABULARY}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("float64", "rtol"), [(False, 1e-4), (True, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("rows", [64, pytest.param(None, marks=pytest.mark.slow)])
def test_a_common_offset_of_300_costs_no_digits_at_spread_1e_3_about_means_of_norm_5(
    float64, rtol, rows
):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10), 60))
    means = rng.standard_normal((10, 64))
    means *= 5 / np.linalg.norm(means, axis=1, keepdims=True)
    offset = rng.standard_normal(64)
    offset *= 300 / np.linalg.norm(offset)
    h = (means[labels] + offset + 1e-3 * rng.standard_normal((600, 64))).astype(np.float32)
    head = (means + 0.1 * rng.standard_normal(means.shape)).astype(np.float32) / 25
    bias = -head @ offset.astype(np.float32)
    got = measure.measure(h, labels, head=head, bias=bias, float64=float64, rows=rows)
    assert_same(got, oracle(h, labels, head, bias), rtol, atol=1e-12)


@pytest.mark.parametrize("global_mean", ["classes", "examples"])
def test_the_floor_of_nc3_is_one_wherever_the_centre_lies(global_mean):
    """The head is what the class means of imbalanced classes are, up to a common offset: nc3 is
    the floor itself.
    """
    h, labels, _, _ = split(sizes=[3, 2, 40, 7, 11])
    means = np.stack([h[labels == c].mean(0) for c in range(5)])
    weights = np.ones(5) if global_mean == "classes" else np.bincount(labels)
    head = (
        means
        - weights @ means / weights.sum()
        + np.outer(weights / weights.max(), np.arange(8.0)) / 2
    )
    got = measure.measure(h, labels, head=head, global_mean=global_mean)
    assert got["nc3_floor"] == pytest.approx(got["nc3"], rel=1e-9)
    assert got["nc3"] > 0.1
    other = measure.measure(h, labels, head=head[::-1].copy(), global_mean=global_mean)
    assert other["nc3_floor"] < other["nc3"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "given_logits"), [("square", False), ("square", True), ("cross_entropy", False)]
)
def test_bounds_of_a_head_at_a_weight_decay_equal_their_definition(loss, given_logits):
    h, labels, head, bias = split(per_class=20)
    outputs = outputs_of(h, head, bias)
    fitted = softmax(outputs) if loss == "cross_entropy" else outputs
    expected = oracle_bounds(h, np.eye(5)[labels] - fitted, labels, head, 0.02)
    expected["nc1_row_space_bound"] = oracle_row_space_bound(h, labels, head)
    expected |= oracle_nc4_bounds(h, outputs, labels, head)
    logits = outputs if given_logits else None
    bias = None if given_logits else bias
    got = measure.measure(h, labels, logits, head=head, bias=bias, loss=loss, weight_decay=0.02)
    assert_same(got, expected, 1e-9)
    assert got["nc4"] <= got["nc4_bound"] <= got["nc4_bound_nc1"]


def softmax(f):
    e = np.exp(f - f.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("given_logits", [False, True])
def test_cross_entropy_measures_what_softmax_leaves(given_logits):
    h, labels, head, bias = split(sizes=[5, 9, 12, 12, 3])
    f = outputs_of(h, head, bias)
    expected = oracle(h, labels, head, bias, residuals=np.eye(5)[labels] - softmax(f))
    logits, bias = (f, None) if given_logits else (None, bias)
    got = measure.measure(
        h, labels, logits, head=head, bias=bias, loss="cross_entropy", weight_decay=1e-2
    )
    assert_same(got, expected, 1e-10)
    pull = (np.eye(5)[labels] - softmax(f)).T @ h / len(h)
    residual = np.linalg.norm(1e-2 * head - pull) / np.linalg.norm(1e-2 * head)
    assert got["equilibrium_residual"] == pytest.approx(residual, rel=1e-10)
    assert got["norm_target"] == pytest.approx(np.sum(pull * head) / 1e-2, rel=1e-10)


@pytest.mark.slow
def test_a_negative_norm_target_is_noted():
    h, labels, _, _ = split()
    means = np.stack([h[labels == label].mean(0) for label in range(5)])
    for factor, remarks in ((1e-3, 0), (1.0, 1)):
        found = measure.measure_batches([(h, labels)], head=factor * means, weight_decay=1e-2)
        of_target = [note for note in found.notes if note.startswith("norm_target")]
        assert (found.norm_target < 0) == remarks == len(of_target)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        pytest.param({"num_classes": 9, "dim": 4}, marks=SLOW),
        pytest.param({"sizes": [5, 9, 12, 12, 3]}, marks=SLOW),
    ],
)
def test_a_ridge_regression_is_at_equilibrium_and_its_budget_adds_up(shape):
    h, labels, _, bias = split(**shape)
    targets = np.eye(len(bias))[labels] - bias
    head = np.linalg.solve(h.T @ h / len(h) + 1e-2 * np.eye(h.shape[1]), h.T @ targets / len(h)).T
    found = measure.measure_batches([(h, labels)], head=head, bias=bias, weight_decay=1e-2)
    got = found.metrics
    assert got["equilibrium_residual"] < 1e-12
    assert got["norm_target"] == pytest.approx(got["weight_norm_sq"], rel=1e-10)
    if "sizes" in shape:
        assert "budget_theorem" not in got
        assert "same number of examples" in found.notes[0]
        return
    shares = [
        got[f"budget_{term}"] for term in ("theorem", "mean", "asymmetry", "within", "gradient")
    ]
    assert sum(shares) == pytest.approx(1, rel=1e-10)
    assert got["budget_residual"] < 1e-12
    deviation = h - np.stack([h[labels == c].mean(0) for c in range(len(bias))])[labels]
    assert got["budget_within_norm"] == pytest.approx(
        np.linalg.norm(head @ deviation.T @ deviation / len(h)), rel=1e-9
    )
    without = measure.measure_batches([(h, labels)], head=head, bias=bias, weight_decay=0.0)
    assert np.isnan(without.metrics["equilibrium_residual"])


@pytest.mark.filterwarnings("ignore:.*have a single example")
def test_both_conventions_of_the_global_mean():
    h, labels, head, _ = split(sizes=[1, 2, 40, 7, 11])
    mu = np.stack([h[labels == c].mean(0) for c in range(5)])
    within = sum(np.outer(x - mu[c], x - mu[c]) for x, c in zip(h, labels, strict=True)) / len(h)
    for convention, center in (("classes", mu.mean(0)), ("examples", h.mean(0))):
        got = measure.measure(h, labels, head=head, global_mean=convention)
        m_dot = (mu - center).T
        assert got["nc1"] == pytest.approx(
            np.trace(within @ np.linalg.pinv(m_dot @ m_dot.T / 5, rcond=1e-12)) / 5
        )
        assert got["nc1_rank"] == 4
        distance = np.sum((head.T / np.linalg.norm(head) - m_dot / np.linalg.norm(m_dot)) ** 2)
        assert got["nc3"] == pytest.approx(distance, rel=1e-10)


@pytest.mark.slow
def test_classes_without_examples_are_named_and_left_out():
    h, labels, head, bias = split(sizes=[8, 0, 12, 9, 0])
    found = measure.measure_batches([(h, labels)], head=head, bias=bias, weight_decay=1e-2)
    assert found.missing == [1, 4]
    assert found.examples.tolist() == [8, 0, 12, 9, 0]
    present = np.array([0, 2, 3])
    expected = oracle(h, np.searchsorted(present, labels), head[present], bias[present])
    assert_same(found.metrics, expected, 1e-10)
    by_logits = measure.measure(h, labels, outputs_of(h, head, bias))
    assert_same(by_logits, {name: expected[name] for name in by_logits}, 1e-10)


@pytest.mark.slow
def test_many_classes_hold_no_matrix_between_them(monkeypatch):
    h, labels, head, bias = split(num_classes=23, dim=6, per_class=4)
    expected = measure.measure(h, labels, head=head, bias=bias, weight_decay=1e-2)
    monkeypatch.setattr(reference, "MOST_SQUARE", 10)
    monkeypatch.setattr(collapse, "_MOST_PAIRS", 100)
    measurement._metrics_of.clear_cache()
    found = measure.measure_batches([(h, labels)], head=head, bias=bias, weight_decay=1e-2)
    measurement._metrics_of.clear_cache()
    assert_same(found.metrics, {name: expected[name] for name in found.metrics}, 1e-9)
    assert {
        "nc4",
        "output_asymmetry",
        "equilibrium_residual",
        "norm_target",
    } <= found.metrics.keys()
    assert "classes" in found.notes[0]
    for options in ({"logits": outputs_of(h, head, bias)}, {"head": head, "loss": "cross_entropy"}):
        with pytest.raises(InputError, match="beyond 10, give no logits but a head"):
            measure.measure(h, labels, **options)


# Whole heads, every type, every size


def noisy(num_classes, dim, per_class, noise, seed=0):
    """Means M, features M[y] + noise, labels: of what a head M makes many mistakes of."""
    rng = np.random.default_rng(seed)
    means, labels = (
        rng.standard_normal((num_classes, dim)),
        np.repeat(np.arange(num_classes), per_class),
    )
    return (
        means,
        (means[labels] + noise * rng.standard_normal((len(labels), dim))).astype(np.float32),
        labels,
    )


def decided(h, labels, head, bias=0.0):
    """accuracy and nc4 of float64 NumPy."""
    h, outputs = np.float64(h), outputs_of(h, head, bias)
    means = np.stack([h[labels == c].mean(0) for c in range(len(head))])
    nearest = np.argmin([np.sum((h - mean) ** 2, axis=1) for mean in means], axis=0)
    winners = outputs.argmax(1)
    return {"accuracy": np.mean(winners == labels), "nc4": np.mean(winners != nearest)}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dim"), [(jnp.bfloat16, 512), (np.float16, 2048)])
@pytest.mark.parametrize("loss", ["square", "cross_entropy"])
def test_a_head_in_half_precision_counts_whole(dtype, dim, loss):
    means, h, labels = noisy(10, dim, 20, 0.4 * np.sqrt(dim))
    head = means.astype(dtype)
    got = measure.measure(h, labels, head=head, loss=loss)
    expected = decided(h, labels, head)
    assert 0.5 < expected["accuracy"] < 0.95
    assert_same(got, expected, 1e-12)
    basis = np.linalg.svd(np.float64(head), full_matrices=False)[2]
    deviation = (
        np.float64(h) - np.stack([np.float64(h)[labels == c].mean(0) for c in range(10)])[labels]
    )
    assert got["nc1_row_space"] == pytest.approx(
        np.sum((deviation @ basis.T) ** 2) / np.sum(deviation**2), rel=1e-4
    )


def test_a_large_offset_of_all_rows_of_a_head_hides_none_of_its_directions():
    means, h, labels = noisy(500, 16, 3, 0.5)
    head, bias = np.float32(means + 6000), -np.sum(means**2, axis=1) / 2
    got = measure.measure(h, labels, head=head, bias=bias)
    expected = decided(h, labels, head, bias)
    assert 0.5 < expected["accuracy"] < 0.999
    assert_same(got, expected, 0, atol=2 / len(h))
    assert got["nc1_row_space"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("num_classes", "dtype"), [(17, np.float32), (40, np.float64)])
def test_the_first_of_equal_outputs_is_the_prediction(num_classes, dtype):
    h, labels, *_ = split(num_classes, 24, 6, spread=0.1, dtype=dtype)
    logits = np.random.default_rng(1).integers(-1, 2, (len(h), num_classes)).astype(dtype)
    logits[:3] = 0  # all equal, and all equal but for the last
    logits[2, -1] = 1
    winners = logits.argmax(1)
    got = measure.measure(h, labels, logits)
    assert got["accuracy"] == np.mean(winners == labels)
    assert got["nc4"] == np.mean(winners != labels)  # every example is nearest to its own mean


def test_classes_near_each_other_are_told_apart_beside_others_far_away():
    means, h, labels = noisy(4, 8, 50, 0.5)
    apart = np.array([1e6, 1e6, -1e6, -1e6])
    means[:, 0] += apart
    h[:, 0] += apart[labels].astype(np.float32)
    head, bias = (
        means.astype(np.float32),
        -np.sum(np.float32(means).astype(np.float64) ** 2, axis=1) / 2,
    )
    got = measure.measure(h, labels, head=head, bias=bias)
    assert_same(got, decided(h, labels, head, bias), 1e-12)
    assert got["accuracy"] > 0.9


WIDE = {
    ">f8": lambda h: (h + 1e7).astype(">f8"),
    "longdouble": lambda h: (h + 1e7).astype(np.longdouble),
    "int64": lambda h: np.round(1000 * h).astype(np.int64) + 10**10,
    ">i8": lambda h: (np.round(1000 * h).astype(np.int64) + 10**10).astype(">i8"),
    "int32": lambda h: np.round(1000 * h).astype(np.int32) + 10**9,
    "uint32": lambda h: (np.round(1000 * h).astype(np.int64) + 4 * 10**9).astype(np.uint32),
    "uint64": lambda h: (np.round(1000 * h).astype(np.int64) + 10**10).astype(np.uint64),
}


@pytest.mark.parametrize("name", WIDE)
def test_types_that_float32_does_not_hold_are_computed_in_float64(name):
    h, labels, head, bias = split()
    given = WIDE[name](h)
    expected = oracle(given.astype(np.float64), labels, head, bias)
    assert_same(measure.measure(given, labels, head=head, bias=bias), expected, 1e-6, atol=1e-9)
    assert not np.array_equal(np.float32(given), given)  # the premise


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, ">f4", np.int16, np.uint8])
def test_types_that_float32_holds_are_computed_in_float32(dtype):
    h, labels, _, _ = split()
    assert measure.first_pass([((10 + h).astype(dtype), labels)], 5).pivots.dtype == np.float32


def test_arrays_of_a_netcdf_file_of_scipy(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    h, labels, _, _ = split()
    with scipy_io.netcdf_file(tmp_path / "h.nc", "w") as file:
        file.createDimension("n", len(h))
        file.createDimension("p", h.shape[1])
        file.createVariable("features", "d", ("n", "p"))[:] = h + 1e7
        file.createVariable("labels", "i", ("n",))[:] = labels
    with scipy_io.netcdf_file(tmp_path / "h.nc", mmap=False) as file:
        got = measure.measure(file.variables["features"][:], file.variables["labels"][:])
    assert_same(got, measure.measure(h + 1e7, labels), 1e-12)


def test_wide_logits_take_float64_and_types_may_not_widen_on_the_way():
    h, labels, head, bias = split(dtype=np.float32)
    logits = outputs_of(h, head, bias) + 1e9
    expected = np.mean(logits.argmax(1) == labels)
    assert measure.measure(h, labels, logits)["accuracy"] == expected
    with pytest.raises(
        InputError, match="features: got 'float64'; the first batch's fit into float32"
    ):
        measure.measure_batches([(h, labels), (h.astype(np.float64), labels)], num_classes=5)


BY_FEATURES = {"delta": 1, "output_spread": 1, "output_asymmetry": 1, "weight_norm_sq": 0}
BY_FEATURES |= {"nc0": 0, "mean_feature_norm": 1}
BY_HEAD = {"delta": 1, "output_spread": 1, "output_asymmetry": 1, "weight_norm_sq": 2, "nc0": 1}
QUASI = ("epsilon", "sqi_gap")  # of targets and outputs, which grow apart


@pytest.mark.parametrize("exponent", [996, 664, 60, -60, -664, -900])
@pytest.mark.parametrize("scaled", ["features", "head"])
def test_powers_of_two_change_no_digit(exponent, scaled):
    h, labels, head, _ = split(sizes=[5, 9, 12, 12, 3])
    before = measure.measure(h, labels, head=head)
    factor = 2.0**exponent
    batch, kernel = (
        ((h * factor, labels), head) if scaled == "features" else ((h, labels), head * factor)
    )
    found = measure.measure_batches([batch], head=kernel)
    powers = BY_FEATURES if scaled == "features" else BY_HEAD
    for name, value in before.items():
        if name == "output_asymmetry" and exponent < 0:
            # What is left of 1 - f at the rounding of 1.
            continue
        if name in QUASI:
            continue
        with np.errstate(over="ignore", under="ignore"):
            expected = float(np.ldexp(value, exponent * powers.get(name, 0)))
        assert found.metrics[name] == pytest.approx(expected, rel=1e-12, abs=0), name
        if not 1e-300 < abs(expected) < np.inf and value:
            assert any(note.startswith(f"{name} is ") for note in found.notes)
    assert found.metrics["epsilon"] == pytest.approx(
        1 - factor * (1 - before["epsilon"]), rel=1e-12
    )
    np.testing.assert_allclose(
        found.centred * (found.unit / (factor if scaled == "features" else 1)),
        centred_of(h, labels),
        rtol=1e-10,
        atol=1e-12,
    )


def test_every_scale_in_the_vocabulary_is_that_of_its_metric():
    """`measure` in units of powers of two, against the statistics in memory, which know of none."""
    h, labels, head, bias = split(sizes=[5, 9, 12, 12, 3])
    h, head = 3000 * h, head / 700
    found = measure.measure(h, labels, head=head, bias=bias)

    def in_memory(h, labels, head, bias):
        return assemble(Quantities(class_statistics(h, labels, 5, head, bias)))

    with jax.enable_x64(True):
        expected = jax.device_get(jax.jit(in_memory)(h, labels, head, bias))
    expected["nc0"] = np.linalg.norm(head.sum(axis=0))
    expected["mean_feature_norm"] = np.sqrt(np.mean(np.sum(h**2, axis=1)))
    rest = {*found.metrics} - {*expected}
    assert all(FEATURE_VOCABULARY[name].scale == (0, 0, 0) for name in rest)
    assert_same(found, expected, 1e-10)


def centred_of(h, labels):
    means = np.stack([h[labels == c].mean(0) for c in range(labels.max() + 1)])
    return means - means.mean(0)


@pytest.mark.parametrize("factor", [1e-24, 1e-20, 1e20, 1e30])
def test_float32_features_of_any_size_are_measured(factor):
    h, labels, head, _ = split()
    small = np.float32(h * factor)
    assert_same(
        measure.measure(small, labels, head=head),
        {
            name: value
            for name, value in oracle(np.float64(small) / factor, labels, head, np.zeros(5)).items()
            if name not in (*BY_FEATURES, *QUASI)
        },
        1e-4,
    )


@pytest.mark.parametrize(("factor", "dtype"), [(1e-36, np.float32), (1e-300, np.float64)])
def test_features_whose_differences_underflow_are_refused(factor, dtype):
    for float64 in (None, True):
        with pytest.raises(
            InputError, match=r"features: got 'of size .*; their differences underflow"
        ):
            measure.measure((factor * H).astype(dtype), LABELS, float64=float64)


@pytest.mark.parametrize("exponent", [200, -200])
def test_equilibrium_in_other_units(exponent):
    h, labels, head, bias = split()
    before = measure.measure(h, labels, head=head, bias=bias, weight_decay=1e-2)
    s = 2.0**exponent
    after = measure.measure(h * s, labels, head=head / s, bias=bias, weight_decay=1e-2 * s**2)
    powers = {"weight_norm_sq": -2, "norm_target": -2, "predicted_head_norm_sq": -2}
    powers |= {"nc0": -1, "mean_feature_norm": 1}
    powers |= {name: 1 for name in before if name.startswith("budget") and name.endswith("norm")}
    for name, value in before.items():
        assert after[name] == pytest.approx(
            value * s ** powers.get(name, 0), rel=1e-9, nan_ok=True
        ), name


def test_what_leaves_float64_is_refused():
    with pytest.raises(
        InputError, match=r"weight_decay: got 0\.01; its equilibrium leaves float64"
    ):
        measure.measure(H * 1e200, LABELS, head=HEAD, weight_decay=1e-2)
    with pytest.raises(InputError, match="outputs: got 'up to 2"):
        measure.measure(H, LABELS, head=HEAD * 1e305, loss="cross_entropy")
    with pytest.raises(
        InputError, match="features: got 'a number that is not finite, or too large"
    ):
        measure.measure(H * 2.5e307, LABELS)


# Batches that differ between the passes


class Twice:
    """Batches of the first iteration, then others."""

    def __init__(self, first, then):
        self.iterations = iter([first, then])

    def __iter__(self):
        return iter(next(self.iterations))


def differing():
    h, labels, head, bias = split(per_class=120, dtype=np.float32)
    logits = outputs_of(h, head, bias).astype(np.float32)
    rng = np.random.default_rng(1)
    blurred, spoilt = h + np.float32(0.3) * rng.standard_normal(h.shape, np.float32), h.copy()
    spoilt[7, 3] = np.nan
    swapped = labels.copy()
    a, b = np.flatnonzero(labels == 0)[0], np.flatnonzero(labels == 1)[0]
    swapped[[a, b]] = swapped[[b, a]]
    return {
        "augmented": ([(h, labels)], [(blurred, labels)]),
        "other labels": ([(h, labels)], [(h, swapped)]),
        "not finite": ([(h, labels)], [(spoilt, labels)]),
        "fewer": ([(h, labels)], [(h[:-1], labels[:-1])]),
        "none": ([(h, labels)], []),
        "other logits": (
            [(h, labels, logits)],
            [(h, labels, logits * (rng.random(logits.shape) < 0.9))],
        ),
        "no logits": ([(h, labels, logits)], [(h, labels)]),
        "an unknown class": ([(h[labels < 4], labels[labels < 4])], [(h, labels)]),
    }


@pytest.mark.parametrize("case", differing())
def test_batches_that_differ_between_the_passes_are_refused(case):
    with pytest.raises(
        InputError, match=r"(batches|labels|logits): got .* both passes must see the same examples"
    ):
        measure.measure_batches(Twice(*differing()[case]), num_classes=5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, pytest.param(jnp.bfloat16, marks=SLOW)])
def test_the_same_examples_in_other_batches_are_not(offset, dtype):
    h, labels, head, bias = split(per_class=120)
    h = (h + offset).astype(dtype)
    order = np.random.default_rng(1).permutation(len(h))
    # A model on an accelerator gives the same features to a few units in the last place of float32.
    again = (
        h
        if dtype == jnp.bfloat16
        else (h * (1 + 2.0**-22 * np.random.default_rng(2).standard_normal(h.shape)))
    )
    again = again.astype(dtype)
    shuffled = [(again[part], labels[part]) for part in np.split(order, [100, 300])]
    found = measure.measure_batches(
        Twice([(h, labels)], shuffled), num_classes=5, head=head, bias=bias
    )
    assert_same(found.metrics, measure.measure(h, labels, head=head, bias=bias), 1e-2, atol=1e-2)


@pytest.mark.slow
def test_equal_numbers_that_all_round_the_same_way_cost_no_digits():
    """Half a million times 0.1, added up one by one in float32, is off by 1%."""
    labels = np.repeat(np.arange(2), 600_000)
    ones = np.random.default_rng(0).random((len(labels), 2)) < np.array([0.3, 0.7])[labels][:, None]
    h = np.where(ones, np.float32(0.1), np.float32(0))
    shares = np.stack([ones[labels == c].mean(0) for c in (0, 1)])
    within, between = (
        np.mean(np.sum(shares * (1 - shares), axis=1)),
        np.sum((shares - shares.mean(0)) ** 2) / 2,
    )
    assert measure.measure(h, labels)["nc1_trace_ratio"] == pytest.approx(
        within / between, rel=1e-4
    )


def test_parts_are_compared_as_a_whole(tmp_path):
    h, labels, _, _ = split(per_class=40, dtype=np.float32)
    halves = [(h[:99], labels[:99]), (h[99:], labels[99:])]
    for i, half in enumerate(halves):
        measure.save(measure.first_pass([half], 5), tmp_path / f"sums{i}.npz")
    reference = measure.prepare(
        measure.merge(*(measure.load(tmp_path / f"sums{i}.npz") for i in (0, 1)))
    )
    noise = np.random.default_rng(0).standard_normal(halves[1][0].shape).astype(np.float32)
    others = measure.second_pass([(halves[1][0] + noise, halves[1][1])], reference)
    for i, half in enumerate(halves):
        measure.save(measure.second_pass([half], reference), tmp_path / f"deviations{i}.npz")
    first, second = (measure.load(tmp_path / f"deviations{i}.npz") for i in (0, 1))
    assert_same(
        measure.find(reference, measure.merge(first, second)).metrics,
        measure.measure(h, labels),
        1e-5,
    )
    with pytest.raises(InputError, match="batches: got 'other examples of class"):
        measure.find(reference, measure.merge(first, others))


# What would mislead


def noted(h, labels, *parts, **options):
    """The metrics, after all parts were found in one note each."""
    found = measure.measure_batches([(h, labels)], **options)
    notes = found.cautions + found.notes
    for part in parts:
        assert sum(part in note for note in notes) == 1, (part, notes)
    return found.metrics


def test_numbers_that_would_mislead_are_noted():
    means = np.random.default_rng(0).standard_normal((5, 8))
    alone, labels = np.arange(5), np.repeat(np.arange(5), 12)
    assert noted(means, alone, "every class has a single example")["nc1"] == 0
    assert noted(means[labels], labels, "equal to the last bit")["nc1"] == 0
    h, few, head, _ = split(sizes=[1, 9, 12, 1, 3])
    assert noted(h, few, "2 of 5 classes have a single example")["nc1"] > 0
    tight = np.float32(100 + means)[labels] * (
        1 + np.float32(2.0**-24) * (np.arange(60) % 2)[:, None]
    )
    assert noted(np.float32(tight), labels, "no larger than the rounding")["nc1"] < 1e-9
    constant = noted(
        np.ones((60, 8)), labels, "all class means are the same", "undefined (NaN): ", head=head
    )
    assert np.isnan([constant["nc1"], constant["cdnv"], constant["nc3"]]).all()
    mirrored = (
        np.concatenate([means[:2], -means[:2], np.zeros((1, 8))])[labels]
        + np.tile([1e-3, -1e-3], 30)[:, None]
    )
    noted(mirrored, labels, "the mean of class 4 is the global mean")
    h, full, head, _ = split()
    h = h[np.argsort(full, kind="stable")]
    h[12:24] = h[:12][::-1]
    for dtype in (np.float32, np.float64):
        assert (
            noted(h.astype(dtype), labels, "the means of classes 0 and 1 are the same")["cdnv"]
            > 1e10
        )
    head[2] = 0
    noted(h, labels, "the head's row of class 2 is 0", "undefined (NaN): ", head=head)
    noted(h, labels, "the head is 0", head=0 * head)
    noted(h, labels, "weight_decay is 0", "undefined (NaN): ", head=head, weight_decay=0.0)
    sound = measure.measure_batches([split()[:2]])
    assert sound.cautions + sound.notes == []


def test_a_dictionary_of_numbers_warns():
    with pytest.warns(UserWarning, match="every class has a single example"):
        assert measure.measure(np.eye(3), np.arange(3))["cdnv"] == 0


INVARIANT = settings(max_examples=4, deadline=None)


@INVARIANT
@given(seed=st.integers(0, 2**16), scale=st.floats(-300, 300))
def test_order_labels_shift_and_rotation_change_no_invariant(seed, scale):
    h, labels, head, bias = split(seed=seed, sizes=[5, 9, 12, 12, 3])
    before = measure.measure(h, labels, head=head, bias=bias)
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(len(h)), rng.permutation(5)
    rotation, shift = np.linalg.qr(rng.standard_normal((8, 8)))[0], scale * rng.standard_normal(8)
    by_name = np.argsort(names)
    changed = {
        "order": measure.measure(h[order], labels[order], head=head, bias=bias),
        "names": measure.measure(h, names[labels], head=head[by_name], bias=bias[by_name]),
        "shift": measure.measure(h + shift, labels, head=head, bias=bias - head @ shift),
        "rotation": measure.measure(h @ rotation, labels, head=head @ rotation, bias=bias),
    }
    for what, after in changed.items():
        moved = {"mean_feature_norm"} if what == "shift" else set()
        for name in before.keys() - moved:
            assert after[name] == pytest.approx(before[name], rel=1e-8, abs=1e-9), (what, name)


# Parts


def passes(parts, num_classes, **about):
    sums = measure.merge(*(measure.first_pass([part], num_classes) for part in parts))
    reference = measure.prepare(sums, **about)
    return measure.find(
        reference, measure.merge(*(measure.second_pass([part], reference) for part in parts))
    )


@pytest.mark.slow
@INVARIANT
# Every length is a compilation.
@given(seed=st.integers(0, 2**16), cuts=st.tuples(*[st.sampled_from([0, 7, 20, 41])] * 2))
def test_parts_merge_to_the_whole_in_any_grouping(seed, cuts):
    h, labels, head, bias = split(seed=seed, sizes=[5, 9, 12, 12, 3])
    edges = [0, *sorted(cuts), 41]
    parts = [(h[i:j], labels[i:j]) for i, j in itertools.pairwise(edges) if i < j]
    about = {"head": head, "bias": bias, "weight_decay": 1e-2}
    assert_same(passes(parts, 5, **about).metrics, passes([(h, labels)], 5, **about).metrics, 1e-9)
    a, b, c = (measure.first_pass([(h[i::3] + 1e3, labels[i::3])], 5) for i in range(3))
    for x, y in zip(
        measure.merge(measure.merge(a, b), c), measure.merge(a, measure.merge(b, c)), strict=True
    ):
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_one_device_and_two_give_the_same():
    h, labels, head, bias = split(per_class=300, dtype=np.float32)
    assert jax.device_count() == 2
    one, two = (
        measure.measure(
            h, labels, head=head, bias=bias, weight_decay=1e-2, rows=128, devices=jax.devices()[:n]
        )
        for n in (1, 2)
    )
    assert_same(two, one, 1e-6)


@pytest.mark.slow
def test_two_processes_with_a_half_each_give_the_same(tmp_path):
    h, labels, head, _ = split(per_class=20, dtype=np.float32)
    np.savez(tmp_path / "all.npz", features=h, labels=labels, head=head)
    code = """if 1:
        import sys, time, pathlib, numpy as np
        from ncjax.features import measure
        folder, me = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        a = np.load(folder / "all.npz")
        mine = [(a["features"][me::2], a["labels"][me::2])]
        def exchanged(statistics, name):
            measure.save(statistics, folder / f"{name}{me}.npz")
            while not (folder / f"{name}{1 - me}.npz").exists():
                time.sleep(0.02)
            return measure.merge(*(measure.load(folder / f"{name}{i}.npz") for i in (0, 1)))
        reference = measure.prepare(exchanged(measure.first_pass(mine, 5), "sums"), head=a["head"])
        deviations = measure.second_pass(mine, reference)
        found = measure.find(reference, exchanged(deviations, "deviations"))
        print(found.metrics)
    """
    call = [sys.executable, "-c", code, str(tmp_path)]
    both = [
        subprocess.Popen([*call, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    assert_same(eval(printed[0]), measure.measure(h, labels, head=head), 1e-6)


def test_statistics_are_read_back_as_they_were_and_nothing_else_is(tmp_path):
    h, labels, head, _ = split()
    sums = measure.first_pass([(h, labels, outputs_of(h, head, np.zeros(5)))], 5)
    measure.save(sums, tmp_path / "s.npz")
    for x, y in zip(measure.load(tmp_path / "s.npz"), sums, strict=True):
        np.testing.assert_array_equal(x, y)
    (tmp_path / "s.npz").write_bytes(b"")
    for path in (tmp_path / "s.npz", DATA / "head.npz", tmp_path / "none.npz"):
        with pytest.raises(InputError, match=r"no file of ncjax\.features\.measure\.save"):
            measure.load(path)
    with pytest.raises(InputError, match=r"merge: got \(5, 3\); the other statistics have"):
        measure.merge(sums, measure.first_pass([(h[:, :3], labels)], 5))
    reference = measure.prepare(measure.first_pass([(h, labels)], 5))
    deviations = measure.second_pass([(h[:9], labels[:9])], reference)
    with pytest.raises(InputError, match=r"batches: got .* the first pass saw 12"):
        measure.find(reference, deviations)


# What comes in


@pytest.mark.slow
def test_batches_of_any_size_and_arrays_of_any_kind_give_the_same():
    h, labels, head, bias = split(per_class=60)
    h = h.astype(np.float32)
    expected = measure.measure(h, labels, head=head, bias=bias)
    edges = [0, 1, 33, 65, 300]
    cut = [(h[i:j], labels[i:j]) for i, j in itertools.pairwise(edges)]

    class Loader:
        def __iter__(self):
            return iter(cut)

    assert_same(measure.measure_batches(Loader(), head=head, bias=bias).metrics, expected, 1e-5)
    unaligned = np.frombuffer(b"x" + h.tobytes(), np.float32, offset=1).reshape(h.shape)
    shifted = np.frombuffer(b"1234" + h.tobytes(), np.float32, offset=4).reshape(h.shape)
    same = (
        np.asfortranarray(h),
        h.astype(">f4"),
        jnp.asarray(h),
        unaligned,
        shifted,
        h.astype(np.float64),
        h.tolist(),
    )
    for array in same:
        assert_same(
            measure.measure(array, labels.astype(np.uint8), head=head, bias=bias, rows=64),
            expected,
            1e-5,
        )
    for dtype in (np.float16, jnp.bfloat16, np.int8):
        rounded = (10 * h).astype(dtype)
        exact = measure.measure(rounded.astype(np.float64), labels, head=head, bias=bias)
        assert_same(measure.measure(rounded, labels, head=head, bias=bias), exact, 1e-4)


def test_a_large_array_is_read_where_it_lies():
    h = np.zeros((4096, 64), np.float32)
    part = slice(512, 1024)
    view, skipped = streaming._aligned(h, part)
    assert view is not None
    assert np.shares_memory(view, h)
    assert view.ctypes.data % 64 == 0
    assert len(view) - skipped == 512 * 64


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 70_000),
    st.sampled_from([1, 3, 512]),
    st.sampled_from([None, 1, 100, 300, 5000]),
    st.integers(1, 3),
    st.integers(0, 17),
    st.booleans(),
)
def test_chunks_hold_every_row_once(size, dim, rows, devices, skipped, with_logits):
    # Unread.
    memory = np.lib.stride_tricks.as_strided(
        np.zeros(32, np.float32)[skipped:], (size, dim), (4 * dim, 4)
    )
    logits = np.empty((size, 40)) if with_logits else None
    chunks = list(streaming._cut(memory, logits, rows, devices))
    held = np.zeros(size, int)
    for fresh, length in chunks:
        held[fresh] += 1
        assert (
            0 < fresh.stop - fresh.start <= length <= (rows or max(streaming._IN_PLACE // dim, 256))
        )
    assert (held == 1).all()
    assert len({length for _, length in chunks}) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 4])
def test_a_large_array_is_measured_as_a_small_one_is(offset, monkeypatch):
    h, labels, head, bias = split(per_class=1000, dtype=np.float32)
    expected = measure.measure(h, labels, head=head, bias=bias)
    monkeypatch.setattr(streaming, "_COPIED", 256 * h.shape[1])
    bytes_of = bytearray(h.nbytes + 64 + offset)
    begin = -np.frombuffer(bytes_of, np.uint8).ctypes.data % 64 + offset
    placed = np.frombuffer(bytes_of, np.float32, h.size, begin).reshape(h.shape)
    placed[:] = h
    chunks = list(streaming._cut(placed, None, None, 2))
    assert len(chunks) == 4 + (offset > 0)
    assert_same(
        measure.measure(placed, labels, head=head, bias=bias, devices=jax.devices()[:2]),
        expected,
        1e-5,
    )


def test_memory_that_its_owner_uses_again_is_read_in_time():
    h, labels, _, _ = split(per_class=400, dtype=np.float32)
    buffer = np.empty((500, 8), np.float32)

    class Loader:
        def __iter__(self):
            for i in range(0, len(h), 500):
                buffer[:] = h[i : i + 500]
                yield buffer, labels[i : i + 500]

    got = measure.measure_batches(Loader(), num_classes=5, rows=100).metrics
    assert_same(got, measure.measure(h, labels), 1e-5)


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    h, labels, head, bias = split(dtype=np.float32)
    tensors = [
        torch.from_numpy(a.copy()).requires_grad_(a.dtype == np.float32)
        for a in (h, labels, head, bias)
    ]
    got = measure.measure(tensors[0], tensors[1], head=tensors[2], bias=tensors[3])
    assert got == measure.measure(h, labels, head=head, bias=bias)
    got = measure.measure(tensors[0].bfloat16(), tensors[1])
    rounded = np.asarray(jnp.asarray(h, jnp.bfloat16).astype(jnp.float32))
    assert_same(got, measure.measure(rounded, labels), 1e-6)


H, LABELS, HEAD, BIAS = split()
BAD = {
    "features: got (60,)": {"features": H[:, 0]},
    "features: got (60, 0)": {"features": H[:, :0]},
    "features: got '<U1'": {"features": np.full((60, 8), "a")},
    "features: got 'bool'": {"features": H > 0},
    "features: got 'a number that is not finite": {
        "features": np.where(
            (np.arange(60) == np.flatnonzero(LABELS == 3)[1])[:, None] & (np.arange(8) == 2),
            np.nan,
            H,
        )
    },
    "labels: got (59,)": {"labels": LABELS[:-1]},
    "labels: got 'float64'; give integers": {"labels": LABELS * 1.0},
    "labels: got 5; with 5 classes they are 0 to 4": {"labels": LABELS + 1},
    "labels: got 'examples of 1 class'": {"labels": np.zeros(60, int)},
    "batches: got 'no example'": {"features": H[:0], "labels": LABELS[:0]},
    "head: got (5, 3)": {"head": HEAD[:, :3]},
    "head: got 'a number that is not finite'": {"head": HEAD * np.inf},
    "head: got (8, 5); give (C, 8), a row per class, its transpose": {
        "head": HEAD.T,
        "num_classes": 5,
    },
    "labels: got -1; they count classes from 0 on": {"labels": LABELS - 1},
    "labels: got 4000000000; number classes from 0 on": {
        "labels": LABELS * 10**9,
        "head": None,
        "bias": None,
    },
    "bias: got (4,)": {"bias": BIAS[:4]},
    "bias: got (5,); it goes with a head": {"head": None, "num_classes": 5},
    "logits: got (60, 4)": {"logits": np.zeros((60, 4))},
    "loss: got 'hinge'; choose square or cross_entropy": {"loss": "hinge"},
    "global_mean: got 'mean'; choose classes or examples": {"global_mean": "mean"},
    "weight_decay: got -1.0": {"weight_decay": -1.0},
    "weight_decay: got 0.1; what it is compared with": {
        "weight_decay": 0.1,
        "head": None,
        "bias": None,
    },
    "rows: got 0": {"rows": 0},
    "features: got (); give (B, p)": {"features": np.float64(1)},
    "features: got 'list'; no array": {"features": [[1.0, 2.0], [3.0]]},
    "features: got 'object'; give an array of numbers": {
        "features": object(),
        "head": None,
        "bias": None,
    },
    "features: got 'function'": {"features": outputs_of, "labels": [(H, LABELS)]},
    "features: got 'a masked array'": {"features": np.ma.masked_less(H, -1.0)},
    "labels: got 'a masked array'": {"labels": np.ma.masked_equal(LABELS, 3)},
    f"features: got {2**60}; float64 holds": {"features": np.full(H.shape, 2**60)},
    f"features: got {2**63}; float64 holds": {"features": np.full(H.shape, 2**63, np.uint64)},
    f"head: got {2**53 + 1}; float64 holds": {
        "head": np.full(HEAD.shape, -(2**53) - 1),
        "bias": None,
    },
    "labels: got ()": {"labels": np.int64(1)},
    "logits: got ()": {"logits": np.float64(1)},
    "head: got ()": {"head": np.float64(1), "bias": None},
    "head: got 'function'": {"head": outputs_of, "bias": None},
    "bias: got ()": {"bias": np.float64(1)},
    "bias: got 'a number that is not finite'": {"bias": BIAS * np.nan},
    "num_classes: got 1000000000000; ": {"num_classes": 10**12, "head": None, "bias": None},
    "num_classes: got 0; give an integer from 1 on": {"num_classes": 0, "head": None, "bias": None},
    "num_classes: got True": {"num_classes": True, "head": None, "bias": None},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_with_the_way_out(message):
    arguments = {"features": H, "labels": LABELS, "head": HEAD, "bias": BIAS} | BAD[message]
    with pytest.raises(InputError, match=re.escape(message)):
        measure.measure(**arguments)


def test_batches_that_cannot_be_measured():
    with pytest.raises(InputError, match="batches: got 'generator'; it can be read once only"):
        measure.measure_batches((pair for pair in [(H, LABELS)]), num_classes=5)
    with pytest.raises(InputError, match="num_classes: got None"):
        measure.measure_batches(iter([(H, LABELS)]))
    with pytest.raises(InputError, match=r"give \(60, 8\)|give \(B, 8\)"):
        measure.measure_batches([(H, LABELS), (H[:, :3], LABELS)])
    with pytest.raises(InputError, match="batch: got 'ndarray'"):
        measure.measure_batches([H], num_classes=5)
    with pytest.raises(InputError, match="batch: got 'function'; each must be"):
        measure.measure_batches((outputs_of, [(H, LABELS)]))
    with pytest.raises(
        InputError, match="features: got 'function'; give an array of numbers: what a model makes"
    ):
        measure.measure_batches([(outputs_of, [(H, LABELS)])])
    with pytest.raises(AttributeError, match="no attribute 'measures'"):
        _ = measure.measures  # pyright: ignore[reportAttributeAccessIssue]


# Files and the command line


def written(folder, arrays, suffix):
    path = folder / f"a{suffix.removeprefix('compressed')}"
    if suffix == ".safetensors":
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(a) for name, a in arrays.items()}, path
        )
    else:
        (np.savez_compressed if "compressed" in suffix else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("suffix", [".npz", "compressed.npz", ".safetensors"])
def test_files_hold_what_was_written_and_are_mapped_where_they_can_be(tmp_path, suffix):
    arrays = {
        "features": H.astype(np.float32),
        "labels": LABELS,
        "one": np.float32(3),
        "none": np.zeros((0, 4)),
    }
    arrays |= {"half": H.astype(np.float16)}
    if suffix == ".npz":
        arrays["fortran"] = np.asfortranarray(H)
    read = files.read(written(tmp_path, arrays, suffix), "features")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    assert isinstance(read["features"], np.memmap) == (suffix != "compressed.npz")


def test_bfloat16_of_a_safetensors_file(tmp_path):
    array = jnp.asarray(H, jnp.bfloat16)
    raw = np.asarray(array).view(np.uint16)
    header = json.dumps(
        {"features": {"dtype": "BF16", "shape": [60, 8], "data_offsets": [0, raw.nbytes]}}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + raw.tobytes()
    )
    np.testing.assert_array_equal(
        files.read(tmp_path / "a.safetensors", "")["features"], np.asarray(array)
    )


@pytest.fixture
def said(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = command_line.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_the_command_says_what_the_library_finds(said):
    read = files.read(DATA / "features.npz", "features")
    head = files.read(DATA / "head.npz", "")["head_kernel"]
    expected = measure.measure(read["features"], read["labels"], head=head, weight_decay=1e-3)
    assert_same(
        expected, oracle(read["features"], read["labels"], head, np.zeros(10)), 1e-4, atol=1e-6
    )
    code, out, err = said(
        DATA / "features.npz", "--head", DATA / "head.npz", "--weight-decay=1e-3", "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["metrics"] == expected
    assert (found["examples"], found["classes"], found["dimension"], found["missing_classes"]) == (
        400,
        10,
        128,
        [],
    )
    code, out, _ = said(DATA / "features.npz", "--head", DATA / "head.npz", "--weight-decay=1e-3")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line
    ]
    assert {row[0]: row[1] for row in rows} == {
        name: f"{value:.4g}" for name, value in expected.items()
    }
    assert ["nc3", f"{expected['nc3']:.4g}", VOCABULARY["nc3"].definition] in rows


@pytest.mark.slow
def test_layers_classes_and_conventions_on_the_command_line(said, tmp_path):
    h, labels, head, bias = split(sizes=[8, 0, 12, 9, 3], dtype=np.float32)
    np.save(tmp_path / "first.npy", h[:, :5])
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "last.npz", features=h, labels=labels)
    np.savez(tmp_path / "head.npz", head_kernel=head, head_bias=bias)
    call = [
        tmp_path / "first.npy",
        tmp_path / "last.npz",
        "--head",
        tmp_path / "head.npz",
        "--labels",
    ]
    call += [tmp_path / "labels.npy", "--float64", "--batch=7", "--global-mean=examples"]
    code, out, _ = said(*call, "--json")
    first, last = json.loads(out)["layers"]
    assert code == 0
    assert "nc4" not in first["metrics"]
    exact = {"float64": True, "global_mean": "examples"}
    assert first["metrics"] == pytest.approx(
        measure.measure(h[:, :5], labels, num_classes=5, **exact), rel=1e-10
    )
    assert last["metrics"] == pytest.approx(
        measure.measure(h, labels, head=head, bias=bias, **exact), rel=1e-10
    )
    code, out, _ = said(*call, "--figures", tmp_path / "figures")
    assert "Layers in forward order" in out
    assert "1 class has no example and is left out: 1" in out
    assert "classes have 3 to 12 examples; mu_G is the mean of all examples" in out
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["angles.png", "classes.png", "layers.png", "spectrum.png"]
    assert min(path.stat().st_size for path in (tmp_path / "figures").iterdir()) > 5000
    code, out, _ = said(DATA / "features.npz", "--classes=12", "--json")
    assert json.loads(out)["missing_classes"] == [10, 11]


def test_a_table_by_class_as_text_csv_latex_and_json(said, tmp_path):
    h, labels, _, _ = split(sizes=[8, 0, 12, 9, 3], dtype=np.float32)
    np.savez(tmp_path / "a.npz", features=h, labels=labels)
    present = [0, 2, 3, 4]
    mu = {c: np.float64(h)[labels == c].mean(0) for c in present}
    center = np.mean(list(mu.values()), axis=0)
    code, out, err = said(tmp_path / "a.npz", "--by-class", "--csv")
    assert (code, err) == (0, "")
    table = pd.read_csv(io.StringIO(out), index_col="class")
    assert table.index.tolist() == present
    for c in present:
        row, own = table.loc[c], np.float64(h)[labels == c]
        rival = min((o for o in present if o != c), key=lambda o: np.sum((mu[o] - mu[c]) ** 2))
        a, b = mu[c] - center, mu[rival] - center
        angle = np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        expected = [len(own), np.mean(np.sum((own - mu[c]) ** 2, axis=1)), np.linalg.norm(a)]
        np.testing.assert_allclose(row, [*expected, rival, angle], rtol=1e-4)
    code, out, _ = said(tmp_path / "a.npz", "--by-class", "--json")
    assert json.loads(out)["by_class"][1]["class"] == 2
    code, out, _ = said(tmp_path / "a.npz", "--by-class")
    assert sum(line.startswith(("│     0 │", "│     4 │")) for line in out.splitlines()) == 2
    code, out, _ = said(tmp_path / "a.npz", "--by-class", "--latex")
    assert out.splitlines()[1] == r"\toprule"
    assert out.count(r" \\") == 5


def test_layers_as_csv_and_latex(said, tmp_path):
    h, labels, head, _ = split(dtype=np.float32)
    np.savez(tmp_path / "first_.npz", features=h[:, :3], labels=labels)
    np.savez(tmp_path / "last.npz", features=h, labels=labels)
    np.savez(tmp_path / "head.npz", weight=head)
    call = [tmp_path / "first_.npz", tmp_path / "last.npz", "--head", tmp_path / "head.npz"]
    code, out, err = said(*call, "--csv")
    assert (code, err) == (0, "")
    table = pd.read_csv(io.StringIO(out), index_col="layer")
    assert table.index.tolist() == [str(path) for path in call[:2]]
    expected = measure.measure(h, labels, head=head)
    assert dict(table.iloc[1].dropna()) == pytest.approx(dict(expected))
    assert np.isnan(table["nc3"].iloc[0])
    code, out, _ = said(*call, "--latex")
    lines = out.splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}"
    assert r"first\_.npz" in lines[2]
    row = next(line for line in lines if line.startswith("nc3 &"))
    assert row == rf"nc3 & -- & ${expected.nc3:.4g}$ \\"


@pytest.mark.slow
def test_figures_of_a_choice_in_a_format(said, tmp_path):
    folder = tmp_path / "figures"
    call = [DATA / "features.npz", "--figures", folder, "--format=pdf", "--only", "angles"]
    assert said(*call)[0] == 0
    assert [path.name for path in folder.iterdir()] == ["angles.pdf"]
    assert (folder / "angles.pdf").read_bytes().startswith(b"%PDF")


def test_outliers_are_measured_as_neco_does(said, tmp_path):
    h, labels, _, _ = split(num_classes=3, dim=8, per_class=20)
    rng = np.random.default_rng(3)
    ood = 2 * rng.standard_normal((37, 8)) + 0.3
    found = measure.measure(h, labels, ood=ood)
    mu = np.stack([h[labels == c].mean(0) for c in range(3)])
    mean = ood.mean(0)
    cosines = [m @ mean / np.linalg.norm(m) / np.linalg.norm(mean) for m in mu]
    assert found.nc5 == pytest.approx(np.mean(np.abs(cosines)))
    projector = np.linalg.pinv(mu - mu.mean(0)) @ (mu - mu.mean(0))
    own, outside = (
        np.linalg.norm((x - mu.mean(0)) @ projector, axis=1)
        / np.linalg.norm(x - mu.mean(0), axis=1)
        for x in (h, ood)
    )
    pairs = np.mean([(a > b) + (a == b) / 2 for a in own for b in outside])
    assert found.ood_auroc == pytest.approx(pairs, abs=1e-9)
    scaled = measure.measure(h * 2.0**300, labels, ood=ood * 2.0**300)
    assert (scaled.nc5, scaled.ood_auroc) == pytest.approx((found.nc5, found.ood_auroc))
    np.savez(tmp_path / "a.npz", features=h, labels=labels)
    np.save(tmp_path / "ood.npy", ood)
    _, out, _ = said(tmp_path / "a.npz", "--ood", tmp_path / "ood.npy", "--json")
    assert json.loads(out)["metrics"]["ood_auroc"] == pytest.approx(pairs, abs=1e-9)
    for wrong in (ood[:, :5], ood[:0], ood * np.nan):
        with pytest.raises(InputError, match="ood: got"):
            measure.measure(h, labels, ood=wrong)


def test_notes_of_every_layer_are_printed(tmp_path, said):
    h, labels, _, _ = split()
    np.savez(tmp_path / "flat.npz", features=np.ones_like(h), labels=labels)
    np.savez(tmp_path / "last.npz", features=h * 2.0**664, labels=labels)
    code, out, err = said(
        tmp_path / "flat.npz", tmp_path / "last.npz", "--figures", tmp_path / "figures"
    )
    assert (code, err) == (0, "")
    assert "flat.npz: all class means are the same" in out
    assert len(list((tmp_path / "figures").iterdir())) == 4


@pytest.mark.slow
def test_figures_of_many_classes(tmp_path, said):
    h, labels, _, _ = split(num_classes=150, dim=20, per_class=3)
    np.savez(tmp_path / "a.npz", features=h, labels=labels)
    assert said(tmp_path / "a.npz", "--figures", tmp_path)[0] == 0
    assert (tmp_path / "angles.png").stat().st_size > 5000


FILES = {
    "no such file": ("none.npz", None, "No such file or directory"),
    "another format": ("a.txt", b"x", "its name must end in .npz, .npy, .safetensors"),
    "empty npz": ("a.npz", b"", "it cannot be read"),
    "empty npy": ("a.npy", b"", "it cannot be read"),
    "empty safetensors": ("a.safetensors", b"", "it cannot be read"),
    "damaged safetensors": (
        "a.safetensors",
        b"\x10" + bytes(7) + b'{"a": 1}        ',
        "it cannot be read",
    ),
    "half an npz": ("a.npz", (DATA / "features.npz").read_bytes()[:20000], "it cannot be read"),
    "no labels": ("a.npz", {"features": H}, "no array is named labels"),
    "no features": (
        "a.npz",
        {"feats": H, "labels": LABELS},
        "no array is named features; did you mean feats",
    ),
    "objects": ("a.npz", {"features": np.array([{}]), "labels": LABELS}, "it cannot be read"),
    "words": (
        "a.npz",
        {"features": np.full((60, 2), "a"), "labels": LABELS},
        "give an array of numbers",
    ),
    "no example": ("a.npz", {"features": H[:0], "labels": LABELS[:0]}, "no example"),
    "0-d features": (
        "a.npz",
        {"features": np.float64(1), "labels": LABELS},
        "features of shape ()",
    ),
    "0-d labels": ("a.npz", {"features": H, "labels": np.int64(1)}, "labels of shape ()"),
    "0-d logits": (
        "a.npz",
        {"features": H, "labels": LABELS, "logits": np.float64(1)},
        "logits of shape ()",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line_and_exit_code_2(case, tmp_path, said):
    name, content, message = FILES[case]
    if isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = said(tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize("kernel", [np.float64(1), np.ones(8)])
def test_a_head_of_another_shape_is_refused(kernel, tmp_path, said):
    np.savez(tmp_path / "head.npz", head_kernel=kernel)
    code, out, err = said(DATA / "features.npz", "--head", tmp_path / "head.npz")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "head.npz: got 'head_kernel of shape" in err


def test_layers_of_other_examples_are_refused(tmp_path, said):
    np.savez(tmp_path / "few.npz", features=H, labels=LABELS)
    code, _, err = said(DATA / "features.npz", tmp_path / "few.npz")
    assert code == 2
    assert "got '60 examples'; layers are of the same examples, of which" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch=0"], "--batch: got 0"),
        (["--classes=-1"], "--classes: got -1"),
        (["--classes=1000000000000"], "--classes: got 1000000000000"),
        (["--head", DATA / "features.npz"], "it has features (400, 128), labels (400,)"),
        (["--weight-decay=1e-3"], "give one"),
        (["--classes=3"], "labels: got 9; with 3 classes they are 0 to 2"),
        (["--labels", DATA / "head.npz"], "it has no labels"),
        (["--figures", DATA / "head.npz"], "--figures: got"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(flags, message, said):
    code, out, err = said(DATA / "features.npz", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_help_and_a_bad_file_wait_for_no_jax():
    code = """if 1:
        import sys
        from ncjax.cli import measure
        assert measure.main(["none.npz"]) == 2
        try:
            measure.main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        assert not {"jax", "xarray", "rich", "matplotlib"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert "--head FILE" in done.stdout


def examples():
    text = (ROOT / "docs" / "measure.md").read_text()
    return re.findall(r"```python( torch)?\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    ours = [text for torch, text in examples() if not torch]
    assert len(ours) == 4
    scope: dict = {}
    for example in ours:
        exec(compile(example, "docs/measure.md", "exec"), scope)
    out = capsys.readouterr().out
    assert "'nc1': 0.0" in out
    recorded = scope["run"].history.sel(split="train", epoch=6)
    for name in ("nc1", "nc3", "nc4", "epsilon", "cdnv", "output_spread"):
        assert scope["metrics"][name] == pytest.approx(float(recorded[name]), rel=1e-3, abs=1e-5), (
            name
        )
    assert scope["found"].metrics["nc3"] == pytest.approx(scope["metrics"]["nc3"], rel=1e-6)


def test_the_pytorch_examples_and_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    of_torch = [text for torch, text in examples() if torch]
    assert len(of_torch) == 4
    for example in of_torch:
        exec(compile(example, "docs/measure.md", "exec"), scope)
    assert scope["m"].examples.sum() == 180
    assert scope["monitor"].history.epoch.values.tolist() == [2, 4, 6]
    h, labels, head, bias = split()
    np.savez(tmp_path / "features.npz", features=h, labels=labels)
    np.savez(tmp_path / "head.npz", weight=head, bias=bias)
    for layer in ("layer1", "layer2"):
        np.save(tmp_path / f"{layer}.npy", h[:, :6])
    np.save(tmp_path / "outliers.npy", h[:7])
    pd.DataFrame(h).add_prefix("h").assign(label=labels).to_csv("features.csv", index=False)
    weights = {"fc.weight": torch.from_numpy(head), "fc.bias": torch.from_numpy(bias)}
    torch.save(weights, tmp_path / "checkpoint.pt")
    text = (ROOT / "docs" / "measure.md").read_text()
    commands = re.findall(r"^    ncjax (\w+) (.+)$", text, re.MULTILINE)
    assert [name for name, _ in commands] == ["show", "plot", "report"] + ["measure"] * 4
    for name, line in commands:
        main = importlib.import_module(f"ncjax.cli.{name}").main
        assert main(line.split()) == 0, capsys.readouterr().err
    assert (tmp_path / "figures" / "layers.svg").exists()
    assert (tmp_path / "runs/monitored/figures/collapse_against_epoch.pdf").exists()
