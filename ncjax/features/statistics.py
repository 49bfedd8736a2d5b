"""Adds up the statistics of two passes: sums by class, then products of deviations from the means.

All functions take and return arrays. `streaming` supplies the examples, `reference` makes the
`Frames` between the passes, and `measurement` computes metrics from the sums.
"""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ncjax.errors import InputError
from ncjax.metrics.collapse import Certificate
from ncjax.storage.files import write_atomically

# A device processes a chunk in blocks of about this many numbers, which fit into a core's cache,
# but of at least this many rows, which keep matmuls efficient.
_BLOCK, LEAST_BLOCK = 2**18, 256
# The first pass adds up this many rows in its own precision before it adds their sum in float64:
# at least a few per class, so that the (C, p) sums cost little beside the rows. Without float64,
# equal numbers would all round the same way: half a million times 0.1 in float32 is off by 1%.
_LEAST_GROUP, _GROUP_PER_CLASS = 2048, 32
# Columns of a matmul are padded to a multiple of this, because sixteen take less time than nine.
_COLUMNS = 16
# On CPUs XLA's argmax compares numbers one by one. Of more columns than this, two maxima, for which
# XLA has vectors, take less time: a quarter for a hundred columns.
_FEW_COLUMNS = 16
# On CPUs with vectors of this width XLA would use only half of one; on others this changes nothing.
_WIDE = {"xla_cpu_prefer_vector_width": 512}


class Sums(NamedTuple):
    """Holds the float64 sums of the first pass for each of C classes; `merge` adds them up.

    Attributes:
      examples: the number of examples.
      pivots: one of the class's examples, in the precision of the pass; 0 if there is none.
      features: the sum of h - pivot.
      logits: the sum of the outputs f; None if batches had none.
    """

    examples: Shaped[np.ndarray | Array, " C"]
    pivots: Shaped[np.ndarray | Array, "C p"]
    features: Shaped[np.ndarray | Array, "C p"]
    logits: Shaped[np.ndarray | Array, "C C"] | None = None


class Deviations(NamedTuple):
    """Holds the float64 sums of the second pass, about the class means of a `Reference`.

    Attributes:
      examples: the number of examples of each class.
      within: the sum of ||h - mu_c||^2 of each class.
      along_means: the sum of (u_j^T (h - mu_c))^2 for the reference's basis of the centred means.
      balance: the sum, for each class, of h - mu_c along the probes of the frames, and, if batches
        have logits, of the example's own logit less its mean. It is 0 up to rounding if both passes
        see the same examples.
      moduli: the sum of the absolute values of the same.
      along_head: the sum of (v_j^T (h - mu_c))^2 for the reference's basis of the head's row space.
      correct: the number of examples whose largest output is their class's.
      disagreements: the number of examples whose largest output is not the nearest class mean's.
      outlying: the number of examples at or beyond the radius of their class, see
        `collapse.Certificate`; None without outputs, or with more than 2,048 classes.
      residuals: the sum of ||e||^2 with e = r - r0_c, the residual r less that of the class-mean
        output. None if the outputs are linear in the features and the residuals in the outputs,
        because it then follows from `along_head`.
      residual_sums: the sum of e of each class with cross-entropy; None with the square loss, where
        it is 0.
      covariance: the sum of e (h - mu_c)^T, (C, p); if `residuals` is None, that of
        v_j^T (h - mu_c) (h - mu_c)^T, (r, p).
      head_covariance: the latter, if `covariance` is the former.
    """

    examples: Shaped[np.ndarray | Array, " C"]
    within: Shaped[np.ndarray | Array, " C"]
    along_means: Shaped[np.ndarray | Array, " k"]
    balance: Shaped[np.ndarray | Array, "C m"]
    moduli: Shaped[np.ndarray | Array, "C m"]
    along_head: Shaped[np.ndarray | Array, " r"] | None = None
    correct: Shaped[np.ndarray | Array, ""] | None = None
    disagreements: Shaped[np.ndarray | Array, ""] | None = None
    outlying: Shaped[np.ndarray | Array, ""] | None = None
    residuals: Shaped[np.ndarray | Array, ""] | None = None
    residual_sums: Shaped[np.ndarray | Array, "C C"] | None = None
    covariance: Shaped[np.ndarray | Array, "r p"] | None = None
    head_covariance: Shaped[np.ndarray | Array, "r p"] | None = None


