"""The regularized loss against loops over examples, outputs and parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.errors import InputError
from ncjax.training import objective
from ncjax.training.objective import Objective


def random_outputs():
    return np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32), np.array(
        [0, 2, 1, 1, 0, 2]
    )


def test_square_loss_of_an_example_is_half_the_sum_over_outputs():
    outputs, labels = random_outputs()
    expected = [
        sum(((c == y) - float(f[c])) ** 2 for c in range(3)) / 2
        for f, y in zip(outputs, labels, strict=True)
    ]
    one_hot = Objective().target(jnp.asarray(labels), 3, jnp.float32)
    per_example = Objective().fit(jnp.asarray(outputs), one_hot)
    np.testing.assert_allclose(np.asarray(per_example), expected, rtol=1e-6)


def test_cross_entropy_of_an_example_is_minus_the_log_of_its_class_share():
    outputs, labels = random_outputs()
    expected = [
        -math.log(math.exp(f[y]) / sum(math.exp(f[c]) for c in range(3)))
        for f, y in zip(outputs, labels, strict=True)
    ]
    cross_entropy = Objective("cross_entropy")
    per_example = cross_entropy.fit(
        jnp.asarray(outputs), cross_entropy.target(jnp.asarray(labels), 3, jnp.float32)
    )
    np.testing.assert_allclose(np.asarray(per_example), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "rows"),
    [
        ("one_hot", [[0, 1, 0], [1, 0, 0]]),
        ("centered", [[-1 / 3, 2 / 3, -1 / 3], [2 / 3, -1 / 3, -1 / 3]]),
    ],
)
def test_targets_by_hand_and_padding_has_none(targets, rows):
    got = Objective(targets=targets).target(jnp.asarray([1, 0, -1, 3]), 3, jnp.float32)
    np.testing.assert_allclose(np.asarray(got), [*rows, [0, 0, 0], [0, 0, 0]], atol=1e-7)


@pytest.mark.parametrize(
    "choice", [("square", "one_hot"), ("square", "centered"), ("cross_entropy", "one_hot")]
)
def test_the_residual_is_minus_the_gradient_of_the_fit_with_respect_to_the_outputs(choice):
    loss = Objective(*choice)
    outputs, labels = random_outputs()
    with jax.enable_x64(True):
        f = jnp.asarray(outputs, jnp.float64)
        y = loss.target(jnp.asarray(labels), 3, jnp.float64)
        gradient = jax.grad(lambda f: loss.fit(f, y).sum())(f)
        residual = loss.residual(f, y)
    np.testing.assert_allclose(np.asarray(residual), -np.asarray(gradient), rtol=1e-12, atol=1e-15)
    assert np.abs(residual).min() > 1e-3


def test_cross_entropy_and_its_residual_stand_outputs_that_overflow_an_exponential():
    outputs, y = jnp.asarray([[1000.0, 0.0], [0.0, 1000.0]]), jnp.asarray([[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(np.asarray(Objective("cross_entropy").fit(outputs, y)), [0, 1000])
    np.testing.assert_allclose(
        np.asarray(Objective("cross_entropy").residual(outputs, y)), [[0, 0], [1, -1]]
    )


@pytest.mark.parametrize(
    ("bias_is_decayed", "expected"),
    [(None, 0.25 * (1 + 4 + 9 + 16)), (False, 7.5), (True, 7.5 + 0.25 * (25 + 36))],
)
def test_decay_penalty_is_half_lambda_times_the_squared_norm_of_the_decayed_leaves(
    bias_is_decayed, expected
):
    params = {
        "layer_1": {"kernel": jnp.asarray([[1.0, 2.0]])},
        "head": {"kernel": jnp.asarray([[3.0], [-4.0]])},
    }
    decayed = {"layer_1": {"kernel": True}, "head": {"kernel": True}}
    if bias_is_decayed is not None:
        params["head"]["bias"], decayed["head"]["bias"] = jnp.asarray([5.0, 6.0]), bias_is_decayed
    assert float(objective.decay_penalty(params, decayed, jnp.asarray(0.5))) == expected


def test_decay_penalty_has_a_factor_for_every_leaf():
    params = {
        "layer_1": {"kernel": jnp.asarray([[1.0, 2.0]])},
        "head": {"kernel": jnp.ones((2, 1))},
    }
    factors = {"layer_1": {"kernel": jnp.asarray(3.0)}, "head": {"kernel": jnp.asarray(0.0)}}
    expected = 0.25 * 3 * (1 + 4)
    assert float(objective.decay_penalty(params, factors, jnp.asarray(0.5))) == expected


def test_a_loss_and_targets_that_there_are_not_are_refused(without_type_checks):
    outputs = jnp.zeros((2, 3))
    for method in (Objective("hinge").fit, Objective("hinge").residual):
        with pytest.raises(InputError, match=r"^loss: got 'hinge'"):
            method(outputs, outputs)
    with pytest.raises(InputError, match=r"^targets: got 'smooth'"):
        Objective(targets="smooth").target(jnp.zeros(2, int), 3, jnp.float32)
