"""Continues a WORKDIR: finds the newest checkpoint that can be trusted, and cuts its history there.

All metadata of a checkpoint are compared with the plan before a file is changed.
"""

import sys
from pathlib import Path

import jax
import xarray as xr

from ncjax import config as configuration
from ncjax.data import preparation
from ncjax.errors import InputError, listed, printable
from ncjax.plan import Plan
from ncjax.runs import load, processes, provenance
from ncjax.storage import checkpoint, history, journal
from ncjax.training import own
from ncjax.training.sweep import Sweep


def resume(
    sweep: Sweep, saved: checkpoint.Checkpoints, mine: checkpoint.CheckpointMetadata
) -> xr.Dataset | None:
    """Restores the newest sound checkpoint, and returns the history up to it, or None.

    A checkpoint is sound if its bits are those that were saved, and if the history has all epochs
    that were measured before it. One that is not is named and removed, and its epochs are computed
    again.
    """
    workdir, epochs = sweep.plan.workdir, saved.epochs()
    recorded = _load_history(workdir / "history.nc")
    metadata = _restore_newest(sweep, saved, mine, recorded)
    # The processes must agree before anything is removed or written.
    processes.check_read(workdir, metadata and metadata.epoch)
    if metadata is None:
        if epochs:
            way_out = (
                "no checkpoint in it can be trusted; remove its checkpoints and history.nc to "
                "train anew"
            )
            raise InputError("--workdir", str(workdir), way_out)
        if processes.is_leader():
            journal.mend(workdir / "metrics.jsonl", None)
        return None
    if recorded is not None:
        _check_grid(recorded, sweep.plan.grid, workdir / "history.nc")
        recorded = history.up_to(recorded, metadata.epoch) if metadata.measured else None
    for later in (e for e in epochs if e > metadata.epoch):
        saved.delete(later)
    text = configuration.to_json(sweep.plan.config)
    # A run may be continued with more epochs, or on another mesh.
    grown = recorded is not None and recorded.attrs.get("config") != text
    if recorded is not None and grown:
        recorded = recorded.assign_attrs(config=text)
    if processes.is_leader():
        if recorded is not None and grown:
            history.save(recorded, workdir / "history.nc")
        journal.mend(workdir / "metrics.jsonl", recorded)
    return recorded


def _load_history(path: Path) -> xr.Dataset | None:
    """Returns the history to be continued, or None if there is none."""
    if not path.exists():
        return None
    recorded = history.load(path)
    if missing := history.missing(recorded):
        way_out = (
            f"it lacks {missing}: it is damaged, or of another version of ncjax; continue with "
            "that one"
        )
        raise InputError("history", str(path), f"{way_out}, or choose another WORKDIR")
    return recorded


def _check_grid(recorded: xr.Dataset, grid: configuration.Grid, path: Path) -> None:
    """Raises InputError if a history is not of the grid of its checkpoints."""
    for name, values in grid.dim_values.items():
        found = recorded[name].values.tolist() if name in recorded.indexes else []
        if found != values:
            way_out = (
                f"its {name} is {listed(found)} and not {listed(values)}: it is damaged; remove it"
            )
            raise InputError("history", str(path), f"{way_out}, and the same command trains anew")


def _restore_newest(
    sweep: Sweep,
    saved: checkpoint.Checkpoints,
    mine: checkpoint.CheckpointMetadata,
    recorded: xr.Dataset | None,
) -> checkpoint.CheckpointMetadata | None:
    """Restores the newest sound checkpoint, and returns its metadata, or None if there is none."""
    workdir = sweep.plan.workdir
    known = set() if recorded is None else set(recorded["epoch"].values.tolist())
    for epoch in reversed(saved.epochs()):
        try:
            # Metadata are checked first: a checkpoint of another config cannot be loaded into this
            # program, but is not damaged.
            _check_metadata(
                sweep.plan, mine, checkpoint.read_metadata(workdir / "checkpoints", epoch)
            )
            with jax.enable_x64(True):
                states, metadata = saved.load(epoch, sweep.shapes)
            lost = sorted(set(metadata.measured) - known)
            if lost:
                raise checkpoint.Damaged(f"history.nc lacks epoch {lost[0]}, measured before it")
        except checkpoint.Damaged as damage:
            _warn(f"checkpoint {epoch} in {workdir} is not used: {damage}")
            continue
        sweep.restore(states, epoch)
        changed = provenance.differences(mine.arithmetic, metadata.arithmetic)
        if changed and epoch < sweep.plan.config.train.epochs:
            _warn(f"{workdir} continues to rounding, not to the same bits: {'; '.join(changed)}")
        return metadata
    return None


def _check_metadata(
    plan: Plan, mine: checkpoint.CheckpointMetadata, theirs: checkpoint.CheckpointMetadata
) -> None:
    """Raises InputError if a checkpoint is of another run: another config, random bits or data.

    It compares the config in the checkpoint itself, because config.json may be lost or changed.
    """
    if differences := configuration.differences(plan.config, theirs.config):
        way_out = (
            f"its checkpoints are of another config: {'; '.join(differences)}; choose another "
            "WORKDIR"
        )
        raise InputError("--workdir", str(plan.workdir), way_out)
    if differences := provenance.differences(mine.random_bits, theirs.random_bits):
        way_out = (
            f"its checkpoints are of other random bits: {'; '.join(differences)}; set them back "
            "(as environment variables, in capitals), or choose another WORKDIR"
        )
        raise InputError("--workdir", str(plan.workdir), way_out)
    load.check_data(plan.config.data.name, mine.data, theirs.data)


def make_metadata(sweep: Sweep) -> checkpoint.CheckpointMetadata:
    """Returns the metadata of a sweep's checkpoints, but for what is different in each of them."""
    return checkpoint.CheckpointMetadata(
        epoch=0,
        config=configuration.to_mapping(sweep.plan.config),
        axes={name: list(values) for name, values in sweep.plan.grid.axes.items()},
        measured=[],
        versions=provenance.versions(),
        crc32={},
        data=preparation.checksums(sweep.plan.dataset),
        random_bits=provenance.random_bits(),
        arithmetic=provenance.arithmetic(sweep.mesh, sweep.program.runs)
        | own.source(sweep.plan.config.model.network),
    )


def _warn(line: str) -> None:
    if processes.is_leader():
        print(f"warning: {printable(line)}", file=sys.stderr, flush=True)
