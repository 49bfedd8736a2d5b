"""What two passes over examples add up, and how: sums by class, then squares and products of deviations from the means.

Pure arrays: `streaming` brings the examples, `findings` makes the `Frames` between the passes and metrics of the sums.
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
from ncjax.files import write_atomically

# A device takes a chunk of rows in blocks: of so many numbers, for a core's cache, but for matmuls of so many rows.
_BLOCK, LEAST_BLOCK = 2**18, 256
# Columns of a matmul are filled up to a multiple: with sixteen it takes less time than with nine.
_COLUMNS = 16
# On CPUs that have no such vectors it changes nothing; on those that have them XLA would take half of one.
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
    """Second pass, about the class means of a `Reference` with C classes. Sums over examples, float64.

    Attributes:
      examples: how many of each class.
      within: ||h - mu_c||^2 of each class.
      along_means: (u_j^T (h - mu_c))^2 for the reference's basis of the centred means.
      along_head: (v_j^T (h - mu_c))^2 for its basis of the head's row space.
      correct: examples whose largest output is their class's.
      disagreements: examples whose largest output is not at the nearest class mean.
      residuals: ||e||^2 with e = r - r0_c: the residual r less that of the class-mean output. None where the outputs
        are linear in the features and the residuals in the outputs: `along_head` then says it all.
      residual_sums: sum of e of each class, cross-entropy alone: 0 with the square loss.
      covariance: e (h - mu_c)^T, (C, p); where `residuals` is None, v_j^T (h - mu_c) (h - mu_c)^T, (r, p).
    """

    examples: Shaped[np.ndarray | Array, " C"]
    within: Shaped[np.ndarray | Array, " C"]
    along_means: Shaped[np.ndarray | Array, " k"]
    along_head: Shaped[np.ndarray | Array, " r"] | None = None
    correct: Shaped[np.ndarray | Array, ""] | None = None
    disagreements: Shaped[np.ndarray | Array, ""] | None = None
    residuals: Shaped[np.ndarray | Array, ""] | None = None
    residual_sums: Shaped[np.ndarray | Array, "C C"] | None = None
    covariance: Shaped[np.ndarray | Array, "r p"] | None = None


class Frames(NamedTuple):
    """What the second pass holds an example against, in the precision of the pass. With C classes:

    Attributes:
      high, low: mu_c as two numbers, high the nearest of the precision.
      basis: u_j, rows, of the span of the centred means.
      near, near_sq: the centred means along it and their squared norms; None without outputs.
      head_basis: v_j, rows, of the head's row space; None without a head.
      head: the head along it.
      head_means, head_offset: centred means along it and W mu_G + b; outputs are (v (h - mu_G)) head^T + head_offset.
      outputs: class-mean outputs; None where outputs are not given but computed by a square-loss head.
    """

    high: Float[np.ndarray | Array, "C p"]
    low: Float[np.ndarray | Array, "C p"]
    basis: Float[np.ndarray | Array, "k p"]
    near: Float[np.ndarray | Array, "C k"] | None = None
    near_sq: Float[np.ndarray | Array, " C"] | None = None
    head_basis: Float[np.ndarray | Array, "r p"] | None = None
    head: Float[np.ndarray | Array, "C r"] | None = None
    head_means: Float[np.ndarray | Array, "C r"] | None = None
    head_offset: Float[np.ndarray | Array, " C"] | None = None
    outputs: Float[np.ndarray | Array, "C C"] | None = None


def merge(first: Any, *others: Any) -> Any:
    """Statistics of all examples, from those of parts of them: associative up to the rounding of float64.

    A class keeps the pivot of the first part that has it; the others' sums are moved to it:
    sum(h - pivot) = sum(h - pivot') + n (pivot' - pivot).
    """
    add: Any = _merge_sums if isinstance(first, Sums) else _add
    return functools.reduce(add, others, first)


def _merge_sums(a: Sums, b: Sums) -> Sums:
    if a.pivots.shape != b.pivots.shape:
        raise InputError("merge", b.pivots.shape, f"the other statistics have (classes, features) {a.pivots.shape}")
    pivots = np.where(a.examples[:, None] > 0, a.pivots, b.pivots)
    features = np.subtract(b.pivots, pivots, dtype=np.float64)
    features *= b.examples[:, None]
    features += b.features
    features += a.features
    logits = None if a.logits is None or b.logits is None else a.logits + b.logits
    return Sums(a.examples + b.examples, pivots, features, logits)


def _add(a: Deviations, b: Deviations) -> Deviations:
    return Deviations._make(None if x is None or y is None else np.add(x, y) for x, y in zip(a, b, strict=True))


def save(statistics: Sums | Deviations, path: str | Path) -> None:
    """Writes statistics of one pass as a .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in statistics._asdict().items() if value is not None})
    write_atomically(Path(path), buffer.getvalue())


def load(path: str | Path) -> Sums | Deviations:
    """What `save` wrote."""
    try:
        with np.load(path) as file:
            fields = dict(file)
        return Sums(**fields) if "pivots" in fields else Deviations(**fields)
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError("statistics", str(path), f"no file of ncjax.measure.save: {error}") from error


class Rows(NamedTuple):
    """Rows of features one after the other in `numbers`, from `begin` on: memory that is not aligned is read in place
    from an aligned address before it."""

    numbers: Array
    begin: Int[np.ndarray | Array, ""]

    def block(self, first: Any, count: int, dim: int) -> Array:
        """`count` rows of `dim` numbers."""
        return lax.dynamic_slice(self.numbers, (self.begin + first * dim,), (count * dim,)).reshape(count, dim)

    def pick(self, index: Array, dim: int) -> Array:
        return jax.vmap(lambda i: self.block(i, 1, dim)[0])(index)


