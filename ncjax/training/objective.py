"""What is minimized: L = mean_n loss(f_n, y_n) + lambda/2 sum_k ||W_k||_F^2, the mean over all NC
examples.

The square loss is the theory's, 1/2 ||y_n - f_n||^2 with the norm over all C outputs (Rangamani &
Banburski 2022). Cross-entropy is there for contrast (Papyan, Han & Donoho 2020).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Objective(NamedTuple):
    """The loss of one example and what it is measured against.

    Attributes:
      loss: `square` or `cross_entropy`.
      targets: `one_hot`, or `centered`: one-hot less 1/C, of which each row sums to 0.
    """

    loss: str = "square"
    targets: str = "one_hot"

    def target(self, labels: Int[Array, " B"], num_classes: int, dtype) -> Float[Array, "B C"]:
        """y, a row per label; a label outside [0, C) gives a row of zeros."""
        y = jax.nn.one_hot(labels, num_classes, dtype=dtype)
        return y - y.mean(1, keepdims=True) if self.targets == "centered" else y

    def fit(self, outputs: Float[Array, "B C"], y: Float[Array, "B C"]) -> Float[Array, " B"]:
        """1/2 ||y - f||^2, or -<y, log softmax(f)>."""
        if self.loss == "cross_entropy":
            return -jnp.sum(y * jax.nn.log_softmax(outputs), axis=-1)
        return 0.5 * jnp.sum((y - outputs) ** 2, axis=-1)

    def residual(self, outputs: Float[Array, "B C"], y: Float[Array, "B C"]) -> Float[Array, "B C"]:
        """r = -d fit/df: y - f, or y - softmax(f)."""
        return y - (jax.nn.softmax(outputs) if self.loss == "cross_entropy" else outputs)


def decay_penalty(params: dict, decayed: dict, weight_decay: Float[Array, ""]) -> Float[Array, ""]:
    """lambda/2 times the squared norm of every leaf that `decayed` marks."""
    squares = jax.tree.map(
        lambda leaf, is_decayed: jnp.sum(leaf**2) if is_decayed else 0.0, params, decayed
    )
    return 0.5 * weight_decay * jax.tree.reduce(jnp.add, squares, 0.0)
