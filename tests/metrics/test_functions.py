"""Each metric alone: against float64 NumPy, under jit and vmap, its examples, and bad input."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import metrics
from ncjax.errors import InputError
from ncjax.metrics import functions
from tests.helpers import oracle_bounds, oracle_nc4_bounds, oracle_split

# Names here -> names of the vocabulary.
OF_FEATURES = {
    "nc1": "nc1",
    "nc1_trace_ratio": "nc1_trace_ratio",
    "cdnv": "cdnv",
    "nc2_equinorm": "nc2_equinorm_means",
    "nc2_equiangular": "nc2_equiangular_means",
    "etf_error": "etf_error",
}


OF_HEAD = ("nc3", "nc4", "nc4_bound")
# Of a head at a weight decay.
OF_EQUILIBRIUM = {"nc1_bound": "nc1_bound", "nc2_bound": "nc2_bound_etf", "nc3_bound": "nc3_bound"}


def split(num_classes=5, dim=8, examples=60):
    rng = np.random.default_rng(0)
    labels = np.arange(examples) % num_classes
    means = rng.standard_normal((num_classes, dim))
    features = means[labels] + 0.5 * rng.standard_normal((examples, dim))
    head = means + 0.3 * rng.standard_normal((num_classes, dim))
    return features, labels, head


def test_every_public_metric_is_tested_here():
    assert {*metrics.__all__} == {*OF_FEATURES, *OF_HEAD, *OF_EQUILIBRIUM}
    assert dir(metrics) == metrics.__all__


@pytest.mark.parametrize("name", [*OF_FEATURES, *OF_HEAD])
def test_a_metric_equals_its_definition(name):
    features, labels, head = split()
    expected = oracle_split(features, features @ head.T, labels, head)
    expected |= oracle_nc4_bounds(features, features @ head.T, labels, head)
    arguments = () if name in OF_FEATURES else (head,)
    got = getattr(metrics, name)(features, labels, *arguments)
    assert type(got) is float
    assert got == pytest.approx(expected[OF_FEATURES.get(name, name)], rel=1e-11)


@pytest.mark.parametrize("name", OF_EQUILIBRIUM)
def test_a_bound_equals_its_definition(name):
    features, labels, head = split()
    head, bias, weight_decay = head / 10, np.arange(5) / 20, 0.05
    residuals = np.eye(5)[labels] - features @ head.T - bias
    expected = oracle_bounds(features, residuals, labels, head, weight_decay)
    got = getattr(metrics, name)(features, labels, head, bias, weight_decay=weight_decay)
    assert type(got) is float
    assert got == pytest.approx(expected[OF_EQUILIBRIUM[name]], rel=1e-9)


def test_a_bound_of_classes_of_different_sizes_is_refused():
    features, labels, head = split(examples=61)
    with pytest.raises(InputError, match=r"^labels: got .12 to 13 examples"):
        metrics.nc2_bound(features, labels, head, weight_decay=0.05)


def test_lists_and_integers_are_arrays():
    features, labels, _ = split()
    rounded = np.rint(10 * features).astype(int)
    got = metrics.nc1(rounded.tolist(), labels.tolist())
    assert got == metrics.nc1(rounded.astype(np.float64), labels)


def test_under_jit_and_vmap_a_metric_is_an_array_of_the_same_numbers():
    features, labels, head = split()
    stacked = jnp.asarray(np.stack([features, features**3]), jnp.float32)

    @jax.jit
    @jax.vmap
    def both(h):
        return (
            metrics.nc1(h, labels, num_classes=5),
            metrics.nc3(h, labels, jnp.asarray(head, jnp.float32), num_classes=5),
        )

    for run, (nc1, nc3) in enumerate(zip(*both(stacked), strict=True)):
        h = np.asarray(stacked[run], np.float64)
        assert nc1 == pytest.approx(metrics.nc1(h, labels), rel=1e-4)
        assert nc3 == pytest.approx(metrics.nc3(h, labels, head), rel=1e-4)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("features", {"features": np.ones(60)}),
        ("features", {"features": np.full((60, 8), np.nan)}),
        ("labels", {"labels": np.zeros(60, int)}),
        ("labels", {"labels": np.arange(60.0)}),
        ("labels", {"labels": np.arange(60) % 5 - 1}),
        ("labels", {"num_classes": 7}),
        ("head", {"head": np.ones((8, 5))}),
    ],
)
def test_bad_input_is_named(field, change):
    features, labels, head = split()
    arguments = {"features": features, "labels": labels, "head": head, "num_classes": 5} | change
    with pytest.raises(InputError, match=f"^{field}: got "):
        metrics.nc3(**arguments)


def test_the_examples_of_the_docstrings_are_right():
    assert doctest.testmod(functions).failed == 0
