"""models: homogeneity, initialization, names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import models


@functools.cache
def network(widths=(6, 5), num_classes=3, **options):
    model = models.HomogeneousMLP(widths=widths, num_classes=num_classes, **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 4)), jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(1), x)["params"], x


@pytest.mark.parametrize(
    ("options", "activated"),
    [
        ({}, {1, 2}),
        ({"activation": "linear"}, set()),
        ({"linear_head_depth": 2}, {1}),
        ({"widths": (6, 5, 5), "linear_head_depth": 2}, {1, 2}),
        ({"widths": (6, 5, 5), "linear_head_depth": 3}, {1}),
    ],
    ids=["relu", "linear", "head_of_2", "head_of_2_on_3", "head_of_3"],
)
def test_forward_pass_equals_numpy(options, activated):
    model, params, x = network(**options, use_head_bias=True)
    params = params | {"head": params["head"] | {"bias": jnp.asarray([1.0, -2.0, 3.0])}}
    h = np.asarray(x, np.float64).reshape(4, 8)
    for number in range(1, len(model.widths) + 1):
        h = h @ np.asarray(params[f"layer_{number}"]["kernel"], np.float64)
        assert (h < 0).any()  # so that an activation makes a difference
        h = np.maximum(h, 0) if number in activated else h
    expected = h @ np.asarray(params["head"]["kernel"], np.float64) + [1, -2, 3]
    np.testing.assert_allclose(np.asarray(model.apply({"params": params}, x)), expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(model.apply({"params": params}, x, method="features")), h, rtol=2e-5, atol=1e-6
    )


def test_logits_of_features_are_the_outputs():
    model, params, x = network(use_head_bias=True)
    features = model.apply({"params": params}, x, method="features")
    outputs = model.apply({"params": params}, features, method="logits")
    np.testing.assert_array_equal(np.asarray(outputs), np.asarray(model.apply({"params": params}, x)))
    assert features.shape == (4, 5)


@pytest.mark.parametrize("linear_head_depth", [1, 2])
@pytest.mark.parametrize("scaled", ["layer_1", "layer_2", "head", "input"])
def test_degree_1_in_every_layer_and_in_the_input(scaled, linear_head_depth):
    model, params, x = network(linear_head_depth=linear_head_depth)
    before = np.asarray(model.apply({"params": params}, x))
    if scaled == "input":
        after = model.apply({"params": params}, 4 * x)
    else:
        after = model.apply({"params": {**params, scaled: {"kernel": 4 * params[scaled]["kernel"]}}}, x)
    np.testing.assert_array_equal(np.asarray(after), 4 * before)  # a power of two costs no rounding
    assert np.abs(before).max() > 0.1


def test_weights_are_drawn_with_variance_2_over_fan_in():
    model = models.HomogeneousMLP(widths=(400, 100), num_classes=200)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 150)))["params"]
    for name, fan_in in (("layer_1", 150), ("layer_2", 400), ("head", 100)):
        kernel = np.asarray(params[name]["kernel"])
        assert kernel.shape[0] == fan_in
        # The relative standard deviation of a variance of n normals is sqrt(2/n): here below 1.1%.
        assert kernel.var() == pytest.approx(2 / fan_in, rel=0.05)
        assert abs(kernel.mean()) < 5 * np.sqrt(2 / fan_in / kernel.size)
        # Normal, not truncated at two standard deviations: 4.55% lie beyond.
        assert np.mean(np.abs(kernel) > 2 * np.sqrt(2 / fan_in)) == pytest.approx(0.0455, abs=0.01)


def test_the_head_alone_may_have_a_bias_and_it_starts_at_0():
    without, with_bias = network()[1], network(use_head_bias=True)[1]
    assert {name: set(leaves) for name, leaves in without.items()} == {
        n: {"kernel"} for n in ("layer_1", "layer_2", "head")
    }
    assert [name for name, leaves in with_bias.items() if "bias" in leaves] == ["head"]
    np.testing.assert_array_equal(np.asarray(with_bias["head"]["bias"]), np.zeros(3))


def test_float64_is_float64_throughout():
    with jax.enable_x64(True):
        model = models.HomogeneousMLP(widths=(3,), num_classes=2, dtype=jnp.float64)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4)))["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
        assert model.apply({"params": params}, jnp.ones((2, 4))).dtype == jnp.float64


def test_layer_names_stand_in_forward_order_beyond_nine_layers():
    params = network(widths=(2,) * 11)[1]
    shuffled = dict(sorted(params.items()))  # layer_10 before layer_2, as a dict that went through a pytree
    assert models.layer_names(shuffled) == (*(f"layer_{k}" for k in range(1, 12)), "head")


@pytest.mark.parametrize(("head_bias", "decays"), [("free", False), ("decayed", True)])
def test_all_leaves_but_a_free_head_bias_decay(head_bias, decays):
    params = network(use_head_bias=True)[1]
    expected = {"layer_1": {"kernel": True}, "layer_2": {"kernel": True}, "head": {"kernel": True, "bias": decays}}
    assert models.is_decayed(params, head_bias) == expected


def test_without_a_bias_all_leaves_decay():
    assert jax.tree.leaves(models.is_decayed(network()[1], "none")) == [True] * 3
