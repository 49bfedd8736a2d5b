"""Computes class means, units and frames for the second pass from the sums of the first.

Arrays here have at most (C, p) numbers. They are float64, on the host, in units in which no square
of them leaves float64 (`Units`). Classes without examples are left out, with their rows of the head
and their outputs, and C is the number of the others.
"""

import numbers
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from ncjax.errors import InputError
from ncjax.features.statistics import Frames, Scores, Sums, rounding_of_sums
from ncjax.features.streaming import as_array
from ncjax.metrics import collapse
from ncjax.metrics.blas import one_thread

# The most classes for which (C, C) arrays are held; with more there is no budget, no cross-entropy
# and no logits.
MOST_SQUARE = 2048
# The number of features whose deviations from the class means are checked to cancel out, and the
# number of classes that they are chosen by.
_PROBES, _PROBED_CLASSES = 4, 256
# The factor on rounding by which the sums of both passes may differ, and the relative difference
# of a model's features between two evaluations. The latter is rounding of float32 in many layers,
# independent for each example.
_SAFETY, _NOISE = 2.0, 2.0**-18
# Numbers between 2^-450 and 2^450 can be squared and added up in float64.
MOST_EXPONENT = 450
GLOBAL_MEANS, LOSSES = ("classes", "examples"), ("square", "cross_entropy")


class Asked(NamedTuple):
    """Holds the arguments of `measure.measure_batches` that choose what is measured."""

    loss: str = "square"
    weight_decay: float | None = None
    global_mean: str = "classes"


class Units(NamedTuple):
    """Holds the exponents of the powers of two in which features, head and outputs are measured.

    Powers of two are exact, whatever the size of the numbers. NC1 to NC4, cdnv and accuracy are the
    same in any unit. Targets are 2^-outputs in these units. With features h = 2^a h' and outputs f
    = 2^e f', the head is W = 2^(e-a) W', and lambda W = mean(r h^T) becomes lambda/2^(2a) W' =
    mean(r' h'^T).
    """

    features: int
    head: int
    outputs: int

    def exponent(self, scale: tuple[int, int, int]) -> int:
        """Returns the exponent of the unit of a metric of this `Metric.scale`."""
        features, head, outputs = scale
        return features * self.features + head * self.head + outputs * self.outputs


class Reference(NamedTuple):
    """Holds what the second pass compares examples with, for the C classes that have examples.

    Attributes:
      asked: the arguments that choose what is measured.
      examples: the number of examples of every class, including those that have none.
      present: the classes that have examples.
      units: the units of the fields below.
      means: the class means mu_c as rows.
      centred: mu_c - mu_G as rows.
      spectrum: the singular values of Mdot/sqrt(C), 0 beyond the rank; their vectors are
        `frames.basis`.
      head, bias: W and b, with b in the units of the outputs; None without a head.
      head_rank: the number of the head's singular values that count as nonzero.
      outputs: the mean outputs of each class; None without outputs, or with more than 2,048
        classes.
      slack, rounding: if both passes see the same examples, `Deviations.balance` is at most slack +
        rounding * `Deviations.moduli`.
      with_logits: whether batches have logits.
      frames: the arrays for the devices.
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

    @property
    def counts(self) -> Num[np.ndarray, " C"]:
        """The number of examples of each class that has any."""
        return self.examples[self.present]

    @property
    def class_weights(self) -> Num[np.ndarray, " C"]:
        """The weights of the class means in mu_G."""
        return _class_weights(self.counts, self.asked.global_mean)

    @property
    def center(self) -> Float[np.ndarray, " p"]:
        """The global mean mu_G."""
        return (self.class_weights / self.class_weights.sum()) @ self.means


@one_thread
def prepare(
    sums: Sums,
    *,
    head: Any = None,
    bias: Any = None,
    loss: str = "square",
    weight_decay: float | None = None,
    global_mean: str = "classes",
) -> Reference:
    """Returns the class means and the frames of the second pass.

    Args:
      sums: the sums of the first pass.
      head, bias, loss, weight_decay, global_mean: as in `measure.measure`.

    Raises:
      InputError: fewer than two classes have examples, the head has a wrong shape, a name is
        unknown, or outputs or an equilibrium leave float64.
    """
    present, with_logits = np.flatnonzero(sums.examples), sums.logits is not None
    asked = Asked(loss, weight_decay, global_mean)
    check_asked(asked, head is not None)
    _check_classes(asked, len(present), with_logits)
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
    units, rows, offsets = _units(unit, means, rows, offsets, outputs, asked, dtype)

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
                outputs = means @ in_output_units(rows, units).T + offsets
    if with_logits or rows is not None:
        frames["nearness"] = _nearness(centred, basis)
        if len(present) <= MOST_SQUARE:
            inverse = np.divide(1, values, out=np.zeros_like(values), where=counted)
            frames["reach"] = collapse.Certificate(inverse, collapse.radii_sq(centred))
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


def check_asked(asked: Asked, with_head: bool) -> None:
    """Raises InputError for arguments that choose nothing which can be measured."""
    known = {"loss": LOSSES, "global_mean": GLOBAL_MEANS}
    for name, names in known.items():
        if getattr(asked, name) not in names:
            raise InputError(name, getattr(asked, name), f"choose {' or '.join(names)}")
    decay = asked.weight_decay
    is_number = isinstance(decay, numbers.Real) and not isinstance(decay, bool)
    if decay is not None and not (is_number and 0 <= decay < np.inf):
        raise InputError("weight_decay", decay, "give a number from 0 on")
    if decay is not None and not with_head:
        raise InputError("weight_decay", decay, "what it is compared with is the head; give one")


def _check_classes(asked: Asked, num_classes: int, with_logits: bool) -> None:
    if num_classes < 2:
        raise InputError(
            "labels",
            f"examples of {num_classes} class",
            "neural collapse is between two classes or more",
        )
    if (with_logits or asked.loss != "square") and num_classes > MOST_SQUARE:
        raise InputError(
            "classes",
            num_classes,
            f"beyond {MOST_SQUARE}, give no logits but a head, and loss square",
        )


def _class_weights(counts: Any, global_mean: str) -> np.ndarray:
    """Returns the weights of the class means in mu_G."""
    return counts if global_mean == "examples" else np.ones(len(counts))


def _class_means(
    sums: Sums, present: np.ndarray, global_mean: str
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the exponent of the features' unit, mu_c and mu_c - mu_G in it, and columns to probe.

    The unit is that of the largest number in the centred means and in mu_c - pivot_c, an example's
    deviation. The columns are those in which these are largest.
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
    # The inverse of the unit must not be subnormal, because XLA takes such numbers for 0.
    unit = min(_exponent(size or _largest(means)), np.finfo(sums.pivots.dtype).maxexp - 4)
    for array in (means, centred):
        array *= 2.0**-unit
    moves = np.maximum(deviations / 2.0**unit, np.abs(centred[:_PROBED_CLASSES]).max(0))
    return unit, means, centred, np.argsort(moves)[-_PROBES:]


def _check_head(head: Any, bias: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Returns the head's type, and head and bias in float64, or three times None without a head."""
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
    """Returns the largest absolute value, without an array of absolute values."""
    return max(float(array.max()), -float(array.min()))