class Scores(NamedTuple):
    """Holds affine functions of an example, one per class, up to a term that all classes share.

    Attributes:
      weights: the slopes of the functions along a basis.
      at_means: the values of all functions at mu_c, less the value of function c, in row c. The
        differences between near classes keep their digits this way, even if other classes are far
        away. None if there are too many classes for a (C, C) array.
      means: the centred means along the basis, if `at_means` is None.
      offset: the values of the functions at mu_G, if `at_means` is None.
    """

    weights: Float[np.ndarray | Array, "C r"]
    at_means: Float[np.ndarray | Array, "C C"] | None = None
    means: Float[np.ndarray | Array, "C r"] | None = None
    offset: Float[np.ndarray | Array, " C"] | None = None

    def of(self, along: Array, own: Array) -> Array:
        """Returns the scores (B, C) of examples from their deviations `along` the basis.

        Args:
          along: h - mu_c along the basis.
          own: the class c of each example.
        """
        if self.at_means is not None:
            return along @ self.weights.T + self.at_means[own]
        assert self.means is not None
        assert self.offset is not None
        return (along + self.means[own]) @ self.weights.T + self.offset[None]


class Frames(NamedTuple):
    """Holds what the second pass compares an example with, in the precision of the pass.

    Attributes:
      unit: the power of two that features are multiplied by; the fields below are in these units.
      high, low: mu_c = high + low, with high the nearest number of the precision.
      basis: the orthonormal rows u_j that span the centred means, also beyond their rank.
      probes: the rows along which deviations must cancel out; see `Deviations.balance`.
      nearness: the scores whose largest is the nearest class mean's; None without outputs.
      reach: the balls in which the nearest class mean is an example's own; None without outputs,
        or with more than 2,048 classes.
      head_basis: the orthonormal rows v_j that span the head's row space, also beyond its rank;
        None without a head.
      outputs: the scores that the head computes; None without a head, or if batches have logits.
      logit_unit: the power of two that logits are multiplied by; None if batches have none.
      expected: the class-mean logits in these units; None if batches have none.
    """

    unit: Float[np.ndarray | Array, ""]
    high: Float[np.ndarray | Array, "C p"]
    low: Float[np.ndarray | Array, "C p"]
    basis: Float[np.ndarray | Array, "k p"]
    probes: Float[np.ndarray | Array, "m p"]
    nearness: Scores | None = None
    reach: Certificate | None = None
    head_basis: Float[np.ndarray | Array, "r p"] | None = None
    outputs: Scores | None = None
    logit_unit: Float[np.ndarray | Array, ""] | None = None
    expected: Float[np.ndarray | Array, "C C"] | None = None


def merge(first: Any, *others: Any) -> Any:
    """Returns the statistics of all examples from the statistics of parts of them.

    It is associative up to the rounding of float64. A class keeps the pivot of the first part that
    has examples of it, and the sums of other parts are moved to that pivot: sum(h - pivot) =
    sum(h - pivot') + n (pivot' - pivot).
    """
    add: Any = _merge_sums if isinstance(first, Sums) else _add
    return functools.reduce(add, others, first)


def _merge_sums(a: Sums, b: Sums) -> Sums:
    if a.pivots.shape != b.pivots.shape:
        raise InputError(
            "merge",
            b.pivots.shape,
            f"the other statistics have (classes, features) {a.pivots.shape}",
        )
    pivots = np.where(a.examples[:, None] > 0, a.pivots, b.pivots)
    with np.errstate(over="ignore", invalid="ignore"):
        # The callers refuse sums that are not finite.
        features = np.subtract(b.pivots, pivots, dtype=np.float64)
        features *= b.examples[:, None]
        features += b.features
        features += a.features
    logits = None if a.logits is None or b.logits is None else a.logits + b.logits
    return Sums(a.examples + b.examples, pivots, features, logits)


def _add(a: Deviations, b: Deviations) -> Deviations:
    return Deviations._make(
        None if x is None or y is None else np.add(x, y) for x, y in zip(a, b, strict=True)
    )


