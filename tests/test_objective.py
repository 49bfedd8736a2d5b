"""The regularized square loss against loops over examples, outputs and parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import objective


def test_fit_term_is_half_the_mean_over_examples_of_the_sum_over_outputs():
    rng = np.random.default_rng(0)
    outputs, targets = rng.standard_normal((2, 6, 3)).astype(np.float32)
    expected = sum((float(targets[n, c]) - float(outputs[n, c])) ** 2 for n in range(6) for c in range(3)) / (2 * 6)
    per_example = objective.square_loss(jnp.asarray(outputs), jnp.asarray(targets))
    assert per_example.shape == (6,)
    assert float(per_example.mean()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("bias_is_decayed", "expected"), [(None, 0.25 * (1 + 4 + 9 + 16)), (False, 7.5), (True, 7.5 + 0.25 * (25 + 36))]
)
def test_decay_penalty_is_half_lambda_times_the_squared_norm_of_the_decayed_leaves(bias_is_decayed, expected):
    params = {"layer_1": {"kernel": jnp.asarray([[1.0, 2.0]])}, "head": {"kernel": jnp.asarray([[3.0], [-4.0]])}}
    decayed = {"layer_1": {"kernel": True}, "head": {"kernel": True}}
    if bias_is_decayed is not None:
        params["head"]["bias"], decayed["head"]["bias"] = jnp.asarray([5.0, 6.0]), bias_is_decayed
    assert float(objective.decay_penalty(params, decayed, jnp.asarray(0.5))) == expected
