"""layers: what a network is made of; degrees against what is known of each network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.config import ModelConfig
from ncjax.errors import InputError
from ncjax.training import layers, models

NAN = float("nan")


def structure(image=(3, 2, 1), **fields):
    settings = ModelConfig(**{"widths": (6, 6, 6), **fields})
    model = models.make(settings, 3, "float32")
    return layers.find(model, image, settings.head_bias, "float32")


# Scaling a kernel by c > 0 scales what a ReLU network without bias says by c; a normalization
# undoes it; what is added to a skipped layer has no power of c.
DEGREES = {
    "mlp": ({}, (1, 1, 1, 1)),
    "head_bias": ({"head_bias": "free"}, (1, 1, 1, 1)),
    "batch": ({"normalization": "batch"}, (0, 0, 0, 1)),
    "layer": ({"normalization": "layer"}, (0, 0, 0, 1)),
    "features": ({"feature_normalization": "layer"}, (0, 0, 0, 1)),
    "residual": ({"kind": "residual"}, (1, NAN, NAN, 1)),
}


@pytest.mark.parametrize(("fields", "degrees"), DEGREES.values(), ids=DEGREES.keys())
def test_degrees_are_measured(fields, degrees):
    found = structure(**fields)
    np.testing.assert_array_equal(found.degrees, degrees)
    normalized = "batch" in fields.values()
    assert found.is_measured_as_trained == (not normalized)
    assert found.is_homogeneous == (set(degrees) == {1})
    assert bool(found.remark()) == (not found.is_homogeneous)
    below = [not normalized and degree != 0 for degree in degrees[:-1]]
    assert found.equilibria() == (*below, True)
    scaling = tuple(not normalized and degree > 0 for degree in degrees)
    assert found.scaling() == scaling


class Squares(nn.Module):
    """A head on (W_2 s(W_1 x))^2, of degree 2 in both."""

    num_classes: int

    def setup(self):
        self.zeta = nn.Dense(5, use_bias=False)
        self.alpha = nn.Dense(4, use_bias=False)
        self.head = nn.Dense(self.num_classes, use_bias=False)

    def features(self, x, train):
        return self.alpha(nn.relu(self.zeta(x))) ** 2

    def logits(self, h):
        return self.head(h)


def test_other_degrees_are_measured_and_layers_stand_in_the_order_of_their_use():
    found = layers.find(Squares(3), (7,), "none", "float32")
    assert [layer.name for layer in found.layers] == ["zeta", "alpha", "head"]
    assert found.degrees == (2, 2, 1)
    assert found.leaves == (("zeta", "kernel"), ("alpha", "kernel"), ("head", "kernel"))
    assert found.is_homogeneous
    assert "zeta of degree 2" in found.remark()


class Dropped(Squares):
    @nn.compact
    def features(self, x, train):
        h = nn.relu(self.alpha(nn.relu(self.zeta(x))))
        return nn.Dropout(0.5, deterministic=not train)(h)


class Bare(nn.Module):
    """Weights of no dense layer, a bias that starts at 0, statistics of its own."""

    num_classes: int

    def setup(self):
        self.head = nn.Dense(self.num_classes)

    @nn.compact
    def features(self, x, train):
        seen = self.variable("seen", "steps", lambda: jnp.zeros((), jnp.int32))
        if train:
            seen.value += 1
        w = self.param("w", nn.initializers.normal(), (x.shape[-1], 4))
        return nn.relu(x @ w + self.param("b", nn.initializers.zeros, (4,))[None])

    def logits(self, h):
        return self.head(h)


def test_dropout_is_another_function_in_training():
    found = layers.find(Dropped(3), (7,), "none", "float32")
    assert not found.is_measured_as_trained
    assert not found.has_statistics
    assert found.equilibria() == (False, False, True)


def test_weights_are_leaves_of_two_dimensions_and_other_collections_are_statistics():
    found = layers.find(Bare(3), (7,), "free", "float32")
    # A bias of 0 must not hide that there is one.
    np.testing.assert_array_equal(found.degrees, (NAN, 1))
    assert [layer.name for layer in found.layers] == ["w", "head"]
    assert found.has_statistics
    assert found.is_measured_as_trained
    assert found.leaves[:2] == (("w",), ("b",))


def test_random_parameters_stay_in_the_type_of_the_inputs():
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            variables = layers.init(Bare(3), jax.random.key(0), jnp.zeros((2, 7), dtype))
            assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {
                jnp.dtype(dtype)
            }
            assert variables["seen"]["steps"].dtype == jnp.int32


class Crooked(Squares):
    def logits(self, h):
        return self.head(h) ** 3


class Headless(nn.Module):
    num_classes: int

    def setup(self):
        self.last = nn.Dense(self.num_classes)

    def features(self, x, train):
        return x

    def logits(self, h):
        return self.last(h)


class Flatless(Squares):
    def features(self, x, train):
        return super().features(x, train)[None]


class Broken(Squares):
    def features(self, x, train):
        return x @ jnp.ones((2, 2))


@pytest.mark.parametrize(
    ("network", "head_bias", "field", "words"),
    [
        (Crooked, "none", "network", "logits"),
        (Headless, "none", "network", "self.head = nn.Dense"),
        (Flatless, "none", "network", "shape"),
        (Broken, "none", "network", "fails on inputs (4, 7)"),
        (Squares, "free", "head_bias", "use_head_bias"),
        (Bare, "none", "head_bias", "has a bias"),
    ],
)
def test_a_network_that_is_none_is_one_line(network, head_bias, field, words, without_type_checks):
    with pytest.raises(InputError, match=f"^config.model.{field}: got ") as caught:
        layers.find(network(3), (7,), head_bias, "float32")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class Promoting(Squares):
    def features(self, x, train):
        return jnp.full((1, 1), 2, jnp.float64) * super().features(x, train)


def test_features_of_another_type_are_one_line():
    with pytest.raises(InputError, match=r"float64 where inputs are float32"):
        layers.find(Promoting(3), (7,), "none", "float32")


def test_a_network_beyond_the_machines_memory_is_one_line():
    model = models.MLP(widths=(10**6, 10**6), num_classes=3)
    with pytest.raises(InputError, match=r"^config.model.widths: got \(1000000, 1000000\); "):
        layers.find(model, (4, 4), "none", "float32")


def test_decay_factors_are_of_the_head_its_bias_and_what_lies_below():
    params = {
        "block": {"layer_1": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}},
        "norm_1": {"scale": np.zeros(3)},
        "head": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)},
    }
    expected = {
        "block": {"layer_1": {"kernel": 2.0, "bias": 2.0}},
        "norm_1": {"scale": 2.0},
        "head": {"kernel": 3.0, "bias": 5.0},
    }
    assert layers.decay_factors(params, 2.0, 3.0, 5.0, "decayed", "decayed") == expected
    expected["block"]["layer_1"]["bias"] = expected["norm_1"]["scale"] = False
    expected["head"]["bias"] = False
    assert layers.decay_factors(params, 2.0, 3.0, 5.0, "free", "free") == expected


def test_parameters_are_shown_by_number_and_the_head_last():
    names = ["head.kernel", "layer_10.kernel", "layer_2.kernel", "norm_2.bias", "stem.kernel"]
    assert layers.display_order(names) == [
        "stem.kernel",
        "layer_2.kernel",
        "norm_2.bias",
        "layer_10.kernel",
        "head.kernel",
    ]
