"""optim against steps computed by hand, and against where they come to rest."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ncjax.config import OPTIMIZERS, Decay, Optimizer
from ncjax.errors import InputError
from ncjax.training import optim


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("constant", {0: 1, 50: 1, 99: 1}),
        (
            "cosine",
            {0: 1, 25: (1 + np.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - np.sqrt(0.5)) / 2, 100: 0, 150: 0},
        ),
        ("step", {0: 1, 33: 1, 34: 0.1, 66: 0.1, 67: 0.01, 99: 0.01}),
    ],
)
def test_schedule_at_chosen_steps_of_100(name, shape):
    got = optim.schedule_shape(name, jnp.asarray(list(shape)), 100)
    np.testing.assert_allclose(np.asarray(got), list(shape.values()), rtol=1e-6, atol=1e-7)


def trained(
    schedule,
    gradients,
    start,
    *,
    name="sgd",
    decay="coupled",
    momentum=0.5,
    decayed=True,
    weight_decay=0.125,
    **eps,
):
    """The path of one leaf under given gradients at learning rate 0.25."""
    params = {"w": jnp.asarray(start, jnp.float32)}
    numbers = (jnp.asarray(v, jnp.float32) for v in (weight_decay, 0.25, momentum))
    choice = {"decayed": {"w": decayed}, "schedule": schedule, "total_steps": len(gradients)}
    tx = optim.make_optimizer(name, decay, *numbers, **choice, **eps)
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
    np.testing.assert_array_equal(
        trained("constant", GRADIENTS, START, decayed=decay > 0), np.stack(expected)
    )


@pytest.mark.parametrize("decay", [0.125, 0.0], ids=["decayed", "free"])
def test_three_steps_of_momentum_with_decoupled_decay_are_exact(decay):
    w, m, expected = np.array(START), np.zeros(2), []
    for gradient in GRADIENTS:
        m = 0.5 * m + np.array(gradient)
        w = w - 0.25 * (m + decay * w)
        expected.append(w)
    got = trained("constant", GRADIENTS, START, decay="decoupled", decayed=decay > 0)
    np.testing.assert_array_equal(got, np.stack(expected))
    assert (
        not np.array_equal(got, trained("constant", GRADIENTS, START, decayed=decay > 0))
        or not decay
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_factor_on_lambda_is_another_lambda(name):
    """By powers of two, so that the products are exact."""
    choices = {"name": name, "decay": "decoupled"}
    factor = jnp.asarray(0.5, jnp.float32)
    got = trained("step", GRADIENTS, START, weight_decay=0.25, decayed=factor, **choices)
    expected = trained("step", GRADIENTS, START, weight_decay=0.125, **choices)
    np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(got, trained("step", GRADIENTS, START, weight_decay=0.25, **choices))


@pytest.mark.parametrize("decayed", [True, False], ids=["decayed", "free"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_three_steps_of_adam_and_adamw_equal_numpy(name, decayed, eps):
    """Kingma & Ba's algorithm 1 with decay in the gradient, and Loshchilov & Hutter's algorithm
    2 without.
    """
    decay, beta_1, beta_2 = 0.125 if decayed else 0.0, 0.5, 0.999
    w, m, v, expected = np.array(START), np.zeros(2), np.zeros(2), []
    for step, (gradient, share) in enumerate(zip(GRADIENTS, (1, 0.1, 0.01), strict=True), start=1):
        g = np.array(gradient) + (decay * w if name == "adam" else 0)
        m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
        direction = m / (1 - beta_1**step) / (np.sqrt(v / (1 - beta_2**step)) + eps)
        w = w - 0.25 * share * (direction + (decay * w if name == "adamw" else 0))
        expected.append(w)
    order = "decoupled" if name == "adamw" else "coupled"
    got = trained("step", GRADIENTS, START, name=name, decay=order, decayed=decayed, adam_eps=eps)
    np.testing.assert_allclose(got, np.stack(expected), rtol=2e-6)


def settled(name, decay, momentum, steps, weight_decay=0.25):
    """Where steps on the quadratic (w - 3)^2/2 + (v + 1)^2 come to rest, and the gradient there."""
    curvature, target = np.array([1.0, 2.0]), np.array([3.0, -1.0])
    numbers = (jnp.asarray(v) for v in (weight_decay, 0.05, momentum))
    tx = optim.make_optimizer(
        name, decay, *numbers, decayed={"w": True}, schedule="constant", total_steps=1
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update({"w": curvature * (params["w"] - target)}, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = {"w": jnp.asarray([8.0, -16.0])}
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    w = np.asarray(params["w"])
    return w, curvature * (w - target)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "decay"), [("sgd", "coupled"), ("sgd", "decoupled"), ("adam", "coupled")]
)
def test_an_optimizer_comes_to_rest_where_the_gradient_balances_the_effective_decay(
    name, decay, momentum
):
    with jax.enable_x64(True):
        w, gradient = settled(name, decay, momentum, 2000)
    effective = optim.effective_decay(name, decay, np.array([0.25]), np.array([momentum]))
    np.testing.assert_allclose(gradient, -effective * w, rtol=1e-6)
    assert effective == pytest.approx(0.25 * (1 - momentum if decay == "decoupled" else 1))


def test_adamw_comes_to_rest_at_no_critical_point_of_a_decayed_loss():
    """Its steady step is sign(g) + lambda w: where |lambda w| < 1 throughout, it ends near g =
    0, whatever lambda.
    """
    with jax.enable_x64(True):
        w, gradient = settled("adamw", "decoupled", 0.9, 40_000)
    np.testing.assert_allclose(w, [3, -1], rtol=1e-3)
    assert (np.abs(gradient) < 5e-3 * np.abs(0.25 * w)).all()
    assert optim.effective_decay("adamw", "decoupled", np.array([0.25]), np.array([0.9])) == [0.25]


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


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_parameters_keep_float32_where_64_bit_types_are_on(name):
    with jax.enable_x64(True):
        decay = "decoupled" if name == "adamw" else "coupled"
        assert trained("cosine", GRADIENTS, START, name=name, decay=decay).dtype == np.float32


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({"name": "SGD"}, "optimizer"),
        ({"decay": "l2"}, "decay"),
        ({"name": "adam", "decay": "decoupled"}, "decay"),
        ({"name": "adamw", "decay": "coupled"}, "decay"),
    ],
)
def test_an_optimizer_that_there_is_not_is_refused(choice, field, without_type_checks):
    with pytest.raises(InputError, match=f"^{field}: got "):
        trained("constant", GRADIENTS, START, **choice)


def test_a_schedule_that_there_is_not_is_refused(without_type_checks):
    with pytest.raises(InputError, match=r"^schedule: got 'linear'"):
        optim.schedule_shape("linear", jnp.arange(3), 3)


def test_every_optimizer_has_its_traits_and_each_decay_of_them_is_made():
    assert get_args(Optimizer) == tuple(OPTIMIZERS)
    one = jnp.ones(())
    for name, traits in OPTIMIZERS.items():
        for decay in get_args(Decay):
            arguments = (name, decay, one, one, one / 2)
            options = {"decayed": {"w": 1.0}, "schedule": "constant", "total_steps": 1}
            if decay in traits.decays:
                optim.make_optimizer(*arguments, **options).init({"w": one})
            else:
                with pytest.raises(InputError, match="decay"):
                    optim.make_optimizer(*arguments, **options)
