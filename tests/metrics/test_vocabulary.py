"""The vocabulary's ranges, against every number of the committed histories, and its scales."""

import numpy as np
import pytest

from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.storage import history
from tests.helpers import ROOT

HISTORIES = sorted((ROOT / "experiments").rglob("*.nc"))
# A share of 1 may exceed it by a unit in the last place of float32.
ROUNDING = 2.0**-22


@pytest.fixture(scope="module")
def recorded():
    assert len(HISTORIES) > 20
    return {path.stem: history.load(path) for path in HISTORIES}


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_metric_lies_in_its_range(name, recorded):
    metric = VOCABULARY[name]
    found = 0
    for stem, one in recorded.items():
        values = one[name].values if name in one else np.array([])
        values = values[np.isfinite(values)]
        assert (values >= metric.least - ROUNDING).all(), stem
        assert (values <= metric.most + ROUNDING).all(), stem
        found += values.size
    # One that is younger than the histories has a function, and oracles of its own.
    assert found or metric.function
    assert metric.best is None or metric.least <= metric.best <= metric.most
