"""From the statistics of two passes to the numbers: class means and frames between the passes, metrics after them.

`prepare` turns the first pass's sums into a `Reference` for the second, `find` turns that pass's deviations into a
`Measurement`. What is small, (C, p) at most, is float64 here, on the host. Metrics bear the names of
`history.VOCABULARY` and are computed by `collapse` and `theory`, as those of training are.

Classes without an example are left out: all is measured for the C classes that have one, with their rows of the head
and their outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Array, Float, Int, Num

from ncjax import collapse, theory
from ncjax.errors import InputError
from ncjax.linalg import symmetric_part
from ncjax.moments import Deviations, Frames, Sums
from ncjax.streaming import as_array

T = TypeVar("T")

# Beyond, C x C arrays are not held: no budget, no cross-entropy, no logits.
MOST_SQUARE = 2048
# Of centred class means in float32: a deviation a millionth of their size can still be squared, and many added up.
_LEAST, _MOST = 1e-12, 1e15
GLOBAL_MEANS, LOSSES = ("classes", "examples"), ("square", "cross_entropy")


class Asked(NamedTuple):
    """What is to be measured; see `measure.measure`."""

    loss: str = "square"
    weight_decay: float | None = None
    global_mean: str = "classes"


class Reference(NamedTuple):
    """What the second pass measures against. Of the C classes that have examples, but for `examples`:

    Attributes:
      examples: of every class, those with none too.
      present: the classes that have examples.
      means: mu_c. centred: mu_c - mu_G.
      spectrum: singular values of Mdot/sqrt(C); frames.basis has their vectors.
      head, bias: None without a head.
      outputs: mean outputs of each class; None without outputs or where there are more than 2,048 classes.
    """

    asked: Asked
    examples: Num[np.ndarray, " all"]
    present: Int[np.ndarray, " C"]
    means: Float[np.ndarray, "C p"]
    centred: Float[np.ndarray, "C p"]
    spectrum: Float[np.ndarray, " k"]
    head: Float[np.ndarray, "C p"] | None
    bias: Float[np.ndarray, " C"] | None
    outputs: Float[np.ndarray, "C C"] | None
    with_logits: bool
    frames: Frames


class Measurement(NamedTuple):
    """What was found. Per class, in the order of `present`:

    Attributes:
      metrics: name in the vocabulary -> number, NaN where it is not defined.
      examples: of every class. missing: the classes without one.
      spectrum: eigenvalues of Sigma_B, descending. within: Sigma_W along their eigenvectors.
      variances: v_c, mean ||h - mu_c||^2. centred: mu_c - mu_G.
      notes: what was left out and why.
    """

    metrics: dict[str, float]
    examples: Num[np.ndarray, " all"]
    missing: list[int]
    spectrum: Float[np.ndarray, " k"]
    within: Float[np.ndarray, " k"]
    variances: Float[np.ndarray, " C"]
    centred: Float[np.ndarray, "C p"]
    notes: list[str]


_interpolation = jax.jit(collapse.quasi_interpolation)
_interpolation_of_head = jax.jit(collapse.quasi_interpolation_of_head)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def _one_thread(function: Callable[..., T]) -> Callable[..., T]:
    """OpenBLAS's threads wait by spinning: beside XLA's, two of them were five to ten times as slow as one."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> T:
        with _blas().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited


@_one_thread
def prepare(
    sums: Sums,
    *,
    head: Any = None,
    bias: Any = None,
    loss: str = "square",
    weight_decay: float | None = None,
    global_mean: str = "classes",
) -> Reference:
    """Class means and the frames of the second pass. Arguments as in `measure.measure`.

    Raises:
      InputError: fewer than two classes with examples, a head of the wrong shape, an unknown name.
    """
    present = np.flatnonzero(sums.examples)
    if len(present) < 2:
        raise InputError(
            "labels", f"examples of {len(present)} class", "neural collapse is between two classes or more"
        )
    for name, value, known in (("loss", loss, LOSSES), ("global_mean", global_mean, GLOBAL_MEANS)):
        if value not in known:
            raise InputError(name, value, f"choose {' or '.join(known)}")
    if weight_decay is not None and not 0 <= weight_decay < np.inf:
        raise InputError("weight_decay", weight_decay, "give a number from 0 on")
    if weight_decay is not None and head is None:
        raise InputError("weight_decay", weight_decay, "what it is compared with is the head; give one")
    if max(len(present) * (sums.logits is not None), len(present) * (loss != "square")) > MOST_SQUARE:
        raise InputError("classes", len(present), f"beyond {MOST_SQUARE}, give no logits but a head, and loss square")
    rows, offsets, tolerance = _check_head(head, bias, sums.pivots.shape)
    dtype = sums.pivots.dtype
    counts = sums.examples[present]
    means: Any = sums.features[present] / counts[:, None]
    means += sums.pivots[present]
    weights = _class_weights(counts, global_mean)
    centred: Any = means - (weights / weights.sum()) @ means
    size = np.abs(centred).max()
    if dtype != np.float64 and size and not _LEAST < size < _MOST:
        raise InputError("features", f"of size {size:.1g}", "their squares leave float32; scale them, or take float64")
    # Single precision tells the directions of a set of means apart down to 1e-5 of the largest.
    most = min(len(present) - 1, means.shape[1])
    values, basis = _span(centred, 1e-12 if dtype == np.float64 else 1e-5, most)
    high = means.astype(dtype)
    frames: dict[str, Any] = {"high": high, "low": (means - high).astype(dtype), "basis": basis}
    outputs: Any = None if sums.logits is None else (sums.logits[present] / counts[:, None])[:, present]
    if rows is not None:
        rows, offsets = rows[present], offsets[present]
        _, frames["head_basis"] = _span(rows, tolerance, min(rows.shape))
        frames["head"] = rows @ frames["head_basis"].T
        if outputs is None and len(present) <= MOST_SQUARE:
            outputs = means @ rows.T + offsets
        frames["head_means"] = centred @ frames["head_basis"].T
        frames["head_offset"] = rows @ (means - centred)[0] + offsets
    if sums.logits is not None or rows is not None:
        near = centred @ basis.T
        frames |= {"near": near, "near_sq": np.sum(near**2, axis=1)}
    if sums.logits is not None or loss != "square":
        frames["outputs"] = outputs
    return Reference(
        asked=Asked(loss, weight_decay, global_mean),
        examples=np.asarray(sums.examples),
        present=present,
        means=means,
        centred=centred,
        spectrum=values / np.sqrt(len(present)),
        head=rows,
        bias=offsets,
        outputs=outputs,
        with_logits=sums.logits is not None,
        frames=jax.tree.map(lambda a: a.astype(dtype, copy=False), Frames(**frames)),
    )


