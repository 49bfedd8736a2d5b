"""optim against steps of SGD computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ncjax import optim


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("constant", {0: 1, 50: 1, 99: 1}),
        ("cosine", {0: 1, 25: (1 + np.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - np.sqrt(0.5)) / 2, 100: 0, 150: 0}),
        ("step", {0: 1, 33: 1, 34: 0.1, 66: 0.1, 67: 0.01, 99: 0.01}),
    ],
)
def test_schedule_at_chosen_steps_of_100(name, shape):
    got = optim.schedule_shape(name, jnp.asarray(list(shape)), 100)
    np.testing.assert_allclose(np.asarray(got), list(shape.values()), rtol=1e-6, atol=1e-7)


def trained(schedule, gradients, start, *, momentum=0.5, decayed=True):
    params = {"w": jnp.asarray(start, jnp.float32)}
    numbers = (jnp.asarray(v, jnp.float32) for v in (0.125, 0.25, momentum))
    tx = optim.sgd(*numbers, decayed={"w": decayed}, schedule=schedule, total_steps=len(gradients))
    state, path = tx.init(params), []
    for gradient in gradients:
        updates, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"]))
    return np.stack(path)


GRADIENTS, START = [[1.0, -2.0], [0.5, 4.0], [-3.0, 1.0]], [8.0, -16.0]


@pytest.mark.parametrize("decay", [0.125, 0.0], ids=["decayed", "free"])
def test_three_steps_of_momentum_with_coupled_decay_are_exact(decay):
    # Powers of two: every intermediate is a float32, so the numbers must be equal, not close.
    w, m, expected = np.array(START), np.zeros(2), []
    for gradient in GRADIENTS:
        m = 0.5 * m + (np.array(gradient) + decay * w)
        w = w - 0.25 * m
        expected.append(w)
    np.testing.assert_array_equal(trained("constant", GRADIENTS, START, decayed=decay > 0), np.stack(expected))


def test_first_step_in_figures():
    # m = g + lambda w = (1 + 0.125 * 8, -2 - 0.125 * 16); w - 0.25 m
    np.testing.assert_array_equal(trained("constant", GRADIENTS[:1], START)[0], [7.5, -15.0])


def test_the_schedule_multiplies_the_momentum_buffer_not_the_gradient():
    # Total of 3 steps: shares 1, 0.1, 0.01.
    w, m, expected = np.array(START), np.zeros(2), []
    for gradient, share in zip(GRADIENTS, (1, 0.1, 0.01), strict=True):
        m = 0.5 * m + (np.array(gradient) + 0.125 * w)
        w = w - 0.25 * share * m
        expected.append(w)
    np.testing.assert_allclose(trained("step", GRADIENTS, START), np.stack(expected), rtol=1e-6)


def test_parameters_keep_float32_where_64_bit_types_are_on():
    with jax.enable_x64(True):
        assert trained("cosine", GRADIENTS, START).dtype == np.float32
