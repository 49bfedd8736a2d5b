"""theory against hand-computed numbers and, for Lemma 2, the gradient of a network written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import theory


def numbers(*values):
    return tuple(jnp.asarray(value, jnp.float64) for value in values)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_equilibrium_residual_by_hand():
    weight, gradient = numbers([[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.5], [0.0, 0.0]])
    # lambda W has norm 0.5; lambda W + G has entries 0.3, 0.5, 0.4.
    expected = np.sqrt(0.3**2 + 0.5**2 + 0.4**2) / 0.5
    assert float(theory.equilibrium_residual(weight, gradient, *numbers(0.1))) == pytest.approx(expected, rel=1e-15)


def test_equilibrium_residual_vanishes_where_the_fit_gradient_balances_decay():
    (weight,) = numbers(np.random.default_rng(0).standard_normal((3, 4)))
    assert float(theory.equilibrium_residual(weight, -0.25 * weight, *numbers(0.25))) == 0


def test_norm_target_and_relaxation_time_by_hand():
    assert float(theory.norm_target(*numbers(0.3, 0.01))) == pytest.approx(30, rel=1e-15)
    flow_time, weight_decay = np.array([[1.0, 10.0], [100.0, 1000.0]]), np.array([[1e-3, 1e-3], [5e-2, 5e-2]])
    times = theory.relaxation_time(flow_time, weight_decay)
    np.testing.assert_allclose(times, [[2e-3, 2e-2], [10.0, 100.0]], rtol=1e-15)


def test_without_decay_every_equilibrium_quantity_is_undefined():
    weight, gradient, zero, one = numbers(np.ones((2, 2)), np.ones((2, 2)), 0.0, 1.0)
    assert np.isnan(float(theory.equilibrium_residual(weight, gradient, zero)))
    assert np.isnan(float(theory.norm_target(one, zero)))
    times = theory.relaxation_time(np.array([5.0, 5.0]), np.array([0.0, 0.1]))
    np.testing.assert_array_equal(times, [np.nan, 1.0])


def lemma2_terms(head_bias, hidden_bias=0.0):
    """The arguments of `lemma2_residual` for a random ReLU net, from the gradient of the fit term alone."""
    rng = np.random.default_rng(0)
    num_classes, weight_decay = 4, 0.03
    x = jnp.asarray(rng.standard_normal((20, 5)))
    y = jnp.asarray(np.eye(num_classes)[np.arange(20) % num_classes])
    weights = [jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 7), (7, 6), (6, num_classes))]
    bias = jnp.asarray(rng.standard_normal(num_classes)) if head_bias != "none" else jnp.zeros(num_classes)

    def outputs(weights):
        h = x
        for w in weights[:-1]:
            h = jnp.maximum(h @ w + hidden_bias, 0)
        return h @ weights[-1] + bias[None]

    def fit(weights):
        return jnp.sum((y - outputs(weights)) ** 2) / (2 * len(x))

    gradients = jax.grad(fit)(weights)
    residual = y - outputs(weights)
    norms_sq = jnp.stack([jnp.sum(w**2) for w in weights])
    bias_penalty = weight_decay / 2 * jnp.sum(bias**2) if head_bias == "decayed" else jnp.asarray(0.0)
    return {
        "loss": fit(weights) + weight_decay / 2 * jnp.sum(norms_sq) + bias_penalty,
        "weight_norms_sq": norms_sq,
        "weight_dot_gradient": jnp.stack([jnp.sum(w * g) for w, g in zip(weights, gradients, strict=True)]),
        "residual_dot_target": jnp.sum(residual * (y - bias[None])) / len(x),
        "bias_penalty": bias_penalty,
        "weight_decay": jnp.asarray(weight_decay),
    }


@pytest.mark.parametrize("head_bias", ["none", "free", "decayed"])
def test_lemma_2_holds_at_any_moment_of_training(head_bias):
    assert float(theory.lemma2_residual(**lemma2_terms(head_bias))) < 1e-14


@pytest.mark.parametrize(
    "term", ["loss", "weight_norms_sq", "weight_dot_gradient", "residual_dot_target", "bias_penalty"]
)
def test_lemma_2_notices_each_wrong_term(term):
    terms = lemma2_terms("decayed")
    assert float(theory.lemma2_residual(**{**terms, term: 1.01 * terms[term]})) > 1e-6


def test_lemma_2_fails_for_a_net_with_hidden_biases():
    assert float(theory.lemma2_residual(**lemma2_terms("none", hidden_bias=0.5))) > 1e-3
