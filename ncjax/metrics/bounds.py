"""Bounds collapse by its measured causes: every bound holds at any weights, at any moment.

The equilibrium budget (see `theory.budget`) writes lambda W as the theorem's term and four
deviations from it: mean, asymmetry, within, gradient. The functions below turn the sizes of the
deviations into bounds on NC1 to NC4. None assumes an equilibrium or a symmetry; what is not there
yet, such as an equilibrium, is one of the causes. Derivations are in docs/theory.md, section 5.

Notation: W (C, p) the head, Mdot^T (C, p) the centred class means as rows, P = I - J/C, K = Mdot^T
Mdot their Gram matrix, d = h - mu_c an example's deviation from its class mean, Sigma_W = mean d
d^T, t the factor of P in the mean residuals.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ncjax.metrics import collapse
from ncjax.metrics.theory import Budget


class DualityBounds(NamedTuple):
    """Holds upper bounds on NC3; see `bound_duality`."""

    nc3: Float[Array, ""]
    nc3_centered: Float[Array, ""]


class GramBounds(NamedTuple):
    """Holds upper bounds on NC2 of the class means, and what they are made of; see `bound_gram`.

    Attributes:
      etf: bounds `etf_error`.
      equinorm: bounds `nc2_equinorm_means`.
      equiangular: bounds `nc2_equiangular_means`.
      shares: the share of each deviation in the squared size of their bound; they sum to 1.
    """

    etf: Float[Array, ""]
    equinorm: Float[Array, ""]
    equiangular: Float[Array, ""]
    shares: Float[Array, " causes"]


class ScatterBound(NamedTuple):
    """Holds an upper bound on NC1, and the share of outputs in its root; see `bound_scatter`."""

    nc1: Float[Array, ""]
    share_outputs: Float[Array, ""]


def _norms_outside(
    matrices: Float[Array, "k C p"], direction: Float[Array, "C p"]
) -> Float[Array, ""]:
    """Returns the sum of the Frobenius norms of what of matrices is orthogonal to a direction."""
    along = jnp.sum(matrices * direction[None], (1, 2)) / jnp.sum(direction**2)
    outside = matrices - along[:, None, None] * direction[None]
    return jnp.linalg.norm(outside, axis=(1, 2)).sum()


def _across(matrices: Float[Array, "k C p"]) -> Float[Array, "k C p"]:
    """Returns P X of matrices X."""
    return jax.vmap(collapse.centred_means)(matrices)


def _bound_angle(
    theorem: Float[Array, "C p"],
    head: Float[Array, "C p"],
    deviations: Float[Array, "k C p"],
    weight_decay: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns a bound on 2 - 2 cos(theorem, head), for lambda head = theorem + sum of deviations.

    Orthogonally to the head the deviations balance the theorem's term, and orthogonally to that
    term they balance lambda times the head: sin is at most the sum of the norms of what of them is
    orthogonal, over the norm of the term or of lambda times the head. It is NaN where the cosine is
    not positive.
    """
    across = _norms_outside(deviations, head) / jnp.linalg.norm(theorem)
    along = _norms_outside(deviations, theorem) / (weight_decay * jnp.linalg.norm(head))
    sine = jnp.fmin(jnp.fmin(across, along), 1.0)
    bound = 2 * sine**2 / (1 + jnp.sqrt(1 - sine**2))
    return jnp.where(jnp.sum(theorem * head) > 0, bound, jnp.nan)


