"""Computes what theory says of training: equilibrium, norm balance, two lemmas, theorem and budget.

All functions take and return arrays. Notation: r = y - f the residual (y - softmax(f) with
cross-entropy), b the head bias, mean the mean over all examples, W (C, p) the head, M^T (C, p) the
class means mu_c as rows, mu_G their mean, Mdot the centred means, J all ones, G_k the gradient of
the fit term with respect to W_k, L the regularized loss. Statements are after Rangamani & Banburski
(ICASSP 2022) unless said otherwise; derivations are in docs/theory.md. Closed forms of whole models
are in `closed_forms`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ncjax.metrics.linalg import SymmetricPart, symmetric_part


def equilibrium_residual(
    weight: Float[Array, "..."], fit_gradient: Float[Array, "..."], weight_decay: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns ||lambda W_k + G_k||/||lambda W_k||, which is 0 at every critical point of L.

    It is NaN at lambda = 0, where it is undefined.
    """
    decay = weight_decay * weight
    residual = jnp.linalg.norm((decay + fit_gradient).ravel()) / jnp.linalg.norm(decay.ravel())
    return jnp.where(weight_decay > 0, residual, jnp.nan)


def norm_target(
    residual_dot_logit: Float[Array, ""], weight_decay: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns mean<r, f - b>/lambda, which ||W_k||_F^2 equals at equilibrium for every k.

    It is NaN at lambda = 0.
    """
    return jnp.where(weight_decay > 0, residual_dot_logit / weight_decay, jnp.nan)


def lemma2_residual(
    loss: Float[Array, ""],
    weight_norms_sq: Float[Array, " L"],
    weight_dot_gradient: Float[Array, " L"],
    residual_dot_target: Float[Array, ""],
    bias_penalty: Float[Array, ""],
    weight_decay: Float[Array, ""],
    degrees: Sequence[float] = (),
) -> Float[Array, ""]:
    """Returns the largest |L - RHS_l|/L over the layers l, with RHS_l the right side of Lemma 2:

    RHS_l = -1/4 d||W_l||^2/dt + lambda/2 sum_{k != l} ||W_k||^2 + 1/2 mean<r, y - b> + lambda_b/2
    ||b||^2,

    and d||W_l||^2/dt = -2 <W_l, G_l + lambda W_l> along gradient flow. L = RHS_l is an identity at
    every moment of training for degree-1 homogeneous layers. For a layer of degree d the first term
    is divided by d, and lambda/2 (1 - 1/d) ||W_l||^2 is added; layers of degree 0 or none are left
    out.

    Args:
      weight_norms_sq: ||W_k||_F^2, times its factor where a layer is decayed by another lambda.
      weight_dot_gradient: <W_k, G_k>.
      residual_dot_target: mean<r, y - b>.
      bias_penalty: lambda_b/2 ||b||^2, and of all else that is decayed and no weight.
      degrees: of each layer, NaN where it has none; empty: 1.
    """
    shrinkage = -2 * (weight_dot_gradient + weight_decay * weight_norms_sq)
    own = weight_norms_sq
    chosen = [i for i, degree in enumerate(degrees) if degree > 0]
    if any(degree != 1 for degree in degrees):
        at = np.array([degrees[i] for i in chosen])
        shrinkage, own = shrinkage[np.array(chosen)] / at, own[np.array(chosen)] / at
    others = weight_norms_sq.sum() - own
    right = -shrinkage / 4 + weight_decay / 2 * others + residual_dot_target / 2 + bias_penalty
    return jnp.max(jnp.abs(loss - right)) / loss


def relaxation_time(
    flow_time: Float[np.ndarray, "..."], weight_decay: Float[np.ndarray, "..."]
) -> np.ndarray:
    """Returns 2 lambda t, the e-folds by which differences of squared layer norms have decayed.

    Along gradient flow d/dt (||W_k||^2 - ||W_l||^2) = -2 lambda (||W_k||^2 - ||W_l||^2). It is NaN
    at lambda = 0.
    """
    return np.where(weight_decay > 0, 2 * weight_decay * flow_time, np.nan)


def collapsed_loss(alpha: Float[np.ndarray, "..."], num_classes: int) -> np.ndarray:
    """Returns the fit term 1/2 ((1 - alpha)^2 + alpha^2/(C-1)) of a collapsed solution (Lemma 1).

    The solution has no bias and outputs W M = alpha C/(C-1) (I - J/C). The least value, at alpha =
    (C-1)/C, is 1/(2C) > 0, so that it never interpolates one-hot targets. With a bias of 1/C or
    centred targets it does, at that alpha.
    """
    alpha = np.asarray(alpha)
    return 0.5 * ((1 - alpha) ** 2 + alpha**2 / (num_classes - 1))


def theorem_residual(
    epsilon: Float[Array, ""],
    head: Float[Array, "C p"],
    centred_means: Float[Array, "C p"],
    weight_decay: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns ||W - W_theorem||/||W|| with W_theorem^c = epsilon/(lambda (C-1)) (mu_c - mu_G).

    This is the theorem as stated, exact under symmetric quasi-interpolation at equilibrium. It is
    NaN at lambda = 0.
    """
    predicted = epsilon / (weight_decay * (len(head) - 1)) * centred_means
    return jnp.where(
        weight_decay > 0, jnp.linalg.norm(head - predicted) / jnp.linalg.norm(head), jnp.nan
    )


class SymmetricSolution(NamedTuple):
    """Holds what collapse and equilibrium imply for a head that treats all classes the same.

    Attributes:
      head_norm_sq: ||W||_F^2.
      head_cosine: cos(W^c, W^c') of every pair.
      nc3: NC3, which is 0 only if a bias fits the sum of the outputs, or the targets sum to 0. It
        is no bound: without the symmetry NC3 may be less. The least value at any weights is
        `collapse.nc3_floor`.
    """

    head_norm_sq: Float[Array, ""]
    head_cosine: Float[Array, ""]
    nc3: Float[Array, ""]


def symmetric_solution(
    logits: SymmetricPart,
    residuals: SymmetricPart,
    num_classes: int,
    weight_decay: Float[Array, ""],
) -> SymmetricSolution:
    """Solves the theorem without its assumption that residuals sum to zero.

    With W M = a (I - J/C) + s_W J/C and Rbar = t (I - J/C) + q J/C, equilibrium lambda W = Rbar
    M^T/C gives

        W W^T = (w_p (I - J/C) + w_1 J/C)/(lambda C),   w_p = a t,   w_1 = s_W q,

    hence ||W||_F^2, the cosines and NC3 = 2 - 2 sqrt((C-1) w_p/(w_1 + (C-1) w_p)). The square loss
    has a = 1 - t, and s_W = 1 - q without bias (one-hot targets). A free bias or centred targets
    give w_1 = 0, which is the theorem: cosines -1/(C-1) and NC3 = 0. Without bias and at delta = 0,
    w_1 = w_p: an orthogonal frame.

    Args:
      logits: the symmetric part of W M, the class-mean outputs less the bias.
      residuals: the symmetric part of Rbar, the class-mean residuals.

    Returns:
      The solution, NaN if there is none: at lambda = 0, w_p <= 0 or w_1 < 0. A negative w_1 counts
      as 0 up to 1% of (C-1) w_p, because rounding and unfinished training leave a w_1 that should
      be 0 on either side of it.
    """
    differences, total = (num_classes - 1) * logits.u * residuals.u, logits.v * residuals.v
    exists = (weight_decay > 0) & (differences > 0) & (total > -0.01 * differences)
    total = jnp.maximum(total, 0)
    trace = differences + total
    return SymmetricSolution(
        *(
            jnp.where(exists, value, jnp.nan)
            for value in (
                trace / (weight_decay * num_classes),
                (total - differences / (num_classes - 1)) / trace,
                2 - 2 * jnp.sqrt(differences / trace),
            )
        )
    )


class Budget(NamedTuple):
    """Holds the five terms, each (C, p), that sum to lambda W; see `budget`."""

    theorem: Float[Array, "C p"]
    mean: Float[Array, "C p"]
    asymmetry: Float[Array, "C p"]
    within: Float[Array, "C p"]
    gradient: Float[Array, "C p"]


def budget(
    mean_residuals: Float[Array, "C C"],
    means: Float[Array, "C p"],
    covariance: Float[Array, "C p"],
    gradient: Float[Array, "C p"],
) -> Budget:
    """Returns the terms of lambda W that separate the theorem from its deviations.

    lambda W = (t/C) Mdot^T + (q/C) 1 mu_G^T + (1/C) E M^T + K + G with Rbar = t (I - J/C) + q J/C +
    E. This is an identity at every moment of training, without assumptions.

    Args:
      mean_residuals: the mean residual of class c in row c (Rbar has it as column c).
      means: mu_c in row c.
      covariance: K = mean (r - rbar_c)(h - mu_c)^T, which is -W Sigma_W with the square loss.
      gradient: G = dL/dW.
    """
    num_classes = len(means)
    t, q, asymmetry = symmetric_part(mean_residuals)
    center = means.mean(0, keepdims=True)
    return Budget(
        theorem=t / num_classes * (means - center),
        mean=q / num_classes * jnp.broadcast_to(center, means.shape),
        asymmetry=asymmetry.T @ means / num_classes,
        within=covariance,
        gradient=gradient,
    )


def budget_account(
    terms: Budget, head: Float[Array, "C p"], weight_decay: Float[Array, ""]
) -> dict[str, Array]:
    """Returns each term's share of lambda W, each term's Frobenius norm and `budget_residual`.

    Shares are by projection and sum to 1; they are NaN at lambda = 0. `budget_residual` is the norm
    of lambda W less the five terms, over the norm of the largest term.
    """
    whole, stacked = weight_decay * head, jnp.stack(terms)
    norms = jnp.linalg.norm(stacked, axis=(1, 2))
    along = jnp.sum(stacked * whole[None], (1, 2)) / jnp.sum(whole**2)
    shares = jnp.where(weight_decay > 0, along, jnp.nan)
    account = {f"budget_{name}": shares[i] for i, name in enumerate(terms._fields)}
    account |= {f"budget_{name}_norm": norms[i] for i, name in enumerate(terms._fields)}
    return account | {"budget_residual": jnp.linalg.norm(whole - sum(terms)) / norms.max()}


def normalized_margin(
    logits: SymmetricPart, weight_norms_sq: Float[Array, " L"], degrees: Sequence[float] = ()
) -> Float[Array, ""]:
    """Returns gamma = a/prod_k ||W_k||_F, the margin of the network with all norms one.

    The margin a of the network itself is that of W M = a (I - J/C) + .... A layer's norm is raised
    to the power of its degree; `degrees` empty: 1.
    """
    if any(degree != 1 for degree in degrees):
        weight_norms_sq = weight_norms_sq ** np.array(degrees)
    return logits.u / jnp.sqrt(jnp.prod(weight_norms_sq))


def mode_eigenvalues(logits: Float[np.ndarray, "... C C"]) -> np.ndarray:
    """Returns the eigenvalues, descending, of the symmetric part (B + B^T)/2 of B = W M.

    They are NaN if B is not finite. At the symmetric solutions they are the margin a (C - 1 times)
    and the sum of outputs s_W; past the critical lambda they reach 0 one after the other.
    """
    finite = np.asarray(np.isfinite(logits).all((-1, -2)))[..., None]
    symmetric = np.where(finite[..., None], logits + np.swapaxes(logits, -1, -2), 0) / 2
    return np.where(finite, np.linalg.eigvalsh(symmetric)[..., ::-1], np.nan)
