"""What theory says of a trained network: gradient-flow equilibrium, norm balance, Lemma 2. Pure arrays.

Notation: r = y - f the residual, b the head bias, mean the mean over all NC examples, G_k the gradient of the fit term
1/2 mean ||r||^2 with respect to W_k, L the regularized loss. Statements after Rangamani & Banburski (ICASSP 2022).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def equilibrium_residual(
    weight: Float[Array, "..."], fit_gradient: Float[Array, "..."], weight_decay: Float[Array, ""]
) -> Float[Array, ""]:
    """||lambda W_k + G_k||/||lambda W_k||: 0 at every critical point of L. NaN at lambda = 0, where it is undefined."""
    decay = weight_decay * weight
    residual = jnp.linalg.norm((decay + fit_gradient).ravel()) / jnp.linalg.norm(decay.ravel())
    return jnp.where(weight_decay > 0, residual, jnp.nan)


def norm_target(residual_dot_logit: Float[Array, ""], weight_decay: Float[Array, ""]) -> Float[Array, ""]:
    """mean<r, f - b>/lambda: what ||W_k||_F^2 is at equilibrium, the same for every k. NaN at lambda = 0."""
    return jnp.where(weight_decay > 0, residual_dot_logit / weight_decay, jnp.nan)


def lemma2_residual(
    loss: Float[Array, ""],
    weight_norms_sq: Float[Array, " L"],
    weight_dot_gradient: Float[Array, " L"],
    residual_dot_target: Float[Array, ""],
    bias_penalty: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> Float[Array, ""]:
    """Largest over layers l of |L - RHS_l|/L, where at every moment of training

    RHS_l = -1/4 d||W_l||^2/dt + lambda/2 sum_{k != l} ||W_k||^2 + 1/2 mean<r, y - b> + lambda_b/2 ||b||^2,

    and d||W_l||^2/dt = -2 <W_l, G_l + lambda W_l> along gradient flow. An identity for degree-1 homogeneous layers.

    Args:
      weight_norms_sq: ||W_k||_F^2.
      weight_dot_gradient: <W_k, G_k>.
      residual_dot_target: mean<r, y - b>.
      bias_penalty: lambda_b/2 ||b||^2.
    """
    shrinkage = -2 * (weight_dot_gradient + weight_decay * weight_norms_sq)
    others = weight_norms_sq.sum() - weight_norms_sq
    right = -shrinkage / 4 + weight_decay / 2 * others + residual_dot_target / 2 + bias_penalty
    return jnp.max(jnp.abs(loss - right)) / loss


def relaxation_time(flow_time: Float[np.ndarray, "..."], weight_decay: Float[np.ndarray, "..."]) -> np.ndarray:
    """2 lambda t: the number of e-folds by which squared layer norms have drawn together along gradient flow.

    d/dt (||W_k||^2 - ||W_l||^2) = -2 lambda (||W_k||^2 - ||W_l||^2). NaN at lambda = 0.
    """
    return np.where(weight_decay > 0, 2 * weight_decay * flow_time, np.nan)
