"""Deep networks split where collapse is measured: `features(x)` below, `logits(h)` above."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

ACTIVATIONS = {"relu": nn.relu, "linear": lambda x: x}


class HomogeneousMLP(nn.Module):
    """f(x) = W_L h(x) + b with h = s(W_{L-1} ... s(W_1 x)): no other bias and no normalization, degree 1 in every W_k.

    With a linear head of depth d, the last d - 1 layers below W_L have no activation: h = W_{L-1} ... W_{L-d+1} s(...).
    Weights are drawn from N(0, 2/fan_in) (He et al. 2015), the head bias starts at 0. Parameters are named `layer_1`,
    `layer_2`, ... in forward order, then `head`.

    Attributes:
      widths: width of each hidden layer; the last is p, the dimension of the features.
      num_classes: C.
      activation: `relu` or `linear`.
      linear_head_depth: d, layers after the last activation, the head among them (Jacot et al. 2024).
      use_head_bias: whether b exists.
      dtype: float32 or float64, of parameters and arithmetic.
    """

    widths: tuple[int, ...]
    num_classes: int
    activation: str = "relu"
    linear_head_depth: int = 1
    use_head_bias: bool = False
    dtype: Dtype = jnp.float32

    def setup(self):
        self.layers = [self._dense(width, f"layer_{k}") for k, width in enumerate(self.widths, start=1)]
        self.head = self._dense(self.num_classes, "head", use_bias=self.use_head_bias)

    def _dense(self, width: int, name: str, use_bias: bool = False) -> nn.Dense:
        he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        return nn.Dense(
            width, use_bias=use_bias, kernel_init=he_normal, dtype=self.dtype, param_dtype=self.dtype, name=name
        )

    def features(self, x: Float[Array, "B *image"]) -> Float[Array, "B p"]:
        h = x.reshape(x.shape[0], -1)
        last_activation = len(self.layers) - (self.linear_head_depth - 1)
        for k, layer in enumerate(self.layers, start=1):
            h = layer(h)
            if k <= last_activation:
                h = ACTIVATIONS[self.activation](h)
        return h

    def logits(self, h: Float[Array, "B p"]) -> Float[Array, "B C"]:
        return self.head(h)

    def __call__(self, x: Float[Array, "B *image"]) -> Float[Array, "B C"]:
        return self.logits(self.features(x))


def make(settings: Any, num_classes: int, precision: str) -> HomogeneousMLP:
    """The network of a config's `model` section."""
    return HomogeneousMLP(
        widths=tuple(settings.widths),
        num_classes=num_classes,
        activation=settings.activation,
        linear_head_depth=settings.linear_head_depth,
        use_head_bias=settings.head_bias != "none",
        dtype=jnp.dtype(precision),
    )


def layer_names(params: dict) -> tuple[str, ...]:
    """Names of the layers in forward order; the last is `head`."""
    return (*sorted((name for name in params if name != "head"), key=lambda name: int(name.rpartition("_")[2])), "head")


def is_decayed(params: dict, head_bias: str) -> dict:
    """Marks the leaves that weight decay acts on: all, but for a free head bias."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: head_bias != "free" or path[-1] != jax.tree_util.DictKey("bias"), params
    )
