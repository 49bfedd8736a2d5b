"""Measures how features of out-of-distribution examples lie to those of the classes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ncjax.errors import InputError
from ncjax.features import streaming
from ncjax.features.pooling import Pool, pooled
from ncjax.metrics import geometry

if TYPE_CHECKING:
    from ncjax.features.reference import Reference

# Rows that are scored at once.
_ROWS = 2**14


def as_outliers(ood: Any, pool: Pool) -> np.ndarray:
    """Returns features (M, p) of outliers, or raises InputError."""
    features = np.asarray(pooled(streaming.as_array("ood", ood), pool))
    if features.ndim != 2 or not len(features):
        raise InputError("ood", features.shape, "give (M, p), a row per example")
    if not np.isfinite(features).all():
        raise InputError("ood", "a number that is not finite", "leave out what is not finite")
    return features


def measure_outliers(
    reference: "Reference", batches: Iterable, ood: np.ndarray
) -> dict[str, float]:
    """Returns nc5 and ood_auroc, or raises InputError where outliers have another p.

    References:
      Ammar et al., "NECO: neural collapse based out-of-distribution detection", ICLR 2024.
    """
    dim = reference.means.shape[1]
    if ood.shape[1] != dim:
        raise InputError("ood", ood.shape, f"give (M, {dim}), a row per example")
    unit = 2.0**-reference.units.features
    center = reference.center
    basis = np.asarray(reference.frames.basis, np.float64)[reference.spectrum > 0]

    def scores(features: Any) -> np.ndarray:
        parts = []
        for first in range(0, len(features), _ROWS):
            rows = np.asarray(features[first : first + _ROWS], np.float64) * unit - center
            with np.errstate(invalid="ignore"):
                parts.append(np.linalg.norm(rows @ basis.T, axis=1) / np.linalg.norm(rows, axis=1))
        return np.nan_to_num(np.concatenate(parts)) if parts else np.zeros(0)

    own = np.concatenate(
        [scores(streaming.as_array("features", streaming.as_parts(batch)[0])) for batch in batches]
    )
    mean = np.asarray(ood, np.float64).mean(axis=0) * unit
    cosines = geometry.normalized(reference.means) @ geometry.normalized(mean[None])[0]
    return {
        "nc5": float(np.mean(np.abs(cosines))),
        "ood_auroc": geometry.auroc(own, scores(ood)),
    }
