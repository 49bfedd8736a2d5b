"""Chooses what of a large grid is shown: more rows, curves and figures than these nobody reads."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

MOST_ROWS = 60  # of a printed table
MOST_CURVES = 24  # weight decays of a figure with a curve for each
MOST_SETTINGS = 8  # sets of figures; of other axes than weight decay and seed
MOST_COMPARED = 40  # curves with a name


def evenly(count: int, most: int) -> np.ndarray:
    """Returns the indices of at most so many of `count` things, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def of_grid(sizes: Mapping[str, int], most: int) -> dict[str, np.ndarray]:
    """Returns indices along every axis of a grid, which leave at most `most` of its places.

    The longest axes are thinned, so that what is left is a grid, too.
    """
    left = dict(sizes)
    while math.prod(left.values()) > most:
        left[max(left, key=left.__getitem__)] -= 1
    return {name: evenly(size, left[name]) for name, size in sizes.items()}


def remark(shown: int, count: int, what: str) -> str:
    """Returns `24 of 2,000 weight decays, evenly chosen`, or nothing where all are shown."""
    return "" if shown == count else f"{shown:,} of {count:,} {what}, evenly chosen"


def abridged(words: Sequence[str], most: int = 16) -> str:
    """Joins words by commas; of more than `most` the first and the last, and how many there are."""
    if len(words) <= most:
        return ", ".join(words)
    return f"{', '.join(words[: most // 2])}, ..., {words[-1]} ({len(words):,} in all)"