def _exponent(size: float) -> int:
    """Returns k with 2^(k-1) <= size < 2^k, 0 for 0."""
    return int(np.frexp(size)[1])


def _longest(rows: np.ndarray) -> float:
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max()))


def _units(
    unit: int, means: np.ndarray, head: Any, bias: Any, logits: Any, asked: Asked, dtype: Any
) -> tuple[Units, np.ndarray | None, np.ndarray | None]:
    """Returns the units, and head and bias in them; the means already are.

    The head's unit is that of its largest number. With a weight decay it is the one that takes
    features to outputs, because equilibrium relates the three.
    """
    head_unit, sizes = 0, [0]
    if logits is not None:
        sizes.append(min(_exponent(_largest(logits)), np.finfo(dtype).maxexp - 4))
    if head is not None:
        head_unit = _exponent(_largest(head))
        head = np.ldexp(head, -head_unit)
    if head is not None and logits is None:
        reach = _longest(head) * _longest(means)  # a bound on all outputs
        sizes += [_exponent(_largest(bias)), unit + head_unit + _exponent(reach) if reach else 0]
    outputs = max(sizes)
    if asked.loss == "cross_entropy":  # the argument of an exponential has the unit 1
        most = np.finfo(dtype).maxexp - 24
        if outputs > most:
            way_out = (
                f"cross-entropy of outputs beyond 2^{most} leaves {np.dtype(dtype)}; scale "
                "logits, head or features"
            )
            raise InputError("outputs", f"up to 2^{outputs}", way_out)
        outputs = 0
    bias = None if bias is None else np.ldexp(bias, -outputs)
    units = Units(unit, head_unit, outputs)
    if head is not None and asked.weight_decay is not None:
        _check_decay(asked.weight_decay, units)
        head = in_output_units(head, units)
        units = units._replace(head=outputs - unit)
    return units, head, bias


def in_output_units(head: np.ndarray, units: Units) -> np.ndarray:
    """Returns the head that maps features in their unit to outputs in their unit."""
    return np.ldexp(head, units.features + units.head - units.outputs)


def _check_decay(weight_decay: float, units: Units) -> None:
    """Refuses a weight decay with which squares, in the units of the outputs, leave float64."""
    shift = units.features + units.head - units.outputs
    decay = _exponent(weight_decay) - 2 * units.features if weight_decay else 0
    if max(abs(decay), abs(shift), abs(decay + shift)) > MOST_EXPONENT:
        sizes = (
            f"features are of size 2^{units.features}, head 2^{units.head}, outputs "
            f"2^{units.outputs}"
        )
        raise InputError(
            "weight_decay", weight_decay, f"its equilibrium leaves float64, for {sizes}; scale them"
        )


def _span(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `most` singular values of (C, p), and right singular vectors as rows."""
    if len(rows) > rows.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    return values[:most], vectors[:most]


def _nearness(centred: np.ndarray, basis: np.ndarray) -> Scores:
    """Returns scores <h - mu_G, mu_c - mu_G> - ||mu_c - mu_G||^2/2.

    These are -||h - mu_c||^2/2 up to a term that all classes share.
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
    """Returns the head's outputs as scores, up to a term that all classes share.

    W and b are centred over classes. The unit is 1 for softmax, else one in which the scores are
    neither large nor all small.
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

    With M = sum |h - mu_c|, sum(h - mu_c) differs from 0 by the rounding of the first pass, which
    is relative to sum |h - pivot| <= M + n |mu_c - pivot|. If a model is evaluated twice, it also
    differs by the model's own rounding, which averages out over n examples.
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