def _class_weights(counts: Any, global_mean: str) -> np.ndarray:
    """What mu_G weighs the class means by."""
    return counts if global_mean == "examples" else np.ones(len(counts))


def _check_head(head: Any, bias: Any, shape: tuple[int, ...]) -> tuple[Any, Any, float]:
    """(head, bias, relative size of its rounding) in float64, or None twice."""
    if head is None:
        if bias is not None:
            raise InputError("bias", np.shape(bias), "it goes with a head; give both")
        return None, None, 0.0
    head = as_array("head", head)
    eps = max(shape) * float(jnp.finfo(head.dtype if head.dtype.kind not in "iu" else np.float64).eps)
    rows = np.asarray(head, np.float64)
    offsets = np.zeros(shape[0]) if bias is None else np.asarray(as_array("bias", bias), np.float64)
    if rows.shape != shape:
        hint = ", its transpose" if rows.ndim == 2 and rows.shape[0] == shape[1] else ""
        raise InputError("head", rows.shape, f"give (C, {shape[1]}), a row per class{hint}")
    if offsets.shape != shape[:1]:
        raise InputError("bias", offsets.shape, f"give ({shape[0]},), a number per class")
    if not (np.isfinite(rows).all() and np.isfinite(offsets).all()):
        raise InputError("head", "a number that is not finite", "neural collapse is of trained weights")
    return rows, offsets, eps


