"""From the statistics of two passes to the numbers: class means and frames between the passes,
metrics after them.

`prepare` turns the first pass's sums into a `Reference` for the second, `find` turns that pass's
deviations into a `Measurement`. What is small, (C, p) at most, is float64 here, on the host, in
units in which no square of it leaves float64 (`Units`). Metrics bear the names of
`VOCABULARY` and are computed by `collapse` and `theory`, as those of training are.

Classes without an example are left out: all is measured for the C classes that have one, with their
rows of the head and their outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Float, Int, Num

from ncjax.errors import InputError
from ncjax.features import cautions
from ncjax.features.result import Measurement
from ncjax.features.statistics import Deviations, Frames, Scores, Sums, rounding_of_sums
from ncjax.features.streaming import SAME_EXAMPLES, as_array
from ncjax.metrics import collapse, geometry, theory
from ncjax.metrics.linalg import symmetric_part
from ncjax.metrics.statistics import Statistics
from ncjax.metrics.vocabulary import Quantities, assemble

T = TypeVar("T")

# Beyond, C x C arrays are not held: no budget, no cross-entropy, no logits.
MOST_SQUARE = 2048
# Beyond, distances from hulls of classes take longer than all else.
_MOST_HULLS = 256
# Features along which deviations from the class means must cancel out, for as many as so many
# classes say.
_PROBES, _PROBED_CLASSES = 4, 256
# How much more than rounding the sums of both passes may differ by, and how much a model's features
# may differ from one evaluation to the next, in their own size: rounding of float32 over and over,
# independent from example to example.
_SAFETY, _NOISE = 2.0, 2.0**-18
# Numbers up to two to this power can be squared and added up in float64, and down to its inverse.
_MOST_EXPONENT = 450
GLOBAL_MEANS, LOSSES = ("classes", "examples"), ("square", "cross_entropy")


class Asked(NamedTuple):
    """Names what is to be measured; its fields are arguments of `measure.measure_batches`."""

    loss: str = "square"
    weight_decay: float | None = None
    global_mean: str = "classes"


class Units(NamedTuple):
    """Exponents of the powers of two that features, head and outputs are measured in: exact,
    whatever their size.

    NC1 to NC4, cdnv and accuracy are the same in any. Targets are 2^-outputs in these units, and
    with features h = 2^a h' and outputs f = 2^e f' the head is W = 2^(e-a) W', and lambda W =
    mean(r h^T) becomes lambda/2^(2a) W' = mean(r' h'^T).
    """

    features: int
    head: int
    outputs: int

    @property
    def of_metrics(self) -> dict[str, int]:
        """Exponents by which metrics in these units are to be multiplied."""
        a, b, e = self
        units = dict.fromkeys(
            ("epsilon", "delta", "sqi_gap", "output_asymmetry", "output_spread"), e
        )
        units |= dict.fromkeys(("norm_target", "predicted_head_norm_sq"), 2 * (e - a))
        units |= {f"budget_{term}_norm": e + a for term in theory.Budget._fields}
        return units | {"weight_norm_sq": 2 * b, "nc0": b, "mean_feature_norm": a}


class Reference(NamedTuple):
    """Holds what the second pass measures against, of the C classes that have examples; `examples`
    counts those of every class.

    Attributes:
      examples: of every class, those with none too.
      present: the classes that have examples.
      units: what all that follows is measured in.
      means: mu_c. centred: mu_c - mu_G.
      spectrum: singular values of Mdot/sqrt(C), 0 where they do not count; frames.basis has their
        vectors.
      head, bias: None without a head; the bias is in the units of outputs.
      head_rank: so many of the head's singular values count.
      outputs: mean outputs of each class; None without outputs or where there are more than 2,048
        classes.
      slack, rounding: `Deviations.balance` is at most slack + rounding `Deviations.moduli` if both
        passes see the same.
    """

    asked: Asked
    examples: Num[np.ndarray, " all"]
    present: Int[np.ndarray, " C"]
    units: Units
    means: Float[np.ndarray, "C p"]
    centred: Float[np.ndarray, "C p"]
    spectrum: Float[np.ndarray, " k"]
    head: Float[np.ndarray, "C p"] | None
    bias: Float[np.ndarray, " C"] | None
    head_rank: int
    outputs: Float[np.ndarray, "C C"] | None
    slack: Float[np.ndarray, "C m"]
    rounding: Float[np.ndarray, "C 1"]
    with_logits: bool
    frames: Frames


_interpolation = jax.jit(collapse.quasi_interpolation)
_interpolation_of_head = jax.jit(collapse.quasi_interpolation_of_head)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def _one_thread(function: Callable[..., T]) -> Callable[..., T]:
    """OpenBLAS's threads wait by spinning: beside XLA's, two of them were five to ten times as
    slow as one.
    """

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
    """Returns class means and the frames of the second pass. Arguments as in `measure.measure`.

    Raises:
      InputError: fewer than two classes with examples, a head of the wrong shape, an unknown name,
        outputs or an equilibrium that leave float64.
    """
    present, with_logits = np.flatnonzero(sums.examples), sums.logits is not None
    asked = Asked(loss, weight_decay, global_mean)
    _check_asked(asked, len(present), with_logits, head is not None)
    head_dtype, rows, offsets = _check_head(head, bias, sums.pivots.shape)
    if rows is not None:
        rows, offsets = rows[present], offsets[present]
    dtype = sums.pivots.dtype
    unit, means, centred, columns = _class_means(sums, present, global_mean)
    outputs: Any = (
        sums.logits[present][:, present] / sums.examples[present, None]
        if sums.logits is not None
        else None
    )
    units, rows, offsets = _units(unit, means, rows, offsets, outputs, loss, dtype)
    _check_decay(weight_decay, units)

    values, basis = _span(centred, min(len(present) - 1, means.shape[1]))
    counted = values > collapse.rank_tolerance(dtype) * values[0]
    high = means.astype(dtype)
    frames: dict[str, Any] = {
        "unit": np.asarray(2.0**-unit),
        "high": high,
        "low": means - high,
        "basis": basis,
    }
    frames["probes"] = (columns[:, None] == np.arange(means.shape[1])).astype(dtype)
    head_rank = 0
    if with_logits:
        outputs = np.ldexp(outputs, -units.outputs)
        frames |= {"logit_unit": np.asarray(2.0**-units.outputs), "expected": outputs}
    if rows is not None:
        strengths, frames["head_basis"] = _span(rows, min(rows.shape))
        head_rank = int(
            np.count_nonzero(strengths > collapse.rank_tolerance(head_dtype) * strengths[0])
        )
        if not with_logits:
            frames["outputs"] = _head_scores(
                units, loss, means, centred, rows, offsets, frames["head_basis"]
            )
            if len(present) <= MOST_SQUARE:
                outputs = means @ _in_output_units(rows, units).T + offsets
    if with_logits or rows is not None:
        frames["nearness"] = _nearness(centred, basis)
    slack, rounding = _allowed(
        sums, present, means, columns, unit, outputs if with_logits else None
    )
    return Reference(
        asked=asked,
        examples=np.asarray(sums.examples),
        present=present,
        units=units,
        means=means,
        centred=centred,
        spectrum=values * counted / np.sqrt(len(present)),
        head=rows,
        bias=offsets,
        head_rank=head_rank,
        outputs=outputs,
        slack=slack,
        rounding=rounding,
        with_logits=with_logits,
        frames=jax.tree.map(lambda a: a.astype(dtype, copy=False), Frames(**frames)),
    )


def _check_asked(asked: Asked, num_classes: int, with_logits: bool, with_head: bool) -> None:
    if num_classes < 2:
        raise InputError(
            "labels",
            f"examples of {num_classes} class",
            "neural collapse is between two classes or more",
        )
    known = {"loss": LOSSES, "global_mean": GLOBAL_MEANS}
    for name, names in known.items():
        if getattr(asked, name) not in names:
            raise InputError(name, getattr(asked, name), f"choose {' or '.join(names)}")
    decay = asked.weight_decay
    if decay is not None and not 0 <= decay < np.inf:
        raise InputError("weight_decay", decay, "give a number from 0 on")
    if decay is not None and not with_head:
        raise InputError("weight_decay", decay, "what it is compared with is the head; give one")
    if (with_logits or asked.loss != "square") and num_classes > MOST_SQUARE:
        raise InputError(
            "classes",
            num_classes,
            f"beyond {MOST_SQUARE}, give no logits but a head, and loss square",
        )


def _class_weights(counts: Any, global_mean: str) -> np.ndarray:
    """Returns what mu_G weighs the class means by."""
    return counts if global_mean == "examples" else np.ones(len(counts))


def _class_means(
    sums: Sums, present: np.ndarray, global_mean: str
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the exponent of the features' unit, mu_c and mu_c - mu_G in it, and the columns to
    probe.

    The unit is that of the largest of centred means and of mu_c - pivot_c, an example's deviation.
    The columns are those in which these are largest.
    """
    counts = sums.examples[present]
    means: Any = sums.features[present] / counts[:, None]
    deviations, farthest = np.abs(means[:_PROBED_CLASSES]).max(0), _largest(means)
    means += sums.pivots[present]
    weights = _class_weights(counts, global_mean)
    centred: Any = means - (weights / weights.sum()) @ means
    size = max(farthest, _largest(centred))
    if not np.isfinite(size):
        raise InputError("features", "sums beyond float64", "multiply them by a power of two")
    # One whose inverse is no subnormal number, which XLA takes for 0.
    unit = min(_exponent(size or _largest(means)), np.finfo(sums.pivots.dtype).maxexp - 4)
    for array in (means, centred):
        array *= 2.0**-unit
    moves = np.maximum(deviations / 2.0**unit, np.abs(centred[:_PROBED_CLASSES]).max(0))
    return unit, means, centred, np.argsort(moves)[-_PROBES:]


