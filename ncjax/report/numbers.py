"""Packs the numbers of histories for the HTML report, bit for bit, and reads them back."""

import base64
import gzip
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from ncjax.errors import printable
from ncjax.metrics.vocabulary import FEATURE_VOCABULARY, LAYER_VOCABULARY
from ncjax.storage import monitored

# Base64 characters of all numbers of a page; with its scripts it stays below 6 MB.
MOST_CHARACTERS = 4_500_000

# Numbers that gzip shrinks by more than this are rare; larger ones are not tried.
_MOST_SHRUNK = 4

# In the order in which variables are left out, last first, where there are too many numbers.
_INNER = ("split", "layer", "mode", "label", "other_label")

_KNOWN = FEATURE_VOCABULARY | LAYER_VOCABULARY


class Packed(NamedTuple):
    """Holds the numbers of several histories.

    Attributes:
      sources: what a script must know of each history to find a number: its axes, epochs,
        coordinates and variables.
      numbers: of each history, variable -> little-endian floats in row-major order, gzipped, as
        base64.
    """

    sources: list[dict[str, Any]]
    numbers: list[dict[str, str]]


def grid_of(history: xr.Dataset) -> list[str]:
    """Returns the dimensions that tell runs apart, weight decay first and the seed last; of a
    monitored model, its layers.
    """
    if monitored.is_monitored(history):
        return ["layer"]
    dims = [str(dim) for dim in history["nc1"].dims if dim not in ("epoch", *_INNER)]
    return sorted(dims, key=lambda dim: (dim != "weight_decay", dim == "seed"))


def pack(histories: dict[str, xr.Dataset], first: Sequence[str] = ()) -> Packed:
    """Packs named histories; variables that make the page too large are left out, and named.

    Each history has an equal share of `MOST_CHARACTERS`.

    Args:
      first: the variables that are left out last.
    """
    sources, numbers = [], []
    for name, history in histories.items():
        packed, omitted = _pack_variables(history, MOST_CHARACTERS // len(histories), first)
        numbers.append(packed)
        sources.append(_describe(name, history, packed, omitted))
    return Packed(sources, numbers)


def unpack(packed: Packed, index: int, name: str) -> xr.DataArray:
    """Returns a variable as a page holds it."""
    source = packed.sources[index]
    variable = source["variables"][name]
    content = gzip.decompress(base64.b64decode(packed.numbers[index][name]))
    sizes = {axis["name"]: len(axis["labels"]) for axis in source["axes"]}
    sizes |= {"epoch": len(source["epochs"])}
    sizes |= {dim: len(values) for dim, values in source["coordinates"].items()}
    values = np.frombuffer(content, variable["dtype"])
    return xr.DataArray(
        values.reshape([sizes[dim] for dim in variable["dims"]]), dims=variable["dims"]
    )


def label(value: Any) -> str:
    """Returns a value of an axis as text: numbers in short, names printable."""
    value = value.item() if isinstance(value, np.generic) else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.10g}" if is_number else printable(str(value))


def _describe(
    name: str, history: xr.Dataset, packed: dict[str, str], omitted: list[str]
) -> dict[str, Any]:
    grid = grid_of(history)
    return {
        "name": printable(name),
        "axes": [
            {"name": axis, "labels": [label(value) for value in history[axis].values]}
            for axis in grid
        ],
        "epochs": history["epoch"].values.tolist(),
        "coordinates": {
            dim: [label(value) for value in history[dim].values]
            for dim in _INNER
            if dim in history.dims and dim not in grid
        },
        "variables": {
            variable: {
                "dims": _ordered_dims(history[variable], grid),
                "dtype": _little_endian(history[variable].dtype).str,
            }
            for variable in packed
        },
        "omitted": omitted,
    }


def _pack_variables(
    history: xr.Dataset, most: int, first: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Returns what was packed, and the names of what was left out for its size."""
    grid = grid_of(history)
    packed: dict[str, str] = {}
    omitted, left = [], most
    for name in _by_importance(history, grid, first):
        values = history[name].transpose(*_ordered_dims(history[name], grid)).values
        content = ""
        if values.nbytes < _MOST_SHRUNK * left:
            content = _packed(values)
        if content and len(content) <= left:
            packed[name] = content
            left -= len(content)
        else:
            omitted.append(name)
    return packed, omitted


def _packed(values: np.ndarray) -> str:
    little = values.astype(_little_endian(values.dtype), copy=False)
    return base64.b64encode(gzip.compress(little.tobytes(), 6, mtime=0)).decode()


def _little_endian(dtype: np.dtype) -> np.dtype:
    """Returns the type in which numbers are packed: float32 as it is, all else as float64."""
    return np.dtype("<f4") if dtype.newbyteorder("=") == np.float32 else np.dtype("<f8")


def _by_importance(history: xr.Dataset, grid: Iterable[str], first: Sequence[str]) -> Iterator[str]:
    """Yields the variables that have a finite number: `first`, then those of fewest dimensions."""

    order = list(_KNOWN)

    def rank(name: str) -> tuple[int, int]:
        if name in first:
            return -1, first.index(name)
        inner = [dim for dim in history[name].dims if dim in _INNER and dim not in grid]
        place = order.index(name) if name in _KNOWN else len(order)
        return max((1 + _INNER.index(str(dim)) for dim in inner), default=0), place

    known = {*grid, "epoch", *_INNER}
    names = [
        str(name)
        for name, variable in history.data_vars.items()
        if set(map(str, variable.dims)) <= known and np.issubdtype(variable.dtype, np.number)
    ]
    return (name for name in sorted(names, key=rank) if np.isfinite(history[name].values).any())


def _ordered_dims(variable: xr.DataArray, grid: Iterable[str]) -> list[str]:
    return [dim for dim in dict.fromkeys((*grid, "epoch", *_INNER)) if dim in variable.dims]


def describe_metrics(histories: Iterable[xr.Dataset]) -> dict[str, dict[str, Any]]:
    """Returns title, definition, range and best value of every variable of some histories.

    They are those of the vocabulary, or of the history for what is not in it.
    """
    found: dict[str, dict[str, Any]] = {}
    for history in histories:
        for name, variable in history.data_vars.items():
            metric = _KNOWN.get(str(name))
            attributes = metric.attributes if metric else variable.attrs
            found[str(name)] = {
                "title": printable(str(attributes.get("long_name", name))),
                "definition": printable(str(attributes.get("definition", ""))),
                "least": _finite(metric.least) if metric else None,
                "most": _finite(metric.most) if metric else None,
                "best": metric.best if metric else None,
            }
    return found


def _finite(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
