"""Joins the histories of variants in one, with a dimension for each field that varies.

Coordinates that variants do not share (layers of another depth, lambdas in other units, epochs that
were measured before one of them was added) are united, and what a variant does not have is NaN. The
history keeps what was each variant's own, so that `split` gives back the histories that it joins.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ncjax.metrics.vocabulary import metrics_in
from ncjax.storage.history import COSINES
from ncjax.variation import Label

# Attributes of a history: the names of its dimensions of variants, and the variants' own.
_NAMES, _OWN = "varied", "variants"


def join(
    histories: Sequence[xr.Dataset], labels: Mapping[str, Sequence[Label]], config: str
) -> xr.Dataset:
    """Returns one history of several, which are in the order of the labels' product.

    Args:
      histories: of every variant.
      labels: the coordinates of every dimension that is added.
      config: the text of the config.json that is of all.
    """
    first = histories[0]
    names = list(map(str, first.indexes))
    indexes = {name: _united([one[name] for one in histories]) for name in names}
    whole = [_reindexed(one, indexes) for one in histories]
    shape = [len(values) for values in labels.values()]
    joined = xr.Dataset(
        coords={name: np.array(values) for name, values in labels.items()} | indexes,
        attrs=first.attrs | {"config": config, _NAMES: ",".join(labels)},
    )
    for name in (*metrics_in(first), COSINES):
        dims = [str(dim) for dim in first[name].dims]
        values = np.stack([one[name].transpose(*dims).values for one in whole])
        values = values.reshape(*shape, *values.shape[1:])
        joined[name] = ((*labels, *dims), values, first[name].attrs)
    for name in indexes:
        joined[name].attrs = first[name].attrs
    joined.attrs[_OWN] = json.dumps([_own(one, joined) for one in histories])
    return joined


def dimensions(history: xr.Dataset) -> list[str]:
    """Returns the names of the dimensions of variants of a history, or of a part of one."""
    names = history.attrs.get(_NAMES)
    return names.split(",") if names else []


def split(history: xr.Dataset) -> list[xr.Dataset]:
    """Returns the histories that were joined, with their labels as scalar coordinates.

    One that has no variants is returned as it is.
    """
    names = dimensions(history)
    if not names or _OWN not in history.attrs:
        return [history]
    shape = [history.sizes[name] for name in names]
    own = json.loads(history.attrs[_OWN])
    return [
        _part(history.isel(dict(zip(names, index, strict=True))), one)
        for index, one in zip(np.ndindex(*shape), own, strict=True)
    ]


def _part(united: xr.Dataset, own: Mapping[str, Any]) -> xr.Dataset:
    """Returns what is a variant's own of its place in a joined history, see `_own`."""
    for name, values in own["coords"].items():
        # Some epochs may have been left out since.
        united = united.sel({name: [v for v in values if v in united[name].values]})
    attrs = own["coord_attrs"].items()
    united = united.assign_coords({name: (name, united[name].values, of) for name, of in attrs})
    united.attrs = own["attrs"] | {_NAMES: united.attrs[_NAMES]}
    return united


def words(history: xr.Dataset) -> list[str]:
    """Returns the labels of a part of a history, as in ["optimizer=sgd"]."""
    return [
        f"{name}={history[name].item()}" for name in dimensions(history) if not history[name].ndim
    ]


def _own(one: xr.Dataset, joined: xr.Dataset) -> dict[str, Any]:
    """Returns a variant's attributes, and its coordinates where they are not the joined."""
    indexes = {name: one[name] for name in map(str, one.indexes)}
    different = {name: at for name, at in indexes.items() if not at.identical(joined[name])}
    return {
        "attrs": one.attrs,
        "coords": {
            name: values.values.tolist()
            for name, values in different.items()
            if not values.equals(joined[name])
        },
        "coord_attrs": {
            name: {key: _listed(value) for key, value in values.attrs.items()}
            for name, values in different.items()
        },
    }


def _listed(value: Any) -> Any:
    return np.asarray(value).tolist()


def _united(parts: Sequence[xr.DataArray]) -> np.ndarray:
    """Returns the values that any part has: the order is the longest's, and what that lacks stands
    before what follows it in its own part. Epochs ascend.
    """
    longest, *rest = sorted((part.values.tolist() for part in parts), key=len, reverse=True)
    united = list(longest)
    for values in rest:
        place = len(united)
        for value in reversed(values):
            if value in united:
                place = united.index(value)
            else:
                united.insert(place, value)
    if parts[0].name == "epoch":
        united.sort()
    return np.array(united)


def _reindexed(history: xr.Dataset, indexes: Mapping[str, np.ndarray]) -> xr.Dataset:
    missing = {
        name: values
        for name, values in indexes.items()
        if history[name].values.tolist() != values.tolist()
    }
    return history.reindex(missing) if missing else history
