"""Merges WORKDIRs of one config, but for values of the axes of its grid, into a new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ncjax import config as configuration
from ncjax.config import Config, Grid
from ncjax.errors import InputError
from ncjax.runs import load, variants
from ncjax.runs.growth import join
from ncjax.storage import checkpoint, history, joining
from ncjax.storage.checkpoint import CheckpointMetadata, Damaged


def merge(workdirs: Sequence[Path], out: Path) -> Grid:
    """Joins the runs of several WORKDIRs in `out`, and returns their grid.

    Values of an axis are in ascending order.

    Raises:
      InputError: a WORKDIR has no whole history and checkpoint; two are of different configs, data
        or epochs; a run is missing, or is in two of them.
    """
    metadata = [_newest(workdir) for workdir in workdirs]
    first = metadata[0]
    for workdir, one in zip(workdirs[1:], metadata[1:], strict=True):
        if different := configuration.differences_beside_axes(one.config, first.config):
            way_out = f"of another config than {workdirs[0]}; they differ in values of axes alone"
            raise InputError(str(workdir), "; ".join(different), way_out)
        load.check_data(one.config["data"]["name"], one.data, first.data)
        if one.epoch != first.epoch:
            way_out = f"{workdirs[0]} has epoch {first.epoch}; train both as far"
            raise InputError(str(workdir), f"epoch {one.epoch}", way_out)
    parts = [
        joining.Part(workdir, Grid(one.axes), history.load(workdir / "history.nc"))
        for workdir, one in zip(workdirs, metadata, strict=True)
    ]
    config = _joined_config([one.config for one in metadata])
    grid = configuration.make_grid(config, parts[0].history.sizes["label"])
    join(parts, config, grid, out)
    return grid


def _newest(workdir: Path) -> CheckpointMetadata:
    """Returns the metadata of a WORKDIR's newest checkpoint."""
    if held := variants.find(workdir):
        way_out = f"it holds variants; name their folders, as in {held.folders[0][1]}"
        raise InputError("WORKDIR", str(workdir), way_out)
    epochs = checkpoint.epochs_in(workdir / "checkpoints")
    if not epochs:
        raise InputError("WORKDIR", str(workdir), "it has no checkpoint, which is what is merged")
    try:
        return checkpoint.read_metadata(workdir / "checkpoints", epochs[-1])
    except Damaged as damage:
        way_out = f"{damage}; `ncjax train` with its config mends it"
        raise InputError("checkpoint", str(workdir), way_out) from damage


def _joined_config(stored: Sequence[dict[str, Any]]) -> Config:
    """Returns a config with the values that any of some stored ones has on each axis."""
    joined = configuration.from_stored(stored[0])
    fields = [configuration.flatten(one) for one in stored]
    for name in configuration.axis_fields():
        values = {value for one in fields for value in one.get(name, (1.0,))}
        joined.update({name: tuple(sorted(values))})
    return joined
