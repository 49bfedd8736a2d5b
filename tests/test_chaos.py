"""A few kills and corruptions; `python -m tests.chaos` makes many."""

import random

import chaos
import pytest


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_bits(tmp_path):
    found = chaos.kills(3, random.Random(1), tmp_path)
    assert (found.count, found.continued) == (3, 3)


@pytest.mark.slow
def test_corruptions_are_reported_or_harmless(tmp_path):
    done, failures = chaos.corruptions(20, random.Random(1), tmp_path)
    assert not failures
    assert len(done) == 20
    assert any(one.reports for one in done)
