"""Joins runs of one experiment that lie in several WORKDIRs: their histories and checkpoints.

Parts are grids whose runs together are those of a larger grid, each once; they need not be a
product, as the missing runs of a grid that has grown along two axes are not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from ncjax.config import AXES, Grid
from ncjax.errors import InputError, listed
from ncjax.metrics.vocabulary import metrics_in
from ncjax.storage import checkpoint
from ncjax.storage.history import COSINES

# An axis that a grid lacks is a factor on weight decay, which is 1 then.
_ABSENT = 1.0


class Part(NamedTuple):
    """Holds what is joined of a WORKDIR.

    Attributes:
      workdir: the folder.
      grid: the grid of its runs.
      history: its measurements.
    """

    workdir: Path
    grid: Grid
    history: xr.Dataset


def find_sources(parts: Sequence[Part], grid: Grid) -> list[tuple[int, int]]:
    """Returns for every run of a grid the index of its part, and its index there.

    Raises:
      InputError: no part has a run, or two have it.
    """
    found: dict[tuple, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        for place in part.grid.places():
            key = _key(place.coordinates)
            if key in found:
                there = parts[found[key][0]].workdir
                way_out = f"{there} has it, too; every run must be in one of them"
                raise InputError(str(part.workdir), _named(place.coordinates), way_out)
            found[key] = number, place.index
    for place in grid.places():
        if _key(place.coordinates) not in found:
            way_out = "no WORKDIR has this run; all runs of the joined grid must be there"
            raise InputError("run", _named(place.coordinates), way_out)
    return [found[_key(place.coordinates)] for place in grid.places()]


def join_histories(
    parts: Sequence[Part], grid: Grid, sources: Sequence[tuple[int, int]]
) -> xr.Dataset:
    """Returns the history of a grid, run by run from its parts; attributes are the first part's.

    Raises:
      InputError: the parts were measured at other epochs.
    """
    first = parts[0]
    for part in parts[1:]:
        mine, theirs = (p.history["epoch"].values.tolist() for p in (part, first))
        if mine != theirs:
            way_out = f"{first.workdir} was measured at {listed(theirs)}; train both alike"
            raise InputError(str(part.workdir), f"measured at {listed(mine)}", way_out)
    coords = {
        name: variable
        for name, variable in first.history.coords.items()
        if name not in AXES and name in first.history.indexes
    }
    joined = xr.Dataset(coords=coords | grid.dim_values, attrs=first.history.attrs)
    for name in (*metrics_in(first.history), COSINES):
        by_run = [_by_run(part, name) for part in parts]
        values = np.stack([by_run[number][index] for number, index in sources])
        variable = first.history[name]
        rest = [dim for dim in variable.dims if dim not in AXES]
        joined[name] = ((*grid.dims, *rest), grid.unflatten(values), variable.attrs)
    for name in grid.dims:
        if name in first.history.coords:
            joined[name].attrs = first.history[name].attrs
    return joined


def join_checkpoints(
    parts: Sequence[Part],
    grid: Grid,
    sources: Sequence[tuple[int, int]],
    config: Mapping[str, Any],
    saved: checkpoint.Checkpoints,
) -> None:
    """Saves every checkpoint that all parts have, run by run from them.

    Raises:
      Damaged: one of them is not what was saved, or has other leaves.
    """
    folders = [part.workdir / "checkpoints" for part in parts]
    common = set.intersection(*(set(checkpoint.epochs_in(folder)) for folder in folders))
    for epoch in sorted(common):
        metadata = [checkpoint.read_metadata(folder, epoch) for folder in folders]
        states: dict = {}
        for name in metadata[0].crc32:
            leaves = [
                checkpoint.read_leaf(folder, one, name)
                for folder, one in zip(folders, metadata, strict=True)
            ]
            *path, last = name.split(".")
            nested = states
            for key in path:
                nested = nested.setdefault(key, {})
            nested[last] = np.stack([leaves[number][index] for number, index in sources])
        axes = {name: list(values) for name, values in grid.axes.items()}
        saved.save(states, metadata[0]._replace(config=dict(config), axes=axes))


def _key(coordinates: Mapping[str, Any]) -> tuple:
    return tuple(coordinates.get(name, _ABSENT) for name in AXES)


def _named(coordinates: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in coordinates.items())


def _by_run(part: Part, name: str) -> np.ndarray:
    """Returns a variable of a part's history as (R, ...), in the order of its runs."""
    values = part.history[name].transpose(*part.grid.dims, ...).values
    return values.reshape(part.grid.size, *values.shape[len(part.grid.dims) :])
