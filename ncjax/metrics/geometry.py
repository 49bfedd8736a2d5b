"""Computes what is known of class means where they need not be a simplex ETF: spread on the sphere,
margins, ranks. Float64 NumPy; small arrays.
"""

import numpy as np
from jaxtyping import Float


def effective_rank(singular_values: Float[np.ndarray, " k"]) -> float:
    """Returns exp(-sum p_j log p_j), p the singular values over their sum; NaN of zeros.

    References:
      Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = singular_values.sum()
    if not total:
        return float("nan")
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def condition_number(singular_values: Float[np.ndarray, " k"]) -> float:
    """Returns the largest over the smallest; infinite where one is 0, NaN where all are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(singular_values[0], singular_values[-1]))


def normalized(rows: Float[np.ndarray, "C p"]) -> Float[np.ndarray, "C p"]:
    """Returns rows of norm 1; NaN for a row of zeros."""
    with np.errstate(invalid="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def hyperspherical_uniformity(units: Float[np.ndarray, "C p"]) -> float:
    """Returns the standard deviation over pairs of log 1/||u - u'||.

    It is 0 where all distances are equal, as of a simplex ETF, and small of points that spread
    evenly where classes are more than dimensions. NaN where two points are the same.

    References:
      Liu et al., "Generalizing and decoupling neural collapse via hyperspherical uniformity gap",
      ICLR 2023; Wu & Papyan, "Linguistic collapse", NeurIPS 2024.
    """
    upper = np.triu_indices(len(units), 1)
    squares = np.maximum(2 - 2 * (units @ units.T)[upper], 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.std(-np.log(squares) / 2))


def one_vs_rest_margin(units: Float[np.ndarray, "C p"]) -> float:
    """Returns the least distance of a point from the convex hull of the others.

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


def uniform_duality(head: Float[np.ndarray, "C p"], units: Float[np.ndarray, "C p"]) -> float:
    """Returns the standard deviation over classes of the cosine of a head's row and a class mean.

    References:
      Wu & Papyan, "Linguistic collapse", NeurIPS 2024.
    """
    return float(np.std(np.sum(normalized(head) * units, axis=1)))


def auroc(positive: Float[np.ndarray, " N"], negative: Float[np.ndarray, " M"]) -> float:
    """Returns the share of pairs in which the positive score is the larger; a tie counts half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(negative)))
