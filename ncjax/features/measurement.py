"""Turns the deviations of the second pass into a `Measurement`.

Metrics have the names of `VOCABULARY`, and are assembled from the same `Statistics` as those of
training. They are computed in the units of the reference, and returned in those of the features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ncjax.errors import InputError
from ncjax.features import cautions
from ncjax.features.reference import (
    MOST_EXPONENT,
    MOST_SQUARE,
    Reference,
    in_output_units,
)
from ncjax.features.result import Measurement
from ncjax.features.statistics import Deviations
from ncjax.features.streaming import SAME_EXAMPLES
from ncjax.metrics import geometry
from ncjax.metrics.blas import one_thread
from ncjax.metrics.statistics import FactoredResiduals, Statistics
from ncjax.metrics.vocabulary import FEATURE_VOCABULARY, Quantities, assemble

# Beyond, distances from hulls of classes take longer than all else.
_MOST_HULLS = 256


@one_thread
def find(reference: Reference, deviations: Deviations) -> Measurement:
    """Returns the measurement of the examples that both passes saw.

    Raises:
      InputError: the second pass saw other examples than the first, or examples so far from their
        class mean that squares leave the precision of the pass.
    """
    _check_same(reference, deviations)
    counts, units = reference.counts, reference.units
    notes: list[str] = []
    with jax.enable_x64(True):
        found = jax.device_get(_metrics_of(_statistics(reference, deviations, notes)))
    metrics = {name: float(value) for name, value in found.items()}
    metrics |= _margin(reference, notes)
    for word, test in (("undefined (NaN)", np.isnan), ("infinite", np.isinf)):
        names = [name for name, value in metrics.items() if test(value)]
        if names:
            notes.append(f"{word}: {', '.join(names)}")
    if metrics.get("norm_target", 0.0) < 0:
        notes.append(
            "norm_target is negative: residuals are on average against the outputs, so that no "
            "multiple of this head is at equilibrium"
        )
    for name, value in metrics.items():
        if exponent := units.exponent(FEATURE_VOCABULARY[name].scale):
            metrics[name] = _in_unit_one(name, value, exponent, notes)
    # If squares of features leave float64, arrays stay in the units of the reference.
    kept = units.features if abs(units.features) > MOST_EXPONENT else 0
    square = 2.0 ** (2 * (units.features - kept))
    return Measurement(
        metrics=metrics,
        examples=reference.examples.astype(np.int64),
        missing=np.flatnonzero(reference.examples == 0).tolist(),
        spectrum=reference.spectrum**2 * square,
        within=np.asarray(deviations.along_means) / counts.sum() * square,
        variances=np.asarray(deviations.within) / counts * square,
        centred=reference.centred * 2.0 ** (units.features - kept),
        cautions=cautions.of(reference, deviations, metrics),
        notes=notes,
        unit=2.0**kept,
    )


def _margin(reference: Reference, notes: list[str]) -> dict[str, float]:
    """Returns the margin of one class against the rest, of classes that outnumber dimensions."""
    num_classes, width = reference.centred.shape
    if num_classes <= width:
        return {}
    if num_classes > _MOST_HULLS:
        notes.append(f"one_vs_rest_margin is left out: it needs at most {_MOST_HULLS} classes")
        return {}
    units = np.asarray(geometry.normalized(reference.centred))
    # Two class means that are mu_G have no direction.
    return (
        {"one_vs_rest_margin": geometry.one_vs_rest_margin(units)}
        if np.isfinite(units).all()
        else {}
    )


def _in_unit_one(name: str, value: float, exponent: int, notes: list[str]) -> float:
    """Returns value * 2^exponent, and adds a note if float64 cannot hold it."""
    with np.errstate(over="ignore", under="ignore"):
        scaled = float(np.ldexp(value, exponent))
    if np.isfinite(value) and value and not np.finfo(np.float64).tiny <= abs(scaled) < np.inf:
        mantissa, power = np.frexp(value)
        notes.append(
            f"{name} is {mantissa:.6g} x 2^{power + exponent}, which float64 does not hold"
        )
    return scaled


def _check_same(reference: Reference, deviations: Deviations) -> None:
    """Refuses deviations that are not from the class means of their own examples."""
    counts, present = reference.counts, reference.present
    seen = np.asarray(deviations.examples)
    if not np.array_equal(seen, counts):
        label = np.flatnonzero(seen != counts)[0]
        what = f"{int(seen[label]):,} examples of class {present[label]} in the second pass"
        raise InputError(
            "batches", what, f"the first pass saw {int(counts[label]):,}; {SAME_EXAMPLES}"
        )
    balance = np.abs(deviations.balance)
    alike = balance <= reference.slack + reference.rounding * deviations.moduli  # False for NaN
    if not alike.all():
        label = present[np.argwhere(~alike)[0][0]]
        raise InputError(
            "batches", f"other examples of class {label} in the second pass", SAME_EXAMPLES
        )
    if not all(np.isfinite(values).all() for values in deviations if values is not None):
        way_out = f"their squares leave {reference.frames.high.dtype}; scale them"
        raise InputError("features", "examples very far from their class mean", way_out)


@jax.jit
def _metrics_of(statistics: Statistics) -> dict[str, jax.Array]:
    names = {name for name, metric in FEATURE_VOCABULARY.items() if "label" not in metric.dims}
    if len(statistics.means) > MOST_SQUARE:
        names -= {"hyperspherical_uniformity"}  # of all pairs of classes
    return assemble(Quantities(statistics), names)


def _statistics(reference: Reference, deviations: Deviations, notes: list[str]) -> Statistics:
    """Returns the statistics that every metric is computed from, in the units of the reference.

    With a weight decay, the head is in the unit that takes features to outputs.
    """
    counts = reference.counts
    fields: dict[str, Any] = {}
    if reference.head is not None:
        along_head, head_rank = np.asarray(deviations.along_head), reference.head_rank
        strengths = np.sqrt(_head_strengths(reference))
        fields |= {
            "head": reference.head,
            "head_spectrum": np.where(np.arange(len(strengths)) < head_rank, strengths, 0),
            "in_row_space": np.asarray(along_head[:head_rank].sum()),
        }
    if reference.frames.nearness is not None:
        fields |= {
            "correct": np.asarray(deviations.correct),
            "disagreements": np.asarray(deviations.disagreements),
            "mean_residuals": _mean_residuals(reference, deviations),
            "residual_norm": _residual_norm(reference, deviations),
        }
    if deviations.outlying is not None:
        fields["outlying"] = np.asarray(deviations.outlying)
    if reference.asked.weight_decay is not None:
        fields |= _equilibrium(reference, deviations, fields["mean_residuals"], notes)
    return Statistics(
        examples=counts,
        means=reference.means,
        center=reference.center,
        spectrum=reference.spectrum,
        within=deviations.within,
        along_means=deviations.along_means,
        basis=reference.frames.basis,
        class_weights=reference.class_weights,
        **fields,
    )


def _mean_residuals(reference: Reference, deviations: Deviations) -> np.ndarray | FactoredResiduals:
    """Returns rbar_c as row c, or in factors if a (C, C) array would be too large."""
    units, outputs = reference.units, reference.outputs
    target = np.asarray(np.ldexp(1.0, -units.outputs))
    if outputs is None:
        assert reference.head is not None
        assert reference.bias is not None
        return FactoredResiduals(in_output_units(reference.head, units), reference.bias, target)
    if reference.asked.loss == "cross_entropy":
        counts = reference.counts
        probabilities = np.asarray(jax.nn.softmax(jnp.asarray(outputs)))
        outputs = probabilities - deviations.residual_sums / counts[:, None]
    return target * np.eye(len(outputs)) - outputs


def _residual_norm(reference: Reference, deviations: Deviations) -> np.ndarray:
    """Returns the square root of the sum of ||r - rbar_c||^2 over examples."""
    units = reference.units
    if deviations.residuals is None:  # ||W d||^2 = sum_j s_j^2 (v_j^T d)^2
        norm = np.sqrt(np.sum(_head_strengths(reference) * np.asarray(deviations.along_head)))
        return np.asarray(np.ldexp(norm, units.features + units.head - units.outputs))
    scatter = np.asarray(deviations.residuals)
    if deviations.residual_sums is not None:  # the sums are about the class-mean output's residual
        counts = reference.counts
        scatter = scatter - np.sum(np.asarray(deviations.residual_sums) ** 2 / counts[:, None])
    return np.asarray(np.sqrt(scatter))


def _head_strengths(reference: Reference) -> np.ndarray:
    """Returns ||W v_j||^2, the squared singular value of each basis vector v_j of the head."""
    assert reference.head is not None
    return np.sum(
        (reference.head @ np.asarray(reference.frames.head_basis, np.float64).T) ** 2, axis=0
    )


def _equilibrium(
    reference: Reference, deviations: Deviations, residuals: Any, notes: list[str]
) -> dict[str, Any]:
    """Returns the fields of `Statistics` that compare a head with its equilibrium at lambda."""
    decay = reference.asked.weight_decay
    assert reference.head is not None
    assert decay is not None
    counts, units = reference.counts, reference.units
    head, means = jnp.asarray(reference.head), jnp.asarray(reference.means)
    covariance = jnp.asarray(deviations.covariance)
    along_basis = head @ jnp.asarray(reference.frames.head_basis, jnp.float64).T
    if deviations.residuals is None:  # r - rbar_c = -W (h - mu_c)
        head_scatter = along_basis @ covariance
        covariance = -head_scatter
    else:
        head_scatter = along_basis @ jnp.asarray(deviations.head_covariance)
    weighted = jnp.asarray(counts / counts.sum())[:, None] * means
    factored = isinstance(residuals, FactoredResiduals)
    if factored:
        products = head @ (means.T @ weighted) + jnp.outer(residuals.bias, weighted.sum(0))
        between = residuals.target * weighted - products
    else:
        between = jnp.asarray(residuals).T @ weighted
    pull = between + covariance / counts.sum()  # mean(r h^T), which is -(gradient of the fit term)
    fields: dict[str, Any] = {
        "fit_gradient": -pull,
        "residual_dot_logit": jnp.sum(pull * head),
        "weight_decay": np.asarray(np.ldexp(decay, -2 * units.features)),
    }
    if not factored and counts.min() == counts.max():
        return fields | {"covariance": covariance, "head_scatter": head_scatter}
    why = (
        f"at most {MOST_SQUARE} classes"
        if factored
        else "the same number of examples in each class"
    )
    notes.append(
        "theorem_residual, symmetric_nc3, predictions, budget and bounds of it are left out: they "
        f"need {why}"
    )
    return fields
