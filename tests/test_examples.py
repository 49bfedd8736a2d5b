"""The examples run, and show what they say."""

import importlib.util

import pytest

from tests import chaos


@pytest.mark.slow
def test_the_minimal_sweep_shows_that_weight_decay_lowers_nc3():
    path = chaos.ROOT / "examples/minimal_sweep.py"
    spec = importlib.util.spec_from_file_location("minimal_sweep", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.EPOCHS = 15
    measured = example.sweep(example.WEIGHT_DECAYS, example.SEEDS)
    nc3 = measured["nc3"].mean(1)
    assert measured["nc1"].shape == (4, 3)
    assert (nc3[1:] < nc3[0]).all()
