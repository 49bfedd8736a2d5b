"""Computes what theory says of a trained network: equilibrium, norm balance, Lemmas 1 and 2,
theorem, budget. Pure arrays.

Notation: r = y - f the residual (y - softmax(f) with cross-entropy), b the head bias, mean the mean
over all examples, W (C, p) the head, M^T (C, p) the class means mu_c as rows, mu_G their mean, Mdot
the centred means, J all ones, G_k the gradient of the fit term with respect to W_k, L the
regularized loss. Statements after Rangamani & Banburski (ICASSP 2022) unless said; derivations in
docs/theory.md. Closed forms of whole models are in `closed_forms`.
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
    """||lambda W_k + G_k||/||lambda W_k||: 0 at every critical point of L. NaN at lambda = 0,
    where it is undefined.
    """
    decay = weight_decay * weight
    residual = jnp.linalg.norm((decay + fit_gradient).ravel()) / jnp.linalg.norm(decay.ravel())
    return jnp.where(weight_decay > 0, residual, jnp.nan)


def norm_target(
    residual_dot_logit: Float[Array, ""], weight_decay: Float[Array, ""]
) -> Float[Array, ""]:
    """mean<r, f - b>/lambda: what ||W_k||_F^2 is at equilibrium, the same for every k. NaN at
    lambda = 0.
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
    """Largest over layers l of |L - RHS_l|/L, where at every moment of training

    RHS_l = -1/4 d||W_l||^2/dt + lambda/2 sum_{k != l} ||W_k||^2 + 1/2 mean<r, y - b> + lambda_b/2
    ||b||^2,

    and d||W_l||^2/dt = -2 <W_l, G_l + lambda W_l> along gradient flow. An identity for degree-1
    homogeneous layers. For a layer of degree d its first term is divided by d, and lambda/2 (1 -
    1/d) ||W_l||^2 is added; layers of degree 0 or none are left out.

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
    """2 lambda t: the number of e-folds by which squared layer norms have drawn together along
    gradient flow.

    d/dt (||W_k||^2 - ||W_l||^2) = -2 lambda (||W_k||^2 - ||W_l||^2). NaN at lambda = 0.
    """
    return np.where(weight_decay > 0, 2 * weight_decay * flow_time, np.nan)


def collapsed_loss(alpha: Float[np.ndarray, "..."], num_classes: int) -> np.ndarray:
    """Lemma 1: fit term of a collapsed solution without bias whose outputs are W M = alpha C/(C-1)
    (I - J/C).

    1/2 ((1 - alpha)^2 + alpha^2/(C-1)): least at alpha = (C-1)/C, where it is 1/(2C) > 0. Such a
    solution never interpolates one-hot targets; at that alpha, with a bias of 1/C or centred
    targets, it does.
    """
    alpha = np.asarray(alpha)
    return 0.5 * ((1 - alpha) ** 2 + alpha**2 / (num_classes - 1))


def theorem_residual(
    epsilon: Float[Array, ""],
    head: Float[Array, "C p"],
    centred_means: Float[Array, "C p"],
    weight_decay: Float[Array, ""],
) -> Float[Array, ""]:
    """||W - W_theorem||/||W||, where W_theorem^c = epsilon/(lambda (C-1)) (mu_c - mu_G); NaN at
    lambda = 0.

    The theorem as stated, exact under symmetric quasi-interpolation at equilibrium.
    """
    predicted = epsilon / (weight_decay * (len(head) - 1)) * centred_means
    return jnp.where(
        weight_decay > 0, jnp.linalg.norm(head - predicted) / jnp.linalg.norm(head), jnp.nan
    )


class SymmetricSolution(NamedTuple):
    """Holds what collapse and equilibrium together imply for a head whose classes are all alike.

    Attributes:
      head_norm_sq: ||W||_F^2.
      head_cosine: cos(W^c, W^c') of every pair.
      nc3: NC3, 0 only where the sum of the outputs is met by a bias or not asked for. No bound:
        where classes are not alike, NC3 may be less; the floor at any weights is
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
    """The theorem without its assumption that residuals sum to zero.

    With W M = a (I - J/C) + s_W J/C and Rbar = t (I - J/C) + q J/C, equilibrium lambda W = Rbar
    M^T/C gives

        W W^T = (w_p (I - J/C) + w_1 J/C)/(lambda C),   w_p = a t,   w_1 = s_W q,

    hence ||W||_F^2, the cosines and NC3 = 2 - 2 sqrt((C-1) w_p/(w_1 + (C-1) w_p)). Square loss: a =
    1 - t, and without bias s_W = 1 - q (one-hot targets). w_1 = 0 (the theorem: cosines -1/(C-1),
    NC3 = 0) with a free bias or centred targets; w_1 = w_p (orthogonal frame) without bias where
    delta = 0.

    Args:
      logits: symmetric part of W M, the class-mean outputs less the bias.
      residuals: symmetric part of Rbar, the class-mean residuals.

    Returns:
      NaN where there is no such solution: lambda = 0, w_p <= 0 or w_1 < 0 (by more than 1% of (C-1)
      w_p: rounding and the rest of training leave a w_1 that should vanish on either side of 0).
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
    """lambda W as five terms, each (C, p). See `budget`."""

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
    """Returns where a head deviates from the theorem, and why: an identity at every moment of
    training, without assumption.

    lambda W = (t/C) Mdot^T + (q/C) 1 mu_G^T + (1/C) E M^T + K + G with Rbar = t (I - J/C) + q J/C +
    E.

    Args:
      mean_residuals: row c is the mean residual of class c (Rbar has it as column c).
      means: row c is mu_c.
      covariance: K = mean (r - rbar_c)(h - mu_c)^T; at square loss -W Sigma_W.
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
    """Each term's share of lambda W by projection (they sum to 1; NaN at lambda = 0), its Frobenius
    norm, and `budget_residual`, the norm of what the five leave of lambda W over that of the
    largest."""
    whole = weight_decay * head
    norms = {name: jnp.linalg.norm(term) for name, term in terms._asdict().items()}
    account = {
        f"budget_{name}": jnp.where(
            weight_decay > 0, jnp.sum(term * whole) / jnp.sum(whole**2), jnp.nan
        )
        for name, term in terms._asdict().items()
    }
    account |= {f"budget_{name}_norm": norm for name, norm in norms.items()}
    largest = jnp.max(jnp.stack(list(norms.values())))
    return account | {"budget_residual": jnp.linalg.norm(whole - sum(terms)) / largest}


def normalized_margin(
    logits: SymmetricPart, weight_norms_sq: Float[Array, " L"], degrees: Sequence[float] = ()
) -> Float[Array, ""]:
    """gamma = a/prod_k ||W_k||_F: the margin a, of W M = a (I - J/C) + ..., of the network with
    all norms one. A layer's norm is to the power of its degree; `degrees` empty: 1.
    """
    if any(degree != 1 for degree in degrees):
        weight_norms_sq = weight_norms_sq ** np.array(degrees)
    return logits.u / jnp.sqrt(jnp.prod(weight_norms_sq))


def mode_eigenvalues(logits: Float[np.ndarray, "... C C"]) -> np.ndarray:
    """Descending eigenvalues of the symmetric part (B + B^T)/2 of B = W M; NaN where B is not
    finite.

    At the symmetric solutions they are the margin a (C - 1 times) and the sum of outputs s_W; past
    the critical lambda they reach 0 one after the other.
    """
    finite = np.asarray(np.isfinite(logits).all((-1, -2)))[..., None]
    symmetric = np.where(finite[..., None], logits + np.swapaxes(logits, -1, -2), 0) / 2
    return np.where(finite, np.linalg.eigvalsh(symmetric)[..., ::-1], np.nan)