def save(statistics: Sums | Deviations, path: str | Path) -> None:
    """Writes statistics of one pass as a .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(
        buffer, **{name: value for name, value in statistics._asdict().items() if value is not None}
    )
    write_atomically(Path(path), buffer.getvalue())


def load(path: str | Path) -> Sums | Deviations:
    """Reads the statistics that `save` wrote."""
    try:
        with np.load(path) as file:
            fields = dict(file)
        return Sums(**fields) if "pivots" in fields else Deviations(**fields)
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError(
            "statistics", str(path), f"no file of ncjax.features.measure.save: {error}"
        ) from error


class Rows(NamedTuple):
    """Holds rows of features as consecutive numbers, the first of which is at `begin`.

    Memory that is not aligned is read in place from an aligned address before its first row.
    """

    numbers: Array
    begin: Int[np.ndarray | Array, ""]

    def since(self, first: Any, dim: int) -> "Rows":
        """Returns the rows from `first` on."""
        return Rows(self.numbers, self.begin + first * dim)

    def block(self, count: int, dim: int) -> Array:
        """Returns the first `count` rows of `dim` numbers."""
        return lax.dynamic_slice(self.numbers, (self.begin,), (count * dim,)).reshape(count, dim)

    def pick(self, index: Array, dim: int) -> Array:
        return jax.vmap(lambda i: self.since(i, dim).block(1, dim)[0])(index)


def _fold(
    add: Callable,
    state: Any,
    features: Rows,
    labels: Array,
    logits: Array | None,
    dim: int,
    count: int,
) -> Any:
    """Folds add(state, rows, labels, logits) over parts of `count` rows, the last one shorter."""

    def step(state: Any, first: Any, count: int) -> Any:
        of_part = (
            None if a is None else lax.dynamic_slice_in_dim(a, first, count)
            for a in (labels, logits)
        )
        return add(state, features.since(first, dim), *of_part)

    whole = len(labels) - len(labels) % count
    starts = jnp.arange(0, whole, count, dtype=jnp.int64)
    state, _ = lax.scan(lambda state, first: (step(state, first, count), None), state, starts)
    return step(state, whole, len(labels) - whole) if whole < len(labels) else state


def _block_rows(size: int, numbers: int) -> int:
    """Returns the rows per block of a chunk of `size` rows, each of which has `numbers` numbers."""
    return math.gcd(size, max(LEAST_BLOCK, 1 << (_BLOCK // numbers).bit_length() - 1))


def _group_rows(num_classes: int) -> int:
    return 1 << (max(_LEAST_GROUP, _GROUP_PER_CLASS * num_classes) - 1).bit_length()


def rounding_of_sums(examples: Any, num_classes: int, dtype: Any) -> np.ndarray:
    """Returns a bound on the error of `Sums.features` of each class, relative to sum |h - pivot|.

    A sum of k numbers, added one by one, has an error of at most (k - 1) u times the sum of their
    moduli, with u the unit roundoff (Higham 2002, section 4.2). The bound has a few more u for the
    rounding of the differences, and of the second pass.
    """
    chain = np.minimum(examples, _group_rows(num_classes)) + 4
    return chain * np.finfo(dtype).eps / 2 + examples * np.finfo(np.float64).eps / 2


@functools.partial(jax.jit, donate_argnums=0)
def adopt(pivots: Array, features: Rows, index: Array, labels: Array) -> Array:
    """Returns pivots with rows `index` of the features for the classes `labels`; C is no class."""
    return pivots.at[labels].set(
        features.pick(index, pivots.shape[1]).astype(pivots.dtype), mode="drop"
    )


@functools.partial(jax.jit, donate_argnums=0, compiler_options=_WIDE)
def add_sums(
    sums: Any, features: Rows, labels: Array, logits: Array | None, counts: Array
) -> tuple[Sums, Array]:
    """Adds a chunk to the sums of the first pass; a label of C is padding."""
    pivots = sums.pivots
    num_classes, dim = pivots.shape

    def add(total: Array, rows: Rows, labels: Array, _: None) -> Array:
        shifted = (
            rows.block(len(labels), dim).astype(pivots.dtype)
            - pivots[jnp.minimum(labels, num_classes - 1)]
        )
        return total.at[labels].add(shifted.astype(total.dtype), mode="drop")

    def add_rows(total: Array, rows: Rows, labels: Array, _: None) -> Array:
        return _fold(add, total, rows, labels, None, dim, _block_rows(len(labels), dim))

    def add_group(total: Array, rows: Rows, labels: Array, _: None) -> Array:
        return total + add_rows(jnp.zeros_like(pivots), rows, labels, None).astype(total.dtype)

    # Adding up a group in the precision of the pass takes half the time. It is not done if the
    # (C, p) sums of a group would be larger than its rows.
    fold, group = (
        (add_group, _group_rows(num_classes))
        if len(labels) >= num_classes
        else (add_rows, len(labels))
    )
    total = _fold(fold, sums.features, features, labels, None, dim, min(group, len(labels)))
    outputs = (
        None
        if logits is None
        else sums.logits.at[labels].add(logits.astype(jnp.float64), mode="drop")
    )
    return Sums(sums.examples + counts, pivots, total, outputs), labels[0]


@functools.partial(jax.jit, donate_argnums=0, static_argnames="linear", compiler_options=_WIDE)
def add_deviations(
    sums: Deviations,
    frames: Frames,
    features: Rows,
    labels: Array,
    logits: Array | None,
    counts: Array,
    *,
    linear: bool,
) -> tuple[Deviations, Array]:
    """Adds a chunk to the sums of the second pass; a label of C is padding."""
    bases = [
        basis for basis in (frames.basis, frames.head_basis, frames.probes) if basis is not None
    ]
    columns = sum(map(len, bases))
    directions = jnp.pad(jnp.concatenate(bases), ((0, -columns % _COLUMNS), (0, 0))).T
    num_classes, dim = frames.high.shape
    width = num_classes if frames.nearness is not None else 0

    def add(sums: Deviations, rows: Rows, labels: Array, logits: Array | None) -> Deviations:
        block = rows.block(len(labels), dim)
        return _deviations_of_block(frames, directions, linear, sums, block, labels, logits)

    added = _fold(
        add, sums, features, labels, logits, dim, _block_rows(len(labels), max(dim, width))
    )
    return added._replace(examples=sums.examples + counts), labels[0]


def _argmax(scores: Array) -> Array:
    """Returns the column of the largest number of each row, the first of equal ones."""
    width = scores.shape[1]
    if width <= _FEW_COLUMNS:
        return jnp.argmax(scores, axis=1)
    left = np.arange(width, 0, -1, dtype=scores.dtype)  # columns from this one on
    is_largest = scores == jnp.max(scores, axis=1, keepdims=True)
    return width - jnp.max(jnp.where(is_largest, left, 0), axis=1).astype(jnp.int32)


def _deviations_of_block(
    frames: Any,
    directions: Array,
    linear: bool,
    sums: Any,
    features: Array,
    labels: Array,
    logits: Array | None,
) -> Deviations:
    num_classes, dtype = len(frames.high), frames.high.dtype
    valid, own = labels < num_classes, jnp.minimum(labels, num_classes - 1)
    deviation = (features.astype(dtype) * frames.unit - frames.high[own]) - frames.low[own]
    deviation = jnp.where(valid[:, None], deviation, 0)

    def squares(matrix: Array, axis: int | None = 0) -> Array:
        return jnp.sum(matrix**2, axis=axis).astype(jnp.float64)

    rank, head_rank = len(frames.basis), 0 if frames.head_basis is None else len(frames.head_basis)
    along = deviation @ directions
    along_means, along_head = along[:, :rank], along[:, rank : rank + head_rank]
    probed = along[:, rank + head_rank : rank + head_rank + len(frames.probes)]
    added: dict[str, Any] = {
        "within": sums.within.at[labels].add(squares(deviation, 1), mode="drop"),
        "along_means": sums.along_means + squares(along_means),
    }
    if frames.head_basis is not None:
        added["along_head"] = sums.along_head + squares(along_head)
        if sums.covariance is not None and linear:
            added["covariance"] = sums.covariance + (along_head.T @ deviation).astype(jnp.float64)
        if sums.head_covariance is not None:
            products = (along_head.T @ deviation).astype(jnp.float64)
            added["head_covariance"] = sums.head_covariance + products
    outputs: Any = None
    expected: Any = None
    if logits is not None:
        outputs, expected = logits.astype(dtype) * frames.logit_unit, frames.expected[own]
        probed = jnp.concatenate(
            [probed, jnp.take_along_axis(outputs - expected, own[:, None], axis=1)], axis=1
        )
    elif frames.outputs is not None:
        outputs = frames.outputs.of(along_head, own)
        expected = None if linear else frames.outputs.at_means[own]
    for name, terms in (("balance", probed), ("moduli", jnp.abs(probed))):
        added[name] = getattr(sums, name).at[labels].add(terms.astype(jnp.float64), mode="drop")
    if outputs is None:
        return sums._replace(**added)
    predictions = _argmax(outputs)
    nearest = _argmax(frames.nearness.of(along_means, own))
    added["correct"] = sums.correct + jnp.sum(valid & (predictions == labels))
    added["disagreements"] = sums.disagreements + jnp.sum(valid & (predictions != nearest))
    if frames.reach is not None:
        outside = frames.reach.is_outside(along_means, own)
        added["outlying"] = sums.outlying + jnp.sum(valid & outside)
    if linear:
        return sums._replace(**added)
    if sums.residual_sums is not None:
        outputs, expected = jax.nn.softmax(outputs), jax.nn.softmax(expected)
    excess = jnp.where(valid[:, None], expected - outputs, 0)
    added["residuals"] = sums.residuals + squares(excess, None)
    if sums.residual_sums is not None:
        added["residual_sums"] = sums.residual_sums.at[labels].add(
            excess.astype(jnp.float64), mode="drop"
        )
    if sums.covariance is not None:
        added["covariance"] = sums.covariance + (excess.T @ deviation).astype(jnp.float64)
    return sums._replace(**added)
