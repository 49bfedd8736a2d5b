"""Adds up the statistics of two passes: sums by class, then squares and products of deviations from
the means.

Pure arrays: `streaming` brings the examples, `measurement` makes the `Frames` between the passes
and metrics of the sums.
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
from ncjax.storage.files import write_atomically

# A device takes a chunk of rows in blocks: of so many numbers, for a core's cache, but for matmuls
# of so many rows.
_BLOCK, LEAST_BLOCK = 2**18, 256
# Rows that the first pass adds up in the precision of the pass, before it adds their sum in
# float64: a few for each class, so that the (C, p) sums cost little beside the rows. Equal numbers
# added one by one all round the same way: half a million times 0.1 in float32 is off by 1%.
_LEAST_GROUP, _GROUP_PER_CLASS = 2048, 32
# Columns of a matmul are filled up to a multiple: with sixteen it takes less time than with nine.
_COLUMNS = 16
# On CPUs that have no such vectors it changes nothing; on those that have them XLA would take half
# of one.
_WIDE = {"xla_cpu_prefer_vector_width": 512}


class Sums(NamedTuple):
    """First pass, over examples of each of C classes. Float64; `merge` adds two up.

    Attributes:
      examples: how many.
      pivots: one of the class's examples, in the precision of the pass; 0 where there is none.
      features: sum of h - pivot.
      logits: sum of the outputs f, where batches had them.
    """

    examples: Shaped[np.ndarray | Array, " C"]
    pivots: Shaped[np.ndarray | Array, "C p"]
    features: Shaped[np.ndarray | Array, "C p"]
    logits: Shaped[np.ndarray | Array, "C C"] | None = None


class Deviations(NamedTuple):
    """Second pass, about the class means of a `Reference` with C classes. Sums over examples,
    float64.

    Attributes:
      examples: how many of each class.
      within: ||h - mu_c||^2 of each class.
      along_means: (u_j^T (h - mu_c))^2 for the reference's basis of the centred means.
      balance: h - mu_c along the probes of the frames, and own logit less its mean where batches
        have logits: sums that vanish for each class, up to rounding, if both passes see the same
        examples.
      moduli: absolute values of the same.
      along_head: (v_j^T (h - mu_c))^2 for its basis of the head's row space.
      correct: examples whose largest output is their class's.
      disagreements: examples whose largest output is not at the nearest class mean.
      residuals: ||e||^2 with e = r - r0_c: the residual r less that of the class-mean output. None
        where the outputs are linear in the features and the residuals in the outputs: `along_head`
        then says it all.
      residual_sums: sum of e of each class, cross-entropy alone: 0 with the square loss.
      covariance: e (h - mu_c)^T, (C, p); where `residuals` is None, v_j^T (h - mu_c) (h - mu_c)^T,
        (r, p).
    """

    examples: Shaped[np.ndarray | Array, " C"]
    within: Shaped[np.ndarray | Array, " C"]
    along_means: Shaped[np.ndarray | Array, " k"]
    balance: Shaped[np.ndarray | Array, "C m"]
    moduli: Shaped[np.ndarray | Array, "C m"]
    along_head: Shaped[np.ndarray | Array, " r"] | None = None
    correct: Shaped[np.ndarray | Array, ""] | None = None
    disagreements: Shaped[np.ndarray | Array, ""] | None = None
    residuals: Shaped[np.ndarray | Array, ""] | None = None
    residual_sums: Shaped[np.ndarray | Array, "C C"] | None = None
    covariance: Shaped[np.ndarray | Array, "r p"] | None = None


class Scores(NamedTuple):
    """Affine functions of an example, one for each class, up to a term that all classes share.

    Attributes:
      weights: their slopes along a basis.
      at_means: their values at the class mean in whose row they stand, less that class's own.
        Differences between classes that are near each other so keep their digits beside classes
        that are far away. None where classes are too many for C x C numbers; then:
      means, offset: centred means along the basis, and values at mu_G.
    """

    weights: Float[np.ndarray | Array, "C r"]
    at_means: Float[np.ndarray | Array, "C C"] | None = None
    means: Float[np.ndarray | Array, "C r"] | None = None
    offset: Float[np.ndarray | Array, " C"] | None = None

    def of(self, along: Array, own: Array) -> Array:
        """Returns the scores (B, C) of examples of the classes `own`, with deviations `along`
        the basis.
        """
        if self.at_means is not None:
            return along @ self.weights.T + self.at_means[own]
        assert self.means is not None
        assert self.offset is not None
        return (along + self.means[own]) @ self.weights.T + self.offset[None]


class Frames(NamedTuple):
    """Holds what the second pass compares an example with, in the precision of the pass. With C
    classes:

    Attributes:
      unit: power of two that features are multiplied by; what follows is of features in these
        units.
      high, low: mu_c as two numbers, high the nearest of the precision.
      basis: u_j, rows, of the span of the centred means: all of it, whatever counts as its rank.
      probes: rows along which deviations must cancel out; see `Deviations.balance`.
      nearness: scores whose largest is at the nearest class mean; None without outputs.
      head_basis: v_j, rows, of the head's row space: all of it; None without a head.
      outputs: scores that the head gives; None without a head, or where batches have logits. Then:
      logit_unit: power of two that logits are multiplied by.
      expected: class-mean logits in these units.
    """

    unit: Float[np.ndarray | Array, ""]
    high: Float[np.ndarray | Array, "C p"]
    low: Float[np.ndarray | Array, "C p"]
    basis: Float[np.ndarray | Array, "k p"]
    probes: Float[np.ndarray | Array, "m p"]
    nearness: Scores | None = None
    head_basis: Float[np.ndarray | Array, "r p"] | None = None
    outputs: Scores | None = None
    logit_unit: Float[np.ndarray | Array, ""] | None = None
    expected: Float[np.ndarray | Array, "C C"] | None = None


def merge(first: Any, *others: Any) -> Any:
    """Statistics of all examples, from those of parts of them: associative up to the rounding of
    float64.

    A class keeps the pivot of the first part that has it; the others' sums are moved to it:
    sum(h - pivot) = sum(h - pivot') + n (pivot' - pivot).
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
        # What is not finite is refused by those who use the sums.
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
    """Rows of features one after the other in `numbers`, from `begin` on: memory that is not
    aligned is read in place from an aligned address before it."""

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
    """Folds add(state, rows, labels, logits) over parts of `count` rows, and over what is left
    of them.
    """

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
    """Rows of a block of a chunk of `size`, each as large as so many numbers."""
    return math.gcd(size, max(LEAST_BLOCK, 1 << (_BLOCK // numbers).bit_length() - 1))


def _group_rows(num_classes: int) -> int:
    return 1 << (max(_LEAST_GROUP, _GROUP_PER_CLASS * num_classes) - 1).bit_length()


def rounding_of_sums(examples: Any, num_classes: int, dtype: Any) -> np.ndarray:
    """Returns what `Sums.features` of each class may be off by, relative to the sum of |h - pivot|.

    A sum of k numbers, one by one, is off by (k - 1) u times the sum of their moduli at most
    (Higham 2002, section 4.2), u the unit roundoff; a few more u are those of the differences, and
    of the second pass.
    """
    chain = np.minimum(examples, _group_rows(num_classes)) + 4
    return chain * np.finfo(dtype).eps / 2 + examples * np.finfo(np.float64).eps / 2


@functools.partial(jax.jit, donate_argnums=0)
def adopt(pivots: Array, features: Rows, index: Array, labels: Array) -> Array:
    """Those rows of features become the pivots of the classes `labels`; C: of none."""
    return pivots.at[labels].set(
        features.pick(index, pivots.shape[1]).astype(pivots.dtype), mode="drop"
    )


@functools.partial(jax.jit, donate_argnums=0, compiler_options=_WIDE)
def add_sums(
    sums: Any, features: Rows, labels: Array, logits: Array | None, counts: Array
) -> tuple[Sums, Array]:
    """A label of C is padding."""
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

    # Sums of a group's own, in the precision of the pass, take half the time; not where they would
    # cost more memory than its rows.
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
    """A label of C is padding."""
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
    predictions = jnp.argmax(outputs, axis=1)
    nearest = jnp.argmax(frames.nearness.of(along_means, own), axis=1)
    added["correct"] = sums.correct + jnp.sum(valid & (predictions == labels))
    added["disagreements"] = sums.disagreements + jnp.sum(valid & (predictions != nearest))
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