def _in_blocks(
    add: Callable, state: Any, features: Rows, labels: Array, logits: Array | None, dim: int, width: int = 0
) -> Any:
    """Folds add(state, features, labels, logits) over the blocks of a chunk; `width`: of its other large matrices."""
    size = len(labels)
    count = math.gcd(size, max(LEAST_BLOCK, 1 << (_BLOCK // max(dim, width)).bit_length() - 1))

    def body(state: Any, first: Array) -> tuple[Any, None]:
        of_block = (None if a is None else lax.dynamic_slice_in_dim(a, first, count) for a in (labels, logits))
        return add(state, features.block(first, count, dim), *of_block), None

    return lax.scan(body, state, jnp.arange(0, size, count, dtype=jnp.int64))[0]


@functools.partial(jax.jit, donate_argnums=0)
def adopt(pivots: Array, features: Rows, index: Array, labels: Array) -> Array:
    """Those rows of features become the pivots of the classes `labels`; C: of none."""
    return pivots.at[labels].set(features.pick(index, pivots.shape[1]).astype(pivots.dtype), mode="drop")


@functools.partial(jax.jit, donate_argnums=0, compiler_options=_WIDE)
def add_sums(sums: Any, features: Rows, labels: Array, logits: Array | None, counts: Array) -> tuple[Sums, Array]:
    """A label of C is padding."""
    pivots = sums.pivots
    # A chunk's own sums are small numbers, for which float32 will do at twice the speed; not where they would cost
    # more memory than its rows.
    apart = len(labels) >= len(pivots)

    def add(total: Array, features: Array, labels: Array, _: None) -> Array:
        shifted = features.astype(pivots.dtype) - pivots[jnp.minimum(labels, len(pivots) - 1)]
        return total.at[labels].add(shifted.astype(total.dtype), mode="drop")

    start = jnp.zeros_like(pivots) if apart else sums.features
    total = _in_blocks(add, start, features, labels, None, pivots.shape[1])
    total = sums.features + total if apart else total
    outputs = None if logits is None else sums.logits.at[labels].add(logits.astype(jnp.float64), mode="drop")
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
    bases = [basis for basis in (frames.basis, frames.head_basis) if basis is not None]
    columns = sum(map(len, bases))
    directions = jnp.pad(jnp.concatenate(bases), ((0, -columns % _COLUMNS), (0, 0))).T
    add = functools.partial(_deviations_of_block, frames, directions, linear)
    num_classes, dim = frames.high.shape
    width = num_classes if frames.near is not None else 0
    added = _in_blocks(add, sums, features, labels, logits, dim, width)
    return added._replace(examples=sums.examples + counts), labels[0]


def _deviations_of_block(
    frames: Any, directions: Array, linear: bool, sums: Any, features: Array, labels: Array, logits: Array | None
) -> Deviations:
    num_classes, dtype = len(frames.high), frames.high.dtype
    valid, own = labels < num_classes, jnp.minimum(labels, num_classes - 1)
    deviation = (features.astype(dtype) - frames.high[own]) - frames.low[own]
    deviation = jnp.where(valid[:, None], deviation, 0)

    def squares(matrix: Array, axis: int | None = 0) -> Array:
        return jnp.sum(matrix**2, axis=axis).astype(jnp.float64)

    along, rank = deviation @ directions, len(frames.basis)
    along_means = along[:, :rank]
    added: dict[str, Any] = {
        "within": sums.within.at[labels].add(squares(deviation, 1), mode="drop"),
        "along_means": sums.along_means + squares(along_means),
    }
    along_head = None
    if frames.head_basis is not None:
        along_head = along[:, rank : rank + len(frames.head_basis)]
        added["along_head"] = sums.along_head + squares(along_head)
        if sums.covariance is not None and linear:
            added["covariance"] = sums.covariance + (along_head.T @ deviation).astype(jnp.float64)
    if frames.near is None:
        return sums._replace(**added)
    if logits is not None:
        outputs = logits.astype(dtype)
    elif frames.outputs is not None:
        outputs = frames.outputs[own] + along_head @ frames.head.T
    else:
        outputs = (along_head + frames.head_means[own]) @ frames.head.T + frames.head_offset[None]
    # argmin_c ||h - mu_c|| = argmax_c <h - mu_G, mu_c - mu_G> - ||mu_c - mu_G||^2/2
    nearness = (along_means + frames.near[own]) @ frames.near.T - frames.near_sq[None] / 2
    winners = jnp.argmax(outputs, axis=1)
    added["correct"] = sums.correct + jnp.sum(valid & (winners == labels))
    added["disagreements"] = sums.disagreements + jnp.sum(valid & (winners != jnp.argmax(nearness, axis=1)))
    if linear:
        return sums._replace(**added)
    expected: Any = jnp.asarray(frames.outputs)[own]
    if sums.residual_sums is not None:
        outputs, expected = jax.nn.softmax(outputs), jax.nn.softmax(expected)
    excess = jnp.where(valid[:, None], expected - outputs, 0)
    added["residuals"] = sums.residuals + squares(excess, None)
    if sums.residual_sums is not None:
        added["residual_sums"] = sums.residual_sums.at[labels].add(excess.astype(jnp.float64), mode="drop")
    if sums.covariance is not None:
        added["covariance"] = sums.covariance + (excess.T @ deviation).astype(jnp.float64)
    return sums._replace(**added)
