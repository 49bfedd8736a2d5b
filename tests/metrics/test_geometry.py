"""Spread on the sphere, margins and ranks against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.metrics import geometry


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def etf(count):
    return geometry.normalized(np.eye(count) - 1 / count)


def polygon(count):
    angles = 2 * np.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize("count", [3, 4, 10])
def test_of_a_simplex_etf(count):
    units = jnp.asarray(etf(count))
    assert geometry.hyperspherical_uniformity(units) == pytest.approx(0, abs=1e-7)
    # The nearest point of the opposite face is its centre, -u/(C-1).
    margin = geometry.one_vs_rest_margin(etf(count))
    assert margin == pytest.approx(1 + 1 / (count - 1), rel=1e-6)
    values = jnp.linalg.svd(units, compute_uv=False)[: count - 1]
    assert geometry.effective_rank(values) == pytest.approx(count - 1)
    assert geometry.condition_number(values) == pytest.approx(1)
    assert geometry.uniform_duality(3 * units, units) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [5, 8, 13])
def test_of_a_regular_polygon(count):
    """A corner is 1 - cos(2 pi/C) from the chord of its neighbours."""
    margin = geometry.one_vs_rest_margin(polygon(count))
    assert margin == pytest.approx(1 - np.cos(2 * np.pi / count), rel=1e-5)


def test_a_point_within_the_hull_has_no_margin():
    inside = np.vstack([polygon(5), polygon(5)[:1]])
    assert geometry.one_vs_rest_margin(inside) == pytest.approx(0, abs=1e-5)


def test_of_what_is_degenerate():
    assert np.isnan(geometry.effective_rank(jnp.zeros(3)))
    assert geometry.condition_number(jnp.array([2.0, 0.0])) == np.inf
    assert np.isnan(geometry.condition_number(jnp.zeros(2)))
    assert np.isnan(geometry.hyperspherical_uniformity(jnp.tile(etf(3), (2, 1))))


def test_auroc_counts_pairs():
    assert geometry.auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert geometry.auroc(np.array([1.0]), np.array([1.0, 0.0, 2.0, 2.0])) == pytest.approx(0.375)
