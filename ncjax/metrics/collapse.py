"""Computes NC1-NC4 and quasi-interpolation from features, labels, residuals and head.

All functions take and return arrays, are safe in float32 and can be vmapped. Two passes over
batches are made, so that no N x p feature matrix is ever held:

    sums = add up `class_sums(...)` over batches;       means = class_means(sums)
    scatter = add up `class_scatter(..., means, ...)`

`vocabulary` computes the metrics from these sums.

Notation: C classes, p features, mu_c (p,) class means, mu_G their mean, Mdot = [mu_c - mu_G],
Sigma_W = mean (h - mu_c)(h - mu_c)^T, Sigma_B = Mdot Mdot^T / C, W (C, p) the head, r = y - f an
example's residual. Class means are stored as rows, (C, p). The second pass centres before it
squares, because E[h^2] - mu^2 can be negative in float32. Arrays of at most (C, p) numbers are
summed and factored in float64, whatever the type of the features. Residuals are summed rather than
outputs, because they may be no more than the outputs' last digits. Definitions are after Papyan,
Han & Donoho (PNAS 2020), Rangamani & Banburski (ICASSP 2022) and Galanti et al. (ICLR 2022, cdnv).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ncjax.metrics.linalg import row_space, symmetric_part

# Means over pairs of classes hold at most this many entries of the (C, C) matrix at once.
_MOST_PAIRS = 2**22


class ClassSums(NamedTuple):
    """Holds the sums of the first pass by class; those of two batches add up to those of both.

    Attributes:
      examples: the number of examples.
      features: the sum of h.
      residuals: the sum of r.
    """

    examples: Float[Array, " C"]
    features: Float[Array, "C p"]
    residuals: Float[Array, "C C"]


class ClassMeans(NamedTuple):
    """Holds mu_c in row c of `features` and the mean residual rbar_c in row c of `residuals`."""

    features: Float[Array, "C p"]
    residuals: Float[Array, "C C"]


class Scatter(NamedTuple):
    """Holds the sums of the second pass, of squares and products of deviations from class means.

    Attributes:
      examples: the number of examples of each class.
      within: the sum of ||h - mu_c||^2 of each class.
      along_means: the sum of (u_j^T (h - mu_c))^2 for each left singular vector u_j of Mdot.
      in_row_space: the sum of ||P_W (h - mu_c)||^2, with P_W the projector on the row space of W.
      residuals: the sum of ||r - rbar_c||^2, which is ||f - fbar_c||^2.
      covariance: the sum of (r - rbar_c)(h - mu_c)^T, within classes.
      along_head: the sum of V (h - mu_c)(h - mu_c)^T, V the basis of the row space of W; None if it
        follows from `covariance`.
      outlying: the number of examples at or beyond the radius of their class, see `Certificate`.
      disagreements: the number of examples whose prediction is not the nearest class mean.
    """

    examples: Float[Array, " C"]
    within: Float[Array, " C"]
    along_means: Float[Array, " C"]
    in_row_space: Float[Array, ""]
    residuals: Float[Array, ""]
    covariance: Float[Array, "C p"]
    along_head: Float[Array, "C p"] | None
    outlying: Float[Array, ""]
    disagreements: Float[Array, ""]


class Frame(NamedTuple):
    """Holds the row space of a (C, p) matrix.

    Attributes:
      basis: orthonormal rows, zero beyond `rank`, in the type of the features.
      singular_values: the singular values, descending, zero beyond `rank`, float64.
      rank: the number of singular values that count as nonzero.
    """

    basis: Float[Array, "C p"]
    singular_values: Float[Array, " C"]
    rank: Int[Array, ""]


class Certificate(NamedTuple):
    """Holds the balls about the class means in which the nearest class mean is an example's own.

    An example is in the ball of its class c if ||Mdot^+ (h - mu_c)|| is below the radius.

    Attributes:
      inverse: 1/s_j for each left singular vector u_j of Mdot, 0 beyond the rank.
      radii_sq: the squared radius of each class, see `radii_sq`.
    """

    inverse: Float[Array | np.ndarray, " k"]
    radii_sq: Float[Array | np.ndarray, " C"]

    def is_outside(self, along_means: Float[Array, "B k"], labels: Int[Array, " B"]) -> Array:
        """Returns for each example whether it is not in the ball of its class.

        Args:
          along_means: u_j^T (h - mu_c).
          labels: the class c of each example.
        """
        distances_sq = jnp.sum((along_means * self.inverse[None]) ** 2, axis=1)
        return distances_sq >= self.radii_sq[labels]


def certificate(centred: Float[Array, "C p"], spectrum: Float[Array, " k"]) -> Certificate:
    """Returns the certificate of centred class means.

    Args:
      spectrum: the singular values of Mdot/sqrt(C); directions in which it is 0 are left out.
    """
    kept = spectrum > 0
    values = jnp.where(kept, spectrum, 1) * jnp.sqrt(len(centred))
    return Certificate(jnp.where(kept, 1 / values, 0), radii_sq(centred))


def certificate_of_split(means: ClassMeans, frame: Frame) -> Certificate:
    """Returns the certificate of class means, computed in float64, in the type of the features."""
    dtype = means.features.dtype
    with jax.enable_x64(True):
        centred = centred_means(means.features.astype(jnp.float64))
        reach = certificate(centred, frame.singular_values)
        return jax.tree.map(lambda a: a.astype(dtype), reach)


def radii_sq(centred: Float[Array | np.ndarray, "C p"]) -> Any:
    """Returns the squared radius of each class, within which its own class mean is the nearest.

    mu_c' is nearer than mu_c only if <d, mu_c' - mu_c> >= ||mu_c' - mu_c||^2/2 for d = h - mu_c.
    With z = Mdot^+ d and K = Mdot^T Mdot the left side is z^T K (e_c' - e_c) <= ||z|| ||K (e_c' -
    e_c)||. The radius is the least over c' of ||mu_c' - mu_c||^2/(2 ||K (e_c' - e_c)||): 1/sqrt(2)
    for a simplex ETF, and 0 for class means that coincide.

    Args:
      centred: the centred means, of NumPy or JAX.
    """
    xp = centred.__array_namespace__()
    distances_sq, stretched_sq = (
        _distances_sq(rows, xp) for rows in (centred, centred @ centred.T)
    )
    ratios = distances_sq**2 / (4 * xp.where(stretched_sq > 0, stretched_sq, 1))
    return xp.where(xp.eye(len(centred), dtype=bool), xp.inf, ratios).min(axis=1)


def _distances_sq(rows: Any, xp: Any) -> Any:
    gram = rows @ rows.T
    square_norms = gram.diagonal()
    # Rounding may make the squared distance of near rows negative.
    return xp.maximum(square_norms[:, None] + square_norms[None, :] - 2 * gram, 0)


def class_sums(
    features: Float[Array, "B p"], residuals: Float[Array, "B C"], labels: Int[Array, " B"]
) -> ClassSums:
    """Sums one batch by class; a label outside [0, C) leaves its example out (padding is -1)."""
    one_hot = jax.nn.one_hot(labels, residuals.shape[1], dtype=features.dtype)
    return ClassSums(one_hot.sum(0), one_hot.T @ features, one_hot.T @ residuals)


def class_means(sums: ClassSums) -> ClassMeans:
    return ClassMeans(
        sums.features / sums.examples[:, None], sums.residuals / sums.examples[:, None]
    )


def class_scatter(
    features: Float[Array, "B p"],
    residuals: Float[Array, "B C"],
    predictions: Int[Array, " B"],
    labels: Int[Array, " B"],
    means: ClassMeans,
    frame_means: Frame,
    frame_head: Frame,
    reach: Certificate,
    is_linear: bool,
) -> Scatter:
    """Sums squares and products of one batch's deviations from the class means.

    Args:
      predictions: the class of each example's largest output.
      labels: the labels, as in `class_sums`.
      reach: the certificate of the class means.
      is_linear: whether r - rbar_c = -W (h - mu_c), as with the square loss, so that `covariance`
        says what `along_head` would.
    """
    num_classes = residuals.shape[1]
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
    valid = one_hot.sum(1)
    deviation = (features - means.features[labels]) * valid[:, None]
    residual_deviation = (residuals - means.residuals[labels]) * valid[:, None]
    # One matmul, 3C wide, for all three projections.
    centred = centred_means(means.features)
    along = deviation @ jnp.concatenate([frame_means.basis, frame_head.basis, centred]).T
    along_means, along_head, along_centred = jnp.split(
        along, [num_classes, 2 * num_classes], axis=1
    )
    nearest = nearest_by_deviation(along_centred, centred, labels)
    return Scatter(
        examples=one_hot.sum(0),
        within=one_hot.T @ jnp.sum(deviation**2, axis=1),
        along_means=jnp.sum(along_means**2, axis=0),
        in_row_space=jnp.sum(along_head**2),
        residuals=jnp.sum(residual_deviation**2),
        covariance=residual_deviation.T @ deviation,
        along_head=None if is_linear else along_head.T @ deviation,
        outlying=jnp.sum(valid * reach.is_outside(along_means, labels)),
        disagreements=jnp.sum(valid * (predictions != nearest)),
    )


def centred_means(means: Float[Array, "C p"]) -> Float[Array, "C p"]:
    """Returns Mdot^T, with mu_c - mu_G in row c.

    Reported metrics need float64 `means`, because the rows are differences of near numbers.
    """
    return means - means.mean(0, keepdims=True)


def rank_tolerance(dtype: Any) -> float:
    """Returns the tolerance, relative to the largest singular value, below which one counts as 0.

    It depends on the type of the features or the head. It decides ranks, and the directions that
    nc1 and nc1_row_space measure; no output depends on it.
    """
    return 1e-5 if jnp.dtype(dtype).itemsize < 8 else 1e-12


def frames(means: tuple[ClassMeans, ...], head: Float[Array, "C p"]) -> tuple[Frame, ...]:
    """Returns the row space of Mdot^T/sqrt(C) for each set of class means, then that of W.

    Singular values above `rank_tolerance` times the largest are kept, and at most min(C - 1, p) of
    those of the means.
    """
    num_classes, dim = head.shape
    dtype = head.dtype
    ranks = [min(num_classes - 1, dim)] * len(means) + [min(head.shape)]
    with jax.enable_x64(True):
        centred = [
            centred_means(m.features.astype(jnp.float64)) / jnp.sqrt(num_classes) for m in means
        ]
        # One call for all, because the decomposition is many small steps, each of which costs the
        # same for three matrices as for one.
        singular_values, basis = jax.vmap(row_space)(
            jnp.stack([*centred, head.astype(jnp.float64)])
        )
        kept = counts_as_nonzero(singular_values, rank_tolerance(dtype), np.array(ranks))
        fields = (basis * kept[..., None]).astype(dtype), singular_values * kept, kept.sum(1)
    return tuple(Frame(*(field[i] for field in fields)) for i in range(len(ranks)))


def span(
    rows: Float[Array, "C p"], tolerance: float, most: int
) -> tuple[Float[Array, " C"], Float[Array, "C p"]]:
    """Returns singular values and right singular vectors (rows) of a matrix.

    They are 0 beyond the first `most`, and if the value is below `tolerance` times the largest.
    """
    singular_values, basis = row_space(rows)
    kept = counts_as_nonzero(singular_values, tolerance, np.array(most))
    return singular_values * kept, basis * kept[:, None]


def counts_as_nonzero(
    singular_values: Float[Array, "*batch k"], tolerance: float, most: Int[np.ndarray, "*batch"]
) -> Bool[Array, "*batch k"]:
    """Returns which singular values, descending, are not rounding: those above `tolerance` times
    the largest, and at most the first `most`.
    """
    is_first = np.arange(singular_values.shape[-1]) < most[..., None]
    return (singular_values > tolerance * singular_values[..., :1]) & is_first


def nearest_by_deviation(
    along_centred: Float[Array, "B C"], centred: Float[Array, "C p"], labels: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Returns `nearest_mean` of examples from <h - mu_c, mu_c' - mu_G>, c the class of each.

    h - mu_G is the deviation plus the centred mean of h's class.
    """
    gram = _gram(centred)
    return nearest_mean(along_centred + gram[labels], jnp.diagonal(gram))


def nearest_mean(
    products: Float[Array, "B C"], square_norms: Float[Array, " C"]
) -> Int[Array, " B"]:
    """Returns argmin_c ||h - mu_c|| = argmax_c <h - mu_G, mu_c - mu_G> - ||mu_c - mu_G||^2/2.

    Args:
      products: <h - mu_G, mu_c - mu_G>, centred so that a common offset of all features costs no
        digits.
      square_norms: ||mu_c - mu_G||^2.
    """
    return jnp.argmax(products - square_norms[None] / 2, axis=1)


def nc1(
    along_means: Float[Array, " k"], spectrum: Float[Array, " k"], num_classes: int
) -> Float[Array, ""]:
    """Returns tr(Sigma_W Sigma_B^+)/C = (1/C) sum_j (u_j^T Sigma_W u_j)/s_j^2.

    It is NaN if all centred means are 0.

    Args:
      along_means: u_j^T Sigma_W u_j for each left singular vector u_j of Mdot.
      spectrum: s_j, the singular values of Mdot/sqrt(C); directions with s_j = 0 are left out.
    """
    kept = spectrum > 0
    ratios = jnp.where(kept, along_means / jnp.where(kept, spectrum, 1) ** 2, 0)
    return jnp.where(kept.any(), ratios.sum() / num_classes, jnp.nan)


def _gram(rows: Float[Array, "C p"]) -> Float[Array, "C C"]:
    return rows @ rows.T


def _off_diagonal(matrix: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """Returns the matrix with a diagonal of 0, even if the diagonal is infinite or NaN."""
    return jnp.where(jnp.eye(len(matrix), dtype=bool), 0, matrix)


def _mean_over_pairs(matrix: Float[Array, "C C"]) -> Float[Array, ""]:
    return _off_diagonal(matrix).sum() / (len(matrix) * (len(matrix) - 1))


def cosines(rows: Float[Array, "C p"]) -> Float[Array, "C C"]:
    norms = jnp.linalg.norm(rows, axis=1)
    return _gram(rows) / (norms[:, None] * norms[None, :])


def largest_cosines(rows: Float[Array, "C p"]) -> Float[Array, " C"]:
    """Returns the largest cosine of each row with another: -1/(C-1) for a simplex ETF."""
    others = jnp.where(jnp.eye(len(rows), dtype=bool), -jnp.inf, cosines(rows))
    return jnp.max(others, axis=1)


def equinorm(rows: Float[Array, "C p"]) -> Float[Array, ""]:
    """Returns the population standard deviation of the rows' norms over their mean (NC2).

    It is 0 if all rows are equally long.
    """
    norms = jnp.linalg.norm(rows, axis=1)
    return norms.std() / norms.mean()


def _means_over_pairs(
    terms: Callable[[Array | slice], tuple[Array, ...]], num_classes: int
) -> tuple[Array, ...]:
    """Returns the means over pairs c != c' of the (C, C) matrices that `terms` computes.

    `terms` takes an index of classes and returns those rows of each matrix, so that a large matrix
    is made a few rows at a time.
    """
    pairs, rows = (
        num_classes * (num_classes - 1),
        min(num_classes, max(1, _MOST_PAIRS // num_classes)),
    )
    if rows == num_classes:
        return tuple(_mean_over_pairs(term) for term in terms(slice(None)))

    def add(sums: tuple, start: Array) -> tuple[tuple, None]:
        index = start + jnp.arange(rows)
        apart = (index[:, None] != jnp.arange(num_classes)[None]) & (index < num_classes)[:, None]
        new = (
            jnp.where(apart, term, 0).sum() for term in terms(jnp.minimum(index, num_classes - 1))
        )
        return tuple(total + term for total, term in zip(sums, new, strict=True)), None

    zeros = tuple(jnp.zeros((), shape.dtype) for shape in jax.eval_shape(terms, jnp.arange(rows)))
    sums, _ = lax.scan(add, zeros, jnp.arange(0, num_classes, rows))
    return tuple(total / pairs for total in sums)


def _angle_terms(
    rows: Float[Array, "C p"],
) -> Callable[[Array | slice, Array], tuple[Array, Array]]:
    """Returns a function that computes |cos + 1/(C-1)| and (cos - mean over pairs of cos)^2.

    Its arguments are an index of rows, and the inner products of these rows with all rows.
    """
    num_classes, norms = len(rows), jnp.linalg.norm(rows, axis=1)
    unit = rows / norms[:, None]
    mean = (jnp.sum(unit.sum(0) ** 2) - jnp.sum(unit**2)) / (num_classes * (num_classes - 1))

    def terms(index: Array | slice, products: Array) -> tuple[Array, Array]:
        cos = products / (norms[index][:, None] * norms[None, :])
        return jnp.abs(cos + 1 / (num_classes - 1)), (cos - mean) ** 2

    return terms


def geometry(rows: Float[Array, "C p"], suffix: str) -> dict[str, Array]:
    """Returns the NC2 metrics of any rows, each name ending in `suffix`; 0 for a simplex ETF.

    nc2_equinorm: see `equinorm`. nc2_equiangular: the mean over pairs of |cos + 1/(C-1)|.
    nc2_cosine_std: the population standard deviation of cos over pairs, 0 if all angles are equal,
    whatever they are.
    """
    angles = _angle_terms(rows)
    equiangular, variance = _means_over_pairs(
        lambda index: angles(index, rows[index] @ rows.T), len(rows)
    )
    return {
        f"nc2_equinorm_{suffix}": equinorm(rows),
        f"nc2_equiangular_{suffix}": equiangular,
        f"nc2_cosine_std_{suffix}": jnp.sqrt(variance),
    }


def between_means(centred: Float[Array, "C p"], variances: Float[Array, " C"]) -> dict[str, Array]:
    """Computes the metrics of centred class means that are means over pairs of classes.

    They share one computation of the pairs. They are the NC2 metrics of `geometry`, and

    cdnv: the class-distance normalized variance, the mean over pairs c != c' of
      (v_c + v_c')/(2 ||mu_c - mu_c'||^2).
    etf_error: ||K/||K||_F - (I - J/C)/sqrt(C-1)||_F with K = Mdot^T Mdot, the distance to a simplex
      ETF up to scale and rotation.
    """
    num_classes = len(centred)
    square_norms = jnp.sum(centred**2, axis=1)
    # Mdot^T Mdot and Mdot Mdot^T have the same norm, and the smaller of the two costs less.
    size = jnp.linalg.norm(_gram(centred if num_classes <= centred.shape[1] else centred.T))
    angles, across = _angle_terms(centred), 1 / jnp.sqrt(num_classes - 1)

    def terms(index: Array | slice) -> tuple[Array, ...]:
        products = centred[index] @ centred.T
        # Rounding may make the squared distance of equal means negative.
        distances = jnp.maximum(
            square_norms[index][:, None] + square_norms[None, :] - 2 * products, 0
        )
        crowding = (variances[index][:, None] + variances[None, :]) / (2 * distances)
        return *angles(index, products), crowding, (products / size + across / num_classes) ** 2

    equiangular, variance, cdnv, off_etf = _means_over_pairs(terms, num_classes)
    on_etf = jnp.sum((square_norms / size - (1 - 1 / num_classes) * across) ** 2)
    return {
        "cdnv": cdnv,
        "nc2_equinorm_means": equinorm(centred),
        "nc2_equiangular_means": equiangular,
        "nc2_cosine_std_means": jnp.sqrt(variance),
        "etf_error": jnp.sqrt(num_classes * (num_classes - 1) * off_etf + on_etf),
    }


def self_duality(head: Float[Array, "C p"], centred: Float[Array, "C p"]) -> Float[Array, ""]:
    """Returns NC3, ||W/||W||_F - Mdot^T/||Mdot||_F||_F^2, in [0, 4].

    It is 0 when the head is the centred means up to scale.
    """
    return jnp.sum((head / jnp.linalg.norm(head) - centred / jnp.linalg.norm(centred)) ** 2)


def nc3_floor(head: Float[Array, "C p"], class_weights: Float[Array, " C"]) -> Float[Array, ""]:
    """Returns the least NC3 this head can have with any class means: 2 - 2 ||P W||_F/||W||_F.

    Here P = I - J/C. Centred means sum to 0, so <W, Mdot^T> = <P W, Mdot^T> <= ||P W||_F
    ||Mdot||_F. If mu_G weights the classes by `class_weights` v, then v^T Mdot^T = 0 and P = I - v
    v^T/||v||^2.
    """
    direction = class_weights / jnp.linalg.norm(class_weights)
    outside = direction @ head
    inside = head - direction[:, None] * outside[None]
    # 2 - 2 s = 2 (1 - s^2)/(1 + s) avoids a difference of near numbers.
    norm = jnp.linalg.norm(head)
    return 2 * jnp.sum((outside / norm) ** 2) / (1 + jnp.linalg.norm(inside) / norm)


def quasi_interpolation(mean_residuals: Float[Array, "C C"]) -> dict[str, Array]:
    """Returns epsilon, delta and how far mean residuals are from symmetric quasi-interpolation.

    epsilon: the mean by which an example's own output falls short of its target.
    delta: the mean by which its other outputs exceed theirs.
    """
    epsilon, delta = (
        jnp.trace(mean_residuals) / len(mean_residuals),
        -_mean_over_pairs(mean_residuals),
    )
    return _interpolation(
        epsilon, delta, jnp.linalg.norm(symmetric_part(mean_residuals).rest), len(mean_residuals)
    )


def quasi_interpolation_of_head(
    means: Float[Array, "C p"],
    head: Float[Array, "C p"],
    bias: Float[Array, " C"],
    target: Float[Array, ""],
) -> dict[str, Array]:
    """Returns `quasi_interpolation` of the mean residuals target I - (mu_c^T W^T + b^T).

    The (C, C) matrix of residuals is never held whole.
    """
    num_classes = len(means)
    own = jnp.sum(means * head, axis=1) + bias
    epsilon = target - own.mean()
    total = means.sum(0) @ head.sum(0) + num_classes * bias.sum()
    delta = (total - own.sum()) / (num_classes * (num_classes - 1))
    # The symmetric part of the mean residuals has epsilon on its diagonal and -delta elsewhere.
    (off,) = _means_over_pairs(
        lambda index: ((means[index] @ head.T + bias[None] - delta) ** 2,), num_classes
    )
    asymmetry = jnp.sqrt(
        num_classes * (num_classes - 1) * off + jnp.sum((target - own - epsilon) ** 2)
    )
    return _interpolation(epsilon, delta, asymmetry, num_classes)


def _interpolation(
    epsilon: Array, delta: Array, asymmetry: Array, num_classes: int
) -> dict[str, Array]:
    return {
        "epsilon": epsilon,
        "delta": delta,
        "sqi_gap": jnp.abs(delta - epsilon / (num_classes - 1)),
        "output_asymmetry": asymmetry / num_classes,
    }
