"""models: homogeneity, initialization, names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.config import ModelConfig
from ncjax.errors import InputError
from ncjax.training import layers, models


def decayed(params, *choices):
    """Which leaves are, as True and False."""
    return layers.decay_factors(params, True, True, True, *choices)


@functools.cache
def network(widths=(6, 5), num_classes=3, **options):
    model = models.MLP(widths=widths, num_classes=num_classes, **options)
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
        ({"widths": (6, 5, 5), "linear_input_depth": 2}, {2, 3}),
        ({"widths": (6, 5, 5), "linear_input_depth": 2, "linear_head_depth": 2}, {2}),
    ],
    ids=["relu", "linear", "head_of_2", "head_of_2_on_3", "head_of_3", "input_of_2", "both_of_2"],
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
    np.testing.assert_allclose(
        np.asarray(model.apply({"params": params}, x)), expected, rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        np.asarray(model.apply({"params": params}, x, method="features")), h, rtol=2e-5, atol=1e-6
    )


def test_logits_of_features_are_the_outputs():
    model, params, x = network(use_head_bias=True)
    features = model.apply({"params": params}, x, method="features")
    outputs = model.apply({"params": params}, features, method="logits")
    np.testing.assert_array_equal(
        np.asarray(outputs), np.asarray(model.apply({"params": params}, x))
    )
    assert features.shape == (4, 5)


@pytest.mark.parametrize("linear_head_depth", [1, 2])
@pytest.mark.parametrize("scaled", ["layer_1", "layer_2", "head", "input"])
def test_degree_1_in_every_layer_and_in_the_input(scaled, linear_head_depth):
    model, params, x = network(linear_head_depth=linear_head_depth)
    before = np.asarray(model.apply({"params": params}, x))
    if scaled == "input":
        after = model.apply({"params": params}, 4 * x)
    else:
        after = model.apply(
            {"params": {**params, scaled: {"kernel": 4 * params[scaled]["kernel"]}}}, x
        )
    np.testing.assert_array_equal(np.asarray(after), 4 * before)  # a power of two costs no rounding
    assert np.abs(before).max() > 0.1


def test_weights_are_drawn_with_variance_2_over_fan_in():
    model = models.MLP(widths=(400, 100), num_classes=200)
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
        model = models.MLP(widths=(3,), num_classes=2, dtype=jnp.float64)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4)))["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
        assert model.apply({"params": params}, jnp.ones((2, 4))).dtype == jnp.float64


@pytest.mark.parametrize(("head_bias", "decays"), [("free", False), ("decayed", True)])
def test_all_leaves_but_a_free_head_bias_decay(head_bias, decays):
    params = network(use_head_bias=True)[1]
    expected = {
        "layer_1": {"kernel": True},
        "layer_2": {"kernel": True},
        "head": {"kernel": True, "bias": decays},
    }
    assert decayed(params, head_bias, "decayed") == expected


def test_without_a_bias_all_leaves_decay():
    assert jax.tree.leaves(decayed(network()[1], "none", "decayed")) == [True] * 3


@functools.cache
def conv_network(**options):
    model = models.ConvNet(widths=(3, 4), num_classes=3, dtype=jnp.float64, **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7, 6, 2)), jnp.float64)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    return model, variables, x


def convolved(x, kernel):
    """A 3x3 convolution of stride 2, padded by 1, as a loop over output pixels."""
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    rows, columns = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        y[:, i, j] = np.einsum(
            "bklc,klcd->bd", padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel
        )
    return y


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_convolutional_forward_pass_equals_numpy():
    model, variables, x = conv_network()
    params, h = variables["params"], np.asarray(x)
    for name in ("layer_1", "layer_2"):
        h = np.maximum(convolved(h, np.asarray(params[name]["kernel"])), 0)
    h = h.reshape(5, 2 * 2 * 4)
    np.testing.assert_allclose(
        model.apply(variables, x, method="features"), h, rtol=1e-12, atol=1e-13
    )
    np.testing.assert_allclose(
        model.apply(variables, x), h @ params["head"]["kernel"], rtol=1e-12, atol=1e-13
    )


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scaled", ["layer_1", "layer_2", "head"])
def test_convolutions_are_of_degree_1_in_every_layer(scaled):
    model, variables, x = conv_network()
    params = variables["params"]
    after = model.apply({"params": {**params, scaled: {"kernel": 4 * params[scaled]["kernel"]}}}, x)
    np.testing.assert_array_equal(np.asarray(after), 4 * np.asarray(model.apply(variables, x)))
    assert {name: set(leaves) for name, leaves in params.items()} == {
        name: {"kernel"} for name in ("layer_1", "layer_2", "head")
    }


@pytest.mark.slow
def test_convolution_kernels_are_drawn_with_variance_2_over_9_channels():
    model = models.ConvNet(widths=(64, 128), num_classes=10)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = np.asarray(params["layer_2"]["kernel"])
    assert kernel.shape == (3, 3, 64, 128)
    assert kernel.var() == pytest.approx(2 / (9 * 64), rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_batch_normalization_is_of_the_batch_in_training_and_of_running_statistics_otherwise():
    model, variables, x = conv_network(normalization="batch")
    params = {name: dict(leaves) for name, leaves in variables["params"].items()}
    rng = np.random.default_rng(4)
    for name in ("norm_1", "norm_2"):
        params[name] = {
            leaf: jnp.asarray(rng.uniform(0.5, 2, a.shape)) for leaf, a in params[name].items()
        }
    stats = {
        name: {leaf: jnp.asarray(rng.uniform(0.5, 2, a.shape)) for leaf, a in leaves.items()}
        for name, leaves in variables["batch_stats"].items()
    }
    state = {"params": params, "batch_stats": stats}

    def expected(training):
        h, noted = np.asarray(x), {}
        for k in (1, 2):
            norm = {name: np.asarray(leaf) for name, leaf in params[f"norm_{k}"].items()}
            h = convolved(h, np.asarray(params[f"layer_{k}"]["kernel"]))
            running = {name: np.asarray(leaf) for name, leaf in stats[f"norm_{k}"].items()}
            batch = {"mean": h.mean((0, 1, 2)), "var": h.var((0, 1, 2))}
            used = batch if training else running
            noted[f"norm_{k}"] = {name: 0.9 * running[name] + 0.1 * batch[name] for name in running}
            h = (h - used["mean"]) / np.sqrt(used["var"] + 1e-5) * norm["scale"] + norm["bias"]
            h = np.maximum(h, 0)
        return h.reshape(len(h), -1) @ np.asarray(params["head"]["kernel"]), noted

    found, noted = model.apply(state, x, train=True, mutable=["batch_stats"])
    outputs, statistics = expected(training=True)
    np.testing.assert_allclose(found, outputs, rtol=1e-10, atol=1e-10)
    for name, leaves in statistics.items():
        for leaf, value in leaves.items():
            np.testing.assert_allclose(noted["batch_stats"][name][leaf], value, rtol=1e-12)
    np.testing.assert_allclose(
        model.apply(state, x), expected(training=False)[0], rtol=1e-10, atol=1e-10
    )


def test_norms_decay_or_not_whatever_the_head_bias_does():
    model = models.ConvNet(widths=(3, 4), num_classes=3, normalization="batch", use_head_bias=True)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    assert set(jax.tree.leaves(decayed(params, "decayed", "decayed"))) == {True}
    free_norms = decayed(params, "decayed", "free")
    assert free_norms["head"] == {"kernel": True, "bias": True}
    assert free_norms["layer_2"] == {"kernel": True}
    assert free_norms["norm_1"] == {"scale": False, "bias": False}
    free_head = decayed(params, "free", "decayed")
    assert free_head["head"] == {"kernel": True, "bias": False}
    assert free_head["norm_2"] == {"scale": True, "bias": True}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"kind": "resnet"}, "model.kind"),
        ({"normalization": "group"}, "model.normalization"),
        ({"feature_normalization": "group"}, "normalization"),
    ],
)
def test_a_network_that_there_is_not_is_refused(values, field, without_type_checks):
    def init():
        network = models.make(ModelConfig(**values), 3, "float32")
        return network.init(jax.random.key(0), jnp.zeros((1, 4)))

    with pytest.raises(InputError, match=f"^{field}: got "):
        jax.eval_shape(init)


def test_an_activation_that_there_is_not_is_refused(without_type_checks):
    with pytest.raises(InputError, match=r"^activation: got 'tanh'"):
        network(activation="tanh")


@pytest.mark.parametrize(
    ("choice", "field"), [(("some", "free"), "head_bias"), (("free", "none"), "norms")]
)
def test_a_choice_of_what_decays_that_there_is_not_is_refused(choice, field, without_type_checks):
    with pytest.raises(InputError, match=f"^{field}: got "):
        decayed(network()[1], *choice)
