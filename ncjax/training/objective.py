"""Defines the regularized loss L = mean_n loss(f_n, y_n) + lambda/2 sum_k ||W_k||_F^2.

The mean is over all N examples per class times C classes. The square loss is that of the theory,
1/2 ||y_n - f_n||^2 with the norm over all C outputs (Rangamani & Banburski 2022). Cross-entropy is
for contrast (Papyan, Han & Donoho 2020).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ncjax.config import Loss, Targets
from ncjax.errors import unknown_choice


class Objective(NamedTuple):
    """Holds the loss of one example and the kind of its targets.

    Attributes:
      loss: `square` or `cross_entropy`.
      targets: `one_hot`, or `centered`: one-hot less 1/C, so that each row sums to 0.
    """

    loss: Loss = "square"
    targets: Targets = "one_hot"

    def target(self, labels: Int[Array, " B"], num_classes: int, dtype) -> Float[Array, "B C"]:
        """Returns y, a row per label; a label outside [0, C) gives a row of zeros."""
        y = jax.nn.one_hot(labels, num_classes, dtype=dtype)
        match self.targets:
            case "one_hot":
                return y
            case "centered":
                return y - y.mean(1, keepdims=True)
            case unknown:
                raise unknown_choice("targets", unknown, Targets)

    def fit(self, outputs: Float[Array, "B C"], y: Float[Array, "B C"]) -> Float[Array, " B"]:
        """Returns 1/2 ||y - f||^2, or -<y, log softmax(f)>."""
        match self.loss:
            case "square":
                return 0.5 * jnp.sum((y - outputs) ** 2, axis=-1)
            case "cross_entropy":
                return -jnp.sum(y * jax.nn.log_softmax(outputs), axis=-1)
            case unknown:
                raise unknown_choice("loss", unknown, Loss)

    def residual(self, outputs: Float[Array, "B C"], y: Float[Array, "B C"]) -> Float[Array, "B C"]:
        """Returns r = -d fit/df: y - f, or y - softmax(f)."""
        match self.loss:
            case "square":
                return y - outputs
            case "cross_entropy":
                return y - jax.nn.softmax(outputs)
            case unknown:
                raise unknown_choice("loss", unknown, Loss)


def decay_penalty(params: dict, decayed: dict, weight_decay: Float[Array, ""]) -> Float[Array, ""]:
    """Returns lambda/2 times the squared norm of every leaf times its factor in `decayed`.

    A leaf that is not decayed has False there.
    """
    squares = jax.tree.map(
        lambda leaf, factor: 0.0 if factor is False else factor * jnp.sum(leaf**2), params, decayed
    )
    return 0.5 * weight_decay * jax.tree.reduce(jnp.add, squares, 0.0)
