"""What is shown of a grid that is too large to be read."""

import math

import numpy as np
import pytest

from ncjax.report import thinning


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (2000, 24), (25, 24), (7, 2)])
def test_chosen_indices_are_even_and_hold_both_ends(count, most):
    chosen = thinning.evenly(count, most)
    assert len(chosen) == min(count, most)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    steps = np.diff(chosen)
    assert steps.size == 0 or 1 <= steps.min() <= steps.max() <= steps.min() + 1


@pytest.mark.parametrize("sizes", [(20, 5), (2000,), (200, 200), (3, 2), (9, 8, 7), (1, 2000)])
def test_what_is_left_of_a_grid_is_a_grid_that_fits(sizes):
    named = {str(axis): size for axis, size in enumerate(sizes)}
    chosen = thinning.of_grid(named, 60)
    left = [len(indices) for indices in chosen.values()]
    assert min(60 // 2, math.prod(sizes)) <= math.prod(left) <= 60
    # No axis is thinned below a shorter one.
    for size, kept in zip(sizes, left, strict=True):
        assert kept == size or kept >= max(left) - 1


def test_long_lists_say_how_many_they_are_of():
    words = [str(i) for i in range(2000)]
    assert thinning.abridged(words[:16]) == ", ".join(words[:16])
    assert thinning.abridged(words, 4) == "0, 1, ..., 1999 (2,000 in all)"
    assert thinning.remark(24, 2000, "runs") == "24 of 2,000 runs, evenly chosen"
    assert thinning.remark(24, 24, "runs") == ""
