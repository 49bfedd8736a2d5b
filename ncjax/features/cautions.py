"""Finds metrics that would mislead: noise, and zeros that have another reason than collapse."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ncjax.features.reference import Reference
    from ncjax.features.statistics import Deviations

# The rounding error of a class mean relative to the spread of the class, by the precision of the
# pass.
_ROUNDING = {"float32": 2.0**-17, "float64": 2.0**-46}
_MOST_NAMED = 3  # classes named in cautions of one kind


def of(reference: "Reference", deviations: "Deviations", metrics: dict[str, float]) -> list[str]:
    """Returns a sentence for each way in which the metrics would mislead a reader."""
    scatter = () if np.isnan(metrics["nc1"]) else _of_scatter(reference, deviations)
    found = [*scatter, *_of_means(reference, deviations), *_of_head(reference)]
    if reference.asked.weight_decay == 0:
        found.append("weight_decay is 0, at which there is no equilibrium to compare with")
    return found


def _of_scatter(reference: "Reference", deviations: "Deviations") -> Iterator[str]:
    counts, within = reference.counts, np.asarray(deviations.within)
    single, names = int(np.sum(counts == 1)), "nc1, nc1_trace_ratio and cdnv"
    # The relative spacing of numbers in the precision of the pass.
    spacing = np.finfo(reference.frames.high.dtype).eps
    if single == len(counts):
        yield f"every class has a single example, so {names} are 0 whatever the features"
    elif not within.any():
        yield f"all examples of a class are equal to the last bit, so {names} are 0"
    elif np.sum(within) < spacing**2 * np.sum(counts * np.sum(reference.means**2, axis=1)):
        yield (
            f"the scatter within classes is no larger than the rounding of the features: {names} "
            "are noise"
        )
    if 0 < single < len(counts):
        yield (
            f"{single:,} of {len(counts):,} classes have a single example and no scatter: {names} "
            "are too low"
        )


def _of_means(reference: "Reference", deviations: "Deviations") -> Iterator[str]:
    centred, present = reference.centred, reference.present
    spread = np.sqrt(np.asarray(deviations.within) / reference.counts)
    rounding = _ROUNDING[str(reference.frames.high.dtype)] * spread
    rounding += 4 * np.finfo(np.float64).eps * np.linalg.norm(reference.means, axis=1)
    central = np.linalg.norm(centred, axis=1) <= rounding + rounding.mean()
    if central.all():
        yield (
            "all class means are the same but for rounding: what is relative to their distances "
            "is noise or undefined"
        )
        return
    for label in present[central][:_MOST_NAMED]:
        yield (
            f"the mean of class {label} is the global mean but for rounding: its angles are noise "
            "or undefined"
        )
    # Equal means are neighbours when sorted along any direction.
    order = np.argsort(centred @ np.random.default_rng(0).standard_normal(centred.shape[1]))
    gaps = np.linalg.norm(np.diff(centred[order], axis=0), axis=1)
    same = np.flatnonzero(gaps <= rounding[order][1:] + rounding[order][:-1])
    for place in same[:_MOST_NAMED]:
        pair = " and ".join(str(label) for label in sorted(present[order[place : place + 2]]))
        yield (
            f"the means of classes {pair} are the same but for rounding: cdnv is noise or infinite"
        )


def _of_head(reference: "Reference") -> Iterator[str]:
    head = reference.head
    if head is None:
        return
    if not head.any():
        yield "the head is 0, so what is relative to its size is undefined"
        return
    for label in reference.present[~head.any(axis=1)][:_MOST_NAMED]:
        yield f"the head's row of class {label} is 0: its angles are undefined"
    if np.all(head == head[0]):
        yield "all rows of the head are the same: nc3_centered is undefined"
