"""Computes what is known of class means where they need not be a simplex ETF: spread on the sphere,
margins, ranks.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ncjax.metrics.statistics import AnyArray


def effective_rank(singular_values: Float[AnyArray, "*batch k"]) -> Any:
    """Returns exp(-sum p_j log p_j), p the singular values over their sum; NaN of zeros.

    Args:
      singular_values: of NumPy or JAX.

    References:
      Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    """
    xp = singular_values.__array_namespace__()
    with np.errstate(invalid="ignore"):
        shares = singular_values / singular_values.sum(axis=-1, keepdims=True)
    # The logarithm of 0 is taken for 0, and NaN stays NaN.
    logarithms = xp.log(xp.where(shares > 0, shares, 1))
    return xp.exp(-(shares * logarithms).sum(axis=-1))


def condition_number(singular_values: Float[AnyArray, "*batch k"]) -> Any:
    """Returns the largest over the smallest; infinite where one is 0, NaN where all are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return singular_values[..., 0] / singular_values[..., -1]


def normalized(rows: Float[AnyArray, "C p"]) -> Any:
    """Returns rows of norm 1, of NumPy as of JAX; NaN for a row of zeros."""
    with np.errstate(invalid="ignore"):
        return rows / (rows**2).sum(axis=1, keepdims=True) ** 0.5


def hyperspherical_uniformity(units: Float[Array, "C p"]) -> Float[Array, ""]:
    """Returns the standard deviation over pairs of log 1/||u - u'||.

    It is 0 where all distances are equal, as of a simplex ETF, and small of points that spread
    evenly where classes are more than dimensions. NaN where two points are the same.

    References:
      Liu et al., "Generalizing and decoupling neural collapse via hyperspherical uniformity gap",
      ICLR 2023; Wu & Papyan, "Linguistic collapse", NeurIPS 2024.
    """
    upper = np.triu_indices(len(units), 1)
    squares = jnp.maximum(2 - 2 * (units @ units.T)[upper], 0)
    return jnp.std(-jnp.log(squares) / 2)


def one_vs_rest_margin(units: Float[np.ndarray, "C p"]) -> float:
    """Returns the least distance of a point from the convex hull of the others, on the host.

    With the points a_j - u below a row of ones, non-negative least squares minimizes
    t^2 d^2 + (1 - t)^2 over t and points of the hull at a distance d from u: its square is
    d^2/(1 + d^2).

    References:
      Jiang et al., "Generalized neural collapse for a large number of classes", ICML 2024.
    """
    from scipy.optimize import nnls

    least = np.inf
    target = np.append(np.zeros(units.shape[1]), 1.0)
    for i, unit in enumerate(units):
        others = np.delete(units, i, axis=0) - unit
        residual = nnls(np.vstack([others.T, np.ones(len(others))]), target)[1]
        least = min(least, residual / np.sqrt(max(1 - residual**2, np.finfo(float).tiny)))
    return float(least)


def uniform_duality(head: Float[Array, "C p"], units: Float[Array, "C p"]) -> Float[Array, ""]:
    """Returns the standard deviation over classes of the cosine of a head's row and a class mean.

    References:
      Wu & Papyan, "Linguistic collapse", NeurIPS 2024.
    """
    return jnp.std(jnp.sum(normalized(head) * units, axis=1))


def auroc(positive: Float[np.ndarray, " N"], negative: Float[np.ndarray, " M"]) -> float:
    """Returns the share of pairs in which the positive score is the larger; a tie counts half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(negative)))