def _span(rows: np.ndarray, tolerance: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of (C, p) and right singular vectors as rows: `most`, those below the tolerance set to 0."""
    if len(rows) > rows.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    kept = (values > tolerance * values[0])[:most]
    return values[:most] * kept, vectors[:most] * kept[:, None]


@_one_thread
def find(reference: Reference, deviations: Deviations) -> Measurement:
    """The measurement of the examples that both passes saw."""
    counts = reference.examples[reference.present]
    if not np.array_equal(deviations.examples, counts):
        seen = f"{int(deviations.examples.sum()):,} examples"
        raise InputError("batches", seen, f"the first pass saw {int(counts.sum()):,}; both must see the same")
    with jax.enable_x64(True):
        basis, spectrum = reference.frames.basis, reference.spectrum
        metrics: dict[str, Any] = _of_means(
            reference.centred, basis, spectrum, counts, deviations.within, deviations.along_means
        )
        notes: list[str] = []
        if reference.head is not None:
            weights = _class_weights(counts, reference.asked.global_mean)
            metrics |= _of_head(reference.head, reference.centred, weights, deviations.within, deviations.along_head)
        residuals = None if reference.outputs is None else _mean_residuals(reference, deviations)
        if reference.frames.near is not None:
            metrics |= _outputs(reference, deviations, residuals)
        if reference.asked.weight_decay is not None:
            metrics |= _equilibrium(reference, deviations, residuals, notes)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    missing = np.flatnonzero(reference.examples == 0).tolist()
    return Measurement(
        metrics=metrics,
        examples=reference.examples.astype(np.int64),
        missing=missing,
        spectrum=reference.spectrum**2,
        within=np.asarray(deviations.along_means) / counts.sum(),
        variances=np.asarray(deviations.within) / counts,
        centred=reference.centred,
        notes=notes,
    )


@jax.jit
def _of_means(
    centred: Array, basis: Array, spectrum: Array, counts: Array, within: Array, along_means: Array
) -> dict[str, Array]:
    """NC1 and NC2 of features."""
    num_classes, total = len(centred), counts.sum()
    frame = collapse.Frame(basis, spectrum, jnp.count_nonzero(spectrum))
    return {
        "nc1": collapse.nc1(along_means / total, frame, num_classes),
        "nc1_rank": frame.rank,
        "nc1_trace_ratio": within.sum() / total / (jnp.sum(centred**2) / num_classes),
        **collapse.between_means(centred, within / counts),
    }


@jax.jit
def _of_head(head: Array, centred: Array, class_weights: Array, within: Array, along_head: Array) -> dict[str, Array]:
    """NC2 and NC3 of a head, and the share of the scatter that it sees."""
    return collapse.geometry(head, "head") | {
        "nc1_row_space": along_head.sum() / within.sum(),
        "nc3": collapse.self_duality(head, centred),
        "nc3_centered": collapse.self_duality(head - head.mean(0, keepdims=True), centred),
        "nc3_floor": collapse.nc3_floor(head, class_weights),
        "weight_norm_sq": jnp.sum(head**2),
    }


def _mean_residuals(reference: Reference, deviations: Deviations) -> np.ndarray:
    """rbar_c in row c."""
    assert reference.outputs is not None
    counts, outputs = reference.examples[reference.present], reference.outputs
    if reference.asked.loss == "cross_entropy":
        outputs = np.asarray(jax.nn.softmax(jnp.asarray(outputs))) - deviations.residual_sums / counts[:, None]
    return np.eye(len(outputs)) - outputs


def _outputs(reference: Reference, deviations: Deviations, residuals: np.ndarray | None) -> dict[str, Any]:
    """What outputs say: NC4 and quasi-interpolation."""
    counts = reference.examples[reference.present]
    num_classes, total = len(counts), counts.sum()
    if residuals is not None:
        interpolation = _interpolation(residuals)
    else:
        interpolation = _interpolation_of_head(reference.means, reference.head, reference.bias)
    if deviations.residuals is None:  # ||W d||^2 = sum_j s_j^2 (v_j^T d)^2
        spread = np.sum(_head_strengths(reference) * deviations.along_head)
    else:
        spread = deviations.residuals
        if deviations.residual_sums is not None:  # about the mean residual, not that of the mean output
            spread = spread - np.sum(deviations.residual_sums**2 / counts[:, None])
    return {
        "accuracy": deviations.correct / total,
        "nc4": deviations.disagreements / total,
        **interpolation,
        "output_spread": np.sqrt(spread / total / num_classes),
    }


def _head_strengths(reference: Reference) -> np.ndarray:
    """||W v_j||^2 of each vector of the head's row space: squared singular values."""
    assert reference.head is not None
    return np.sum((reference.head @ np.asarray(reference.frames.head_basis, np.float64).T) ** 2, axis=0)


def _equilibrium(reference: Reference, deviations: Deviations, residuals: Any, notes: list[str]) -> dict[str, Any]:
    """What theory says of a head that was trained with weight decay lambda."""
    assert reference.head is not None
    counts = reference.examples[reference.present]
    num_classes, total = len(counts), counts.sum()
    decay = jnp.asarray(float(reference.asked.weight_decay or 0))
    means, head, centred = (jnp.asarray(a) for a in (reference.means, reference.head, reference.centred))
    covariance = jnp.asarray(deviations.covariance) / total
    if deviations.residuals is None:  # r - rbar_c = -W (h - mu_c)
        covariance = -(head @ jnp.asarray(reference.frames.head_basis, jnp.float64).T) @ covariance
    shares = jnp.asarray(counts / total)[:, None]
    if residuals is None:  # rbar_c = e_c - W mu_c - b, and no C x C array
        weighted, bias = shares * means, jnp.asarray(reference.bias)
        products = head @ (means.T @ weighted) + jnp.outer(bias, weighted.sum(0))
        between = weighted - products
    else:
        residuals = jnp.asarray(residuals)
        between = residuals.T @ (shares * means)
    pull = between + covariance  # mean(r h^T), minus the gradient of the fit term
    metrics = {
        "equilibrium_residual": theory.equilibrium_residual(head, -pull, decay),
        "norm_target": theory.norm_target(jnp.sum(pull * head), decay),
    }
    if residuals is None or counts.min() != counts.max():
        why = "the same number of examples in each class" if residuals is not None else f"at most {MOST_SQUARE} classes"
        notes.append(f"theorem_residual, symmetric_nc3, predictions and budget are left out: they need {why}")
        return metrics
    logits = means @ head.T
    logit_part, residual_part = symmetric_part(logits), symmetric_part(residuals)
    solution = theory.symmetric_solution(logit_part, residual_part, num_classes, decay)
    terms = theory.budget(residuals, means, covariance, decay * head - pull)
    epsilon = _interpolation(residuals)["epsilon"]
    return metrics | {
        "theorem_residual": theory.theorem_residual(epsilon, head, centred, decay),
        "symmetric_nc3": solution.nc3,
        "predicted_head_norm_sq": solution.head_norm_sq,
        "predicted_head_cosine": solution.head_cosine,
        **theory.budget_account(terms, head, decay),
    }
