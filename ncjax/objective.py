"""The regularized square loss: L = 1/(2NC) sum_n ||y_n - f_n||^2 + lambda/2 sum_k ||W_k||_F^2.

The first sum runs over all NC examples and, in the norm, over all C outputs (Rangamani & Banburski 2022).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def square_loss(outputs: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Half the squared distance of each example's outputs to its target, summed over outputs."""
    return 0.5 * jnp.sum((targets - outputs) ** 2, axis=-1)


def decay_penalty(params: dict, decayed: dict, weight_decay: Float[Array, ""]) -> Float[Array, ""]:
    """lambda/2 times the squared norm of every leaf that `decayed` marks."""
    squares = jax.tree.map(lambda leaf, is_decayed: jnp.sum(leaf**2) if is_decayed else 0.0, params, decayed)
    return 0.5 * weight_decay * jax.tree.reduce(jnp.add, squares, 0.0)
