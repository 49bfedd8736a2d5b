"""Defines the history of a model that is not ours: its measurements by epoch and layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from ncjax.metrics.vocabulary import FEATURE_VOCABULARY

_KIND = "ncjax.Monitor"
_SECONDS = {
    "definition": "wall time of the measurement",
    "long_name": "measured in",
    "units": "s",
}


def one_epoch(
    epoch: int, layers: Mapping[str, Mapping[str, float]], seconds: float, remarks: str
) -> xr.Dataset:
    """Labels the measurements of one epoch: every metric by (epoch, layer), NaN where a layer
    lacks it.

    Args:
      layers: name of a layer -> name of a metric -> number.
      seconds: what measuring them took.
      remarks: lines that a reader should know of.
    """
    names = {name for metrics in layers.values() for name in metrics}
    variables: dict[str, Any] = {
        name: (
            ("epoch", "layer"),
            [[metrics.get(name, np.nan) for metrics in layers.values()]],
            FEATURE_VOCABULARY[name].attributes,
        )
        for name in FEATURE_VOCABULARY
        if name in names
    }
    variables["seconds"] = (("epoch",), [seconds], _SECONDS)
    attributes = {"kind": _KIND, "remarks": remarks}
    return xr.Dataset(variables, {"epoch": [epoch], "layer": list(layers)}, attributes)


def is_monitored(history: xr.Dataset) -> bool:
    """Returns whether a dataset is such a history."""
    return history.attrs.get("kind") == _KIND and {"epoch", "layer"} <= set(history.indexes)


def append(history: xr.Dataset | None, newest: xr.Dataset) -> xr.Dataset:
    """Returns a history with one more epoch; those from it on are replaced."""
    if history is None:
        return newest
    before = history.isel(epoch=np.flatnonzero(history["epoch"] < newest["epoch"].item()))
    if not before.sizes["epoch"]:
        return newest
    joined = xr.concat([before, newest], "epoch", join="exact", combine_attrs="override")
    return joined.assign_attrs(newest.attrs)
