"""wiring: which layer takes what comes after each, and what stands between."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.config import ModelConfig
from ncjax.training import layers, models, wiring


def find(model, image):
    head_bias = "free" if getattr(model, "use_head_bias", False) else "none"
    return wiring.find(model, layers.find(model, image, head_bias, "float32"), image)


def built_in(image=(3, 2, 1), **fields):
    return find(models.make(ModelConfig(**{"widths": (6, 6, 6), **fields}), 3, "float32"), image)


NETWORKS = {
    "mlp": ({}, ("relu", "relu", "relu")),
    "head_bias": ({"head_bias": "free"}, ("relu", "relu", "relu")),
    "linear": ({"activation": "linear"}, ("linear", "linear", "linear")),
    "linear_head": ({"linear_head_depth": 3}, ("relu", "linear", "linear")),
    "conv": ({"kind": "conv", "widths": (3, 4, 5)}, ("relu", "relu", "relu")),
    "batch": ({"normalization": "batch"}, ("other", "other", "other")),
    "features": ({"feature_normalization": "layer"}, ("relu", "relu", "other")),
    "residual": ({"kind": "residual"}, ("relu", "other", "other")),
}


@pytest.mark.parametrize(("fields", "between"), NETWORKS.values(), ids=NETWORKS.keys())
def test_each_layer_is_followed_by_the_next_and_what_is_between_is_found(fields, between):
    found = built_in(**fields)
    assert found.following == (1, 2, 3)
    assert found.between == between


@pytest.mark.slow
def test_after_the_last_convolution_of_a_block_is_the_sum_that_the_next_takes():
    model = models.make(
        ModelConfig(kind="resnet18", widths=(2, 2, 3, 3), normalization="batch"), 3, "float32"
    )
    structure = layers.find(model, (8, 8, 1), "none", "float32")
    names = [layer.name for layer in structure.layers]
    following = wiring.find(model, structure, (8, 8, 1)).following
    after = {name: names[index] for name, index in zip(names[:-1], following, strict=True)}
    assert after["stem"] == "block_1.conv_1"
    assert after["block_5.conv_1"] == "block_5.conv_2"
    # The sum of both branches.
    assert after["block_5.conv_2"] == after["block_5.shortcut"] == "block_6.conv_1"
    assert after["block_8.conv_2"] == "head"


class Twisted(nn.Module):
    """Weights of its own, then two layers side by side, of which one is used twice."""

    num_classes: int

    def setup(self):
        self.head = nn.Dense(self.num_classes, use_bias=False)

    @nn.compact
    def features(self, x, train):
        h = x @ self.param("w", nn.initializers.normal(), (x.shape[-1], 4))
        again = nn.Dense(4, name="again")
        left = nn.tanh(again(again(h)))
        right = nn.Dense(2, use_bias=False, name="right")(inputs=h)
        return jnp.concatenate([left, right], axis=1)

    def logits(self, h):
        return self.head(inputs=h)


def test_networks_of_the_users_are_followed_by_what_depends_on_what():
    model = Twisted(3)
    structure = layers.find(model, (7,), "none", "float32")
    assert [layer.name for layer in structure.layers] == ["w", "again", "right", "head"]
    found = wiring.find(model, structure, (7,))
    assert found.following == (1, 3, 3)
    assert found.between == ("other", "other", "other")


def test_what_layers_take_and_give_is_what_numpy_computes():
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (5, 4), (4, 3))]
    names = ("layer_1", "layer_2", "head")
    model = models.MLP((5, 4), 3, use_head_bias=True)
    params = {name: {"kernel": kernel} for name, kernel in zip(names, w, strict=True)}
    params["head"]["bias"] = np.array([1, 2, 3], np.float32)
    x = rng.standard_normal((7, 2, 3)).astype(np.float32)
    structure = layers.find(model, (2, 3), "free", "float32")
    found = wiring.forward(
        model, {"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x), structure
    )
    h = x.reshape(7, 6)
    for index, kernel in enumerate(w):
        np.testing.assert_allclose(found.calls[index].input, h, rtol=1e-5)
        z = h @ kernel + (params["head"]["bias"] if index == 2 else 0)
        np.testing.assert_allclose(found.calls[index].output, z, rtol=1e-4, atol=1e-5)
        h = np.maximum(z, 0)
    np.testing.assert_array_equal(found.outputs, found.calls[2].output)