def _check_head(head: Any, bias: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Returns (type, head, bias), the latter in float64, or None three times."""
    if head is None:
        if bias is not None:
            raise InputError("bias", np.shape(bias), "it goes with a head; give both")
        return None, None, None
    head = as_array("head", head)
    rows = np.asarray(head, np.float64)
    offsets = np.zeros(shape[0]) if bias is None else np.asarray(as_array("bias", bias), np.float64)
    if rows.shape != shape:
        hint = ", its transpose" if rows.ndim == 2 and rows.shape[0] == shape[1] else ""
        raise InputError("head", rows.shape, f"give (C, {shape[1]}), a row per class{hint}")
    if offsets.shape != shape[:1]:
        raise InputError("bias", offsets.shape, f"give ({shape[0]},), a number per class")
    for name, array in (("head", rows), ("bias", offsets)):
        if not np.isfinite(array).all():
            raise InputError(
                name, "a number that is not finite", "neural collapse is of trained weights"
            )
    return head.dtype, rows, offsets


def _largest(array: np.ndarray) -> float:
    """Returns the largest modulus, without an array of moduli."""
    return max(float(array.max()), -float(array.min()))


def _exponent(size: float) -> int:
    """Returns k with 2^(k-1) <= size < 2^k, 0 for 0."""
    return int(np.frexp(size)[1])


def _longest(rows: np.ndarray) -> float:
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max()))


def _units(
    unit: int, means: np.ndarray, head: Any, bias: Any, logits: Any, loss: str, dtype: Any
) -> tuple[Units, np.ndarray | None, np.ndarray | None]:
    """Returns the units, and head and bias in them; the means are so already."""
    head_unit, sizes = 0, [0]
    if logits is not None:
        sizes.append(min(_exponent(_largest(logits)), np.finfo(dtype).maxexp - 4))
    if head is not None:
        head_unit = _exponent(_largest(head))
        head = np.ldexp(head, -head_unit)
    if head is not None and logits is None:
        reach = _longest(head) * _longest(means)  # no output is larger
        sizes += [_exponent(_largest(bias)), unit + head_unit + _exponent(reach) if reach else 0]
    outputs = max(sizes)
    if loss == "cross_entropy":  # an exponential has a unit of its own
        most = np.finfo(dtype).maxexp - 24
        if outputs > most:
            way_out = (
                f"cross-entropy of outputs beyond 2^{most} leaves {np.dtype(dtype)}; scale "
                "logits, head or features"
            )
            raise InputError("outputs", f"up to 2^{outputs}", way_out)
        outputs = 0
    bias = None if bias is None else np.ldexp(bias, -outputs)
    return Units(unit, head_unit, outputs), head, bias


def _in_output_units(head: np.ndarray, units: Units) -> np.ndarray:
    """Returns the head that takes features in their unit to outputs in theirs."""
    return np.ldexp(head, units.features + units.head - units.outputs)


def _check_decay(weight_decay: float | None, units: Units) -> None:
    """Refuses what equilibrium is compared with where squares of it, in the units of the
    outputs, leave float64.
    """
    if weight_decay is None:
        return
    shift = units.features + units.head - units.outputs
    decay = _exponent(weight_decay) - 2 * units.features if weight_decay else 0
    if max(abs(decay), abs(shift), abs(decay + shift)) > _MOST_EXPONENT:
        sizes = (
            f"features are of size 2^{units.features}, head 2^{units.head}, outputs "
            f"2^{units.outputs}"
        )
        raise InputError(
            "weight_decay", weight_decay, f"its equilibrium leaves float64, for {sizes}; scale them"
        )


def _span(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `most` singular values of (C, p) and right singular vectors as rows."""
    if len(rows) > rows.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    return values[:most], vectors[:most]


def _nearness(centred: np.ndarray, basis: np.ndarray) -> Scores:
    """Returns -||h - mu_c||^2/2 up to a term that all classes share: <h - mu_G, mu_c - mu_G> -
    ||mu_c - mu_G||^2/2.
    """
    near = centred @ basis.T
    squares = np.sum(near**2, axis=1)
    if len(near) > MOST_SQUARE:
        return Scores(near, means=near, offset=-squares / 2)
    distances = squares[:, None] + squares[None, :] - 2 * near @ near.T
    np.fill_diagonal(distances, 0)
    return Scores(near, at_means=-np.maximum(distances, 0) / 2)


def _head_scores(
    units: Units,
    loss: str,
    means: np.ndarray,
    centred: np.ndarray,
    head: np.ndarray,
    bias: Any,
    basis: np.ndarray,
) -> Scores:
    """Returns the head's outputs up to a term that all classes share: W and b are less their means
    over classes.

    For softmax they are in the unit 1, else in one in which they are neither large nor all small.
    """
    weights, offset = head - head.mean(0), bias - bias.mean()
    natural = units.features + units.head
    unit = 0
    if loss != "cross_entropy":
        unit = max(
            natural, units.outputs + _exponent(_largest(offset)) if offset.any() else natural
        )
    weights, offset = np.ldexp(weights, natural - unit), np.ldexp(offset, units.outputs - unit)
    along = weights @ basis.T
    if len(means) > MOST_SQUARE:
        return Scores(
            along, means=centred @ basis.T, offset=weights @ (means - centred)[0] + offset
        )
    outputs = means @ weights.T + offset
    return Scores(along, at_means=outputs - np.diagonal(outputs)[:, None])


def _allowed(
    sums: Sums,
    present: np.ndarray,
    means: np.ndarray,
    columns: np.ndarray,
    unit: int,
    logits: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (slack, rounding) of a `Reference`.

    sum(h - mu_c), of numbers |h - mu_c| whose sum is M, differs from 0 by the rounding of the first
    pass, relative to sum |h - pivot| <= M + n |mu_c - pivot|, and where a model is evaluated twice
    by its own rounding, which averages out over n examples.
    """
    counts = sums.examples[present][:, None]
    own = means[:, columns]
    away = abs(own - sums.pivots[present][:, columns] * 2.0**-unit)
    if logits is not None:
        mean = np.diagonal(logits)[:, None]
        own, away = np.hstack([own, mean]), np.hstack([away, abs(mean)])
    rounding = _SAFETY * rounding_of_sums(counts, len(sums.examples), sums.pivots.dtype)
    return rounding * counts * away + _NOISE * np.sqrt(counts) * abs(
        own
    ), rounding + _NOISE / np.sqrt(counts)


@_one_thread
def find(reference: Reference, deviations: Deviations) -> Measurement:
    """Returns the measurement of the examples that both passes saw.

    Raises:
      InputError: the second pass saw other examples than the first, or some so far from their class
        mean that squares leave the precision of the pass.
    """
    _check_same(reference, deviations)
    counts, units = reference.examples[reference.present], reference.units
    notes: list[str] = []
    with jax.enable_x64(True):
        metrics: dict[str, Any] = _of_features(_statistics(reference, deviations))
        residuals = None if reference.outputs is None else _mean_residuals(reference, deviations)
        if reference.frames.nearness is not None:
            metrics |= _outputs(reference, deviations, residuals)
        if reference.asked.weight_decay is not None:
            metrics |= _equilibrium(reference, deviations, residuals, notes)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    metrics |= _of_geometry(reference, deviations, notes)
    for word, test in (("undefined (NaN)", np.isnan), ("infinite", np.isinf)):
        names = [name for name, value in metrics.items() if test(value)]
        if names:
            notes.append(f"{word}: {', '.join(names)}")
    for name, exponent in units.of_metrics.items():
        if name in metrics:
            metrics[name] = _in_unit_one(name, metrics[name], exponent, notes)
    # Squares of features leave float64: arrays stay in the units of the reference.
    kept = units.features if abs(units.features) > _MOST_EXPONENT else 0
    square, missing = (
        2.0 ** (2 * (units.features - kept)),
        np.flatnonzero(reference.examples == 0).tolist(),
    )
    return Measurement(
        metrics=metrics,
        examples=reference.examples.astype(np.int64),
        missing=missing,
        spectrum=reference.spectrum**2 * square,
        within=np.asarray(deviations.along_means) / counts.sum() * square,
        variances=np.asarray(deviations.within) / counts * square,
        centred=reference.centred * 2.0 ** (units.features - kept),
        cautions=cautions.of(reference, deviations, metrics),
        notes=notes,
        unit=2.0**kept,
    )


def _of_geometry(
    reference: Reference, deviations: Deviations, notes: list[str]
) -> dict[str, float]:
    """Returns what is known of class means and head where classes may outnumber dimensions."""
    counts, means = reference.examples[reference.present], reference.means
    squares = counts @ np.sum(means**2, axis=1) + np.sum(np.asarray(deviations.within))
    metrics = {
        "mean_feature_norm": float(np.sqrt(squares / counts.sum())),
        "effective_rank": geometry.effective_rank(reference.spectrum),
        "condition_number": geometry.condition_number(reference.spectrum),
    }
    units = geometry.normalized(reference.centred)
    if reference.head is not None:
        metrics["nc0"] = float(np.linalg.norm(reference.head.sum(axis=0)))
        metrics["uniform_duality"] = geometry.uniform_duality(reference.head, units)
    if len(units) <= MOST_SQUARE:
        metrics["hyperspherical_uniformity"] = geometry.hyperspherical_uniformity(units)
    if units.shape[1] < len(units) <= _MOST_HULLS and np.isfinite(units).all():
        metrics["one_vs_rest_margin"] = geometry.one_vs_rest_margin(units)
    elif units.shape[1] < len(units):
        notes.append(f"one_vs_rest_margin is left out: it needs at most {_MOST_HULLS} classes")
    return metrics


def _in_unit_one(name: str, value: float, exponent: int, notes: list[str]) -> float:
    """Returns value 2^exponent, with a note if float64 does not hold it."""
    with np.errstate(over="ignore", under="ignore"):
        scaled = float(np.ldexp(value, exponent))
    if np.isfinite(value) and value and not np.finfo(np.float64).tiny <= abs(scaled) < np.inf:
        mantissa, power = np.frexp(value)
        notes.append(
            f"{name} is {mantissa:.6g} x 2^{power + exponent}, which float64 does not hold"
        )
    return scaled


def _check_same(reference: Reference, deviations: Deviations) -> None:
    """Refuses deviations from other class means than those of the examples that they are of."""
    counts, present = reference.examples[reference.present], reference.present
    seen = np.asarray(deviations.examples)
    if not np.array_equal(seen, counts):
        label = np.flatnonzero(seen != counts)[0]
        what = f"{int(seen[label]):,} examples of class {present[label]} in the second pass"
        raise InputError(
            "batches", what, f"the first pass saw {int(counts[label]):,}; {SAME_EXAMPLES}"
        )
    balance = np.abs(deviations.balance)
    alike = balance <= reference.slack + reference.rounding * deviations.moduli  # not so of NaN
    if not alike.all():
        label = present[np.argwhere(~alike)[0][0]]
        raise InputError(
            "batches", f"other examples of class {label} in the second pass", SAME_EXAMPLES
        )
    if not all(np.isfinite(values).all() for values in deviations if values is not None):
        way_out = f"their squares leave {reference.frames.high.dtype}; scale them"
        raise InputError("features", "examples very far from their class mean", way_out)


_of_features = jax.jit(lambda statistics: assemble(Quantities(statistics)))


def _statistics(reference: Reference, deviations: Deviations) -> Statistics:
    """Returns what NC1 to NC3 are computed from, as in training."""
    counts = reference.examples[reference.present]
    weights = _class_weights(counts, reference.asked.global_mean)
    seen = None
    if reference.head is not None:
        seen = np.asarray(np.sum(np.asarray(deviations.along_head)[: reference.head_rank]))
    return Statistics(
        examples=counts,
        means=reference.means,
        center=(weights / weights.sum()) @ reference.means,
        spectrum=reference.spectrum,
        within=deviations.within,
        along_means=deviations.along_means,
        head=reference.head,
        in_row_space=seen,
        class_weights=weights,
    )


def _mean_residuals(reference: Reference, deviations: Deviations) -> np.ndarray:
    """rbar_c in row c."""
    assert reference.outputs is not None
    counts, outputs = reference.examples[reference.present], reference.outputs
    if reference.asked.loss == "cross_entropy":
        outputs = (
            np.asarray(jax.nn.softmax(jnp.asarray(outputs)))
            - deviations.residual_sums / counts[:, None]
        )
    return np.ldexp(np.eye(len(outputs)), -reference.units.outputs) - outputs


def _outputs(
    reference: Reference, deviations: Deviations, residuals: np.ndarray | None
) -> dict[str, Any]:
    """Returns NC4, accuracy and quasi-interpolation, which outputs determine."""
    counts, units = reference.examples[reference.present], reference.units
    num_classes, total = len(counts), counts.sum()
    if residuals is not None:
        interpolation = _interpolation(residuals)
    else:
        assert reference.head is not None
        head, target = _in_output_units(reference.head, units), np.ldexp(1.0, -units.outputs)
        interpolation = _interpolation_of_head(reference.means, head, reference.bias, target)
    if deviations.residuals is None:  # ||W d||^2 = sum_j s_j^2 (v_j^T d)^2
        spread = np.sqrt(np.sum(_head_strengths(reference) * deviations.along_head))
        spread = np.ldexp(spread, units.features + units.head - units.outputs)
    else:
        spread = deviations.residuals
        if deviations.residual_sums is not None:
            # About the mean residual, not that of the mean output.
            spread = spread - np.sum(deviations.residual_sums**2 / counts[:, None])
        spread = np.sqrt(spread)
    return {
        "accuracy": deviations.correct / total,
        "nc4": deviations.disagreements / total,
        **interpolation,
        "output_spread": spread / np.sqrt(total * num_classes),
    }


def _head_strengths(reference: Reference) -> np.ndarray:
    """||W v_j||^2 of each vector of the head's row space: squared singular values."""
    assert reference.head is not None
    return np.sum(
        (reference.head @ np.asarray(reference.frames.head_basis, np.float64).T) ** 2, axis=0
    )


def _equilibrium(
    reference: Reference, deviations: Deviations, residuals: Any, notes: list[str]
) -> dict[str, Any]:
    """Returns what theory says of a head that was trained with weight decay lambda."""
    assert reference.head is not None
    counts, units = reference.examples[reference.present], reference.units
    num_classes, total = len(counts), counts.sum()
    decay = jnp.asarray(np.ldexp(float(reference.asked.weight_decay or 0), -2 * units.features))
    head = jnp.asarray(_in_output_units(reference.head, units))
    means, centred = jnp.asarray(reference.means), jnp.asarray(reference.centred)
    covariance = jnp.asarray(deviations.covariance) / total
    if deviations.residuals is None:  # r - rbar_c = -W (h - mu_c)
        covariance = -(head @ jnp.asarray(reference.frames.head_basis, jnp.float64).T) @ covariance
    shares = jnp.asarray(counts / total)[:, None]
    if residuals is None:  # rbar_c = e_c - W mu_c - b, and no C x C array
        weighted, bias = shares * means, jnp.asarray(reference.bias)
        products = head @ (means.T @ weighted) + jnp.outer(bias, weighted.sum(0))
        between = jnp.ldexp(weighted, -units.outputs) - products
    else:
        residuals = jnp.asarray(residuals)
        between = residuals.T @ (shares * means)
    pull = between + covariance  # mean(r h^T), minus the gradient of the fit term
    metrics = {
        "equilibrium_residual": theory.equilibrium_residual(head, -pull, decay),
        "norm_target": theory.norm_target(jnp.sum(pull * head), decay),
    }
    if residuals is None or counts.min() != counts.max():
        why = (
            "the same number of examples in each class"
            if residuals is not None
            else f"at most {MOST_SQUARE} classes"
        )
        notes.append(
            f"theorem_residual, symmetric_nc3, predictions and budget are left out: they need {why}"
        )
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