def bound_duality(
    terms: Budget,
    head: Float[Array, "C p"],
    nc3_floor: Float[Array, ""],
    t: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> DualityBounds:
    """Bounds NC3 and centred NC3 by the deviations of the equilibrium budget.

    With the rows of the head centred the mean term drops out. NC3 then follows from its floor: 1 -
    nc3/2 = (1 - nc3_centered/2) (1 - nc3_floor/2). The least of this bound and of that without
    centring is taken, so that the mean term, where it is small, need not count.

    Returns:
      The bounds, at most 2; NaN where t <= 0 or the head is at no acute angle with the means.
    """
    deviations = jnp.stack(terms[1:])
    centred = _bound_angle(
        terms.theorem, collapse.centred_means(head), _across(deviations[1:]), weight_decay
    )
    by_floor = 2 - (2 - centred) * (1 - nc3_floor / 2)
    whole = jnp.fmin(by_floor, _bound_angle(terms.theorem, head, deviations, weight_decay))
    return DualityBounds(
        *(jnp.where(t > 0, jnp.minimum(bound, 2), jnp.nan) for bound in (whole, centred))
    )


def gram_deviations(
    terms: Budget,
    centred_means: Float[Array, "C p"],
    logit_rest: Float[Array, "C C"],
    t: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> Float[Array, "causes C C"]:
    """Returns the four matrices that K = Mdot^T Mdot differs from a multiple u P by.

    The budget times Mdot, P on its left, is an identity for K: P W Mdot = a P + P E P with a and E
    of the class-mean outputs, and the mean term drops out. The matrices are the symmetric parts, as
    K is symmetric, and orthogonal to P.

    Args:
      logit_rest: E, what of the class-mean outputs is not symmetric between classes.
    """
    factor = len(centred_means) / jnp.where(t > 0, t, jnp.nan)
    products = -(_across(jnp.stack(terms[2:])) @ centred_means.T)
    outputs = weight_decay * collapse.centred_means(collapse.centred_means(logit_rest).T)
    matrices = factor * jnp.concatenate([products, outputs[None]])
    matrices = (matrices + matrices.mT) / 2
    across = jnp.eye(len(centred_means)) - 1 / len(centred_means)
    multiples = jnp.trace(matrices, axis1=1, axis2=2) / (len(centred_means) - 1)
    return matrices - multiples[:, None, None] * across[None]


def bound_gram(
    deviations: Float[Array, "causes C C"], centred_means: Float[Array, "C p"]
) -> GramBounds:
    """Bounds NC2 of the class means by what keeps their Gram matrix from a multiple of P.

    K = u P + sum of the deviations, so that no entry of K - u P is larger than the sum of the
    deviations' absolute values there. That matrix bounds the angle of K with P, each class's norm
    and each pair's cosine.

    Returns:
      The bounds, never above what NC2 of any means can be; NaN where the deviations are.
    """
    num_classes = len(centred_means)
    total = jnp.sum(centred_means**2)
    square = total / num_classes  # the mean over classes of ||mu_c - mu_G||^2
    absolute = jnp.abs(deviations)
    bound = absolute.sum(0)
    tangent_sq = jnp.sum(bound**2) * (num_classes - 1) / total**2
    secant = jnp.sqrt(1 + tangent_sq)
    # 2 - 2/secant, without the difference of near numbers.
    etf = jnp.sqrt(2 * tangent_sq / (secant * (1 + secant)))

    norms = jnp.diagonal(bound) / square
    least = 1 - jnp.minimum(norms, 1)
    # sqrt(1 + x) >= 1 + x/2 - curvature x^2 for x >= -max(norms), and the mean of x is 0.
    curvature = 0.5 / (1 + jnp.sqrt(least.min())) ** 2
    mean_norm = 1 - curvature * jnp.mean(norms**2)
    # No norms differ by more than if one alone is not 0.
    equinorm = jnp.sqrt(jnp.maximum(1 / mean_norm**2 - 1, 0))
    most = jnp.sqrt(num_classes - 1)
    equinorm = jnp.where(mean_norm > 0, jnp.minimum(equinorm, most), most)

    # |cos + 1/(C-1)| for the pair: the greatest is at the least product of both norms.
    ideal = 1 / (num_classes - 1)
    shrink = jnp.sqrt(least[:, None] * least[None, :])
    angles = (bound / square + ideal) / jnp.where(shrink > 0, shrink, jnp.nan) - ideal
    angles = jnp.fmin(angles, 1 + ideal)
    pairs = num_classes * (num_classes - 1)
    angle = jnp.where(jnp.eye(num_classes, dtype=bool), 0, angles).sum() / pairs
    defined = jnp.isfinite(tangent_sq)
    etf, equinorm, angle = (jnp.where(defined, x, jnp.nan) for x in (etf, equinorm, angle))
    shares = jnp.sum(absolute * bound[None], (1, 2)) / jnp.sum(bound**2)
    return GramBounds(etf, equinorm, angle, shares)


def bound_scatter(
    head: Float[Array, "C p"],
    head_scatter: Float[Array, "C p"],
    centred_means: Float[Array, "C p"],
    basis: Float[Array, "k p"],
    spectrum: Float[Array, " k"],
    nc1: Float[Array, ""],
    t: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> ScatterBound:
    """Bounds NC1 by the scatter of outputs, and by that of what the theorem leaves of the head.

    nc1 = mean ||Mdot^+ d||^2 = mean ||K^+ Mdot^T d||^2, and P times the budget is Mdot^T = (C/t)
    (lambda P W - R), with R the sum of its asymmetry, within and gradient terms. So

        sqrt(nc1) <= C/t (lambda sqrt(mean ||K^+ P W d||^2) + sqrt(mean ||K^+ R d||^2)).

    Args:
      head_scatter: W Sigma_W, which is minus the within term with the square loss.
      basis: the left singular vectors u_j of Mdot as rows.
      spectrum: the singular values of Mdot/sqrt(C); directions in which it is 0 are left out.
      nc1: NC1.

    Returns:
      The bound and the first term's share of its root; NaN where t <= 0, at lambda = 0, and where
      the centred means have a rank below C - 1.
    """
    num_classes = len(head)
    kept = spectrum > 0
    values = jnp.where(kept, spectrum * jnp.sqrt(num_classes), 1)
    # Row j is v_j/s_j^2 for K = sum_j s_j^2 v_j v_j^T; its product with P W is the same as with W.
    inverse = (basis @ centred_means.T) * jnp.where(kept, values**-3, 0)[:, None]
    means = inverse @ centred_means
    heads = inverse @ collapse.centred_means(head)
    scatter = inverse @ collapse.centred_means(head_scatter)
    factor = weight_decay * num_classes / jnp.where((t > 0) & (weight_decay > 0), t, jnp.nan)
    outputs = factor**2 * jnp.sum(scatter * heads)
    # E||K^+ (lambda P W - t/C Mdot^T) d||^2, by its three products; rounding may leave it below 0.
    rest = outputs - 2 * factor * jnp.sum(scatter * means) + nc1
    first = jnp.sqrt(jnp.maximum(outputs, 0))
    root = first + jnp.sqrt(jnp.maximum(rest, 0))
    whole = jnp.count_nonzero(kept) == num_classes - 1
    return ScatterBound(jnp.where(whole, root**2, jnp.nan), jnp.where(whole, first / root, jnp.nan))


def bound_nc4(
    nc1: Float[Array, ""], centred_means: Float[Array, "C p"], accuracy: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns a bound on NC4 by NC1: 1 - accuracy + nc1/r^2, at most 1.

    An example outside the ball of radius r about its class mean has ||Mdot^+ d|| >= r, and the
    share of those is at most nc1/r^2 (Markov). r is the least of `collapse.radii_sq`; for a simplex
    ETF the bound is 1 - accuracy + 2 nc1.
    """
    return jnp.minimum(1 - accuracy + nc1 / jnp.min(collapse.radii_sq(centred_means)), 1)


def fit_loss_floor(
    residual_dot_logit: Float[Array, ""], mean_square_logit: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns a lower bound on the fit term: mean<r, f - b>^2/(2 mean ||f - b||^2).

    By Cauchy and Schwarz it is at most mean ||r||^2/2, which is the square loss and no more than
    the cross-entropy. At a critical point mean<r, f - b> is lambda ||W_k||^2 for every layer k: no
    network with weight decay interpolates. It is 0 where the mean is negative.
    """
    return jnp.maximum(residual_dot_logit, 0) ** 2 / (2 * mean_square_logit)
