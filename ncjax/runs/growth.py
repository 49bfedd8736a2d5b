"""Grows a sweep by values of its axes: trains the missing runs alone, and joins them to the rest.

A WORKDIR grows in `WORKDIR/growth`. Each block of missing runs, a grid of its own, is trained there
as any sweep is, and so resumes; then all are joined, and what was joined takes the place of the old
files. The last step is repeated by the next start if it was interrupted.
"""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import xarray as xr

from ncjax import config as configuration
from ncjax.config import Config
from ncjax.errors import InputError
from ncjax.plan import Plan
from ncjax.storage import checkpoint, history, joining, journal, lock
from ncjax.storage.files import write_atomically

# Written when all of the joined files are; config.json is the last to take its place.
_WHOLE = ".whole"
_FILES = ("checkpoints", "history.nc", "history.nc.sha256", "metrics.jsonl", "config.json")


def grow(plan: Plan, train: Callable[[Plan], xr.Dataset], say: Callable[[str], None]) -> None:
    """Trains the runs that a plan's WORKDIR lacks and adds them to it.

    Args:
      plan: the plan of all runs, whose `grown_from` is the config of those that there are.
      train: trains a plan.
      say: prints a line.

    Raises:
      InputError: several processes run together.
    """
    if jax.process_count() > 1:
        way_out = "a sweep grows in one process; start it alone, and continue together"
        raise InputError("--processes", jax.process_count(), way_out)
    assert plan.grown_from is not None
    folder = plan.workdir / "growth"
    joined = folder / "joined"
    if not (joined / _WHOLE).exists():
        blocks = configuration.missing_blocks(plan.config, plan.grown_from)
        parts = [_part_of(plan, plan.grown_from, plan.workdir)]
        for config in blocks:
            name = f"{zlib.crc32(configuration.to_json(config).encode()):08x}"
            parts.append(_part_of(plan, config, folder / name))
        missing = sum(part.grid.size for part in parts[1:])
        say(f"{plan.workdir} grows: {missing} of {plan.grid.size} runs are missing")
        trained = []
        for part in parts:
            part.workdir.mkdir(parents=True, exist_ok=True)
            trained.append(joining.Part(part.workdir, part.grid, train(part)))
        shutil.rmtree(joined, ignore_errors=True)
        join(trained, plan.config, plan.grid, joined)
        write_atomically(joined / _WHOLE, b"")
    with lock.owned(plan.workdir):
        _replace(plan.workdir, joined)
    shutil.rmtree(folder)


def join(
    parts: list[joining.Part], config: Config, grid: configuration.Grid, workdir: Path
) -> None:
    """Writes the runs of several WORKDIRs into a new one, as if one command had trained them."""
    sources = joining.find_sources(parts, grid)
    recorded = joining.join_histories(parts, grid, sources)
    recorded = recorded.assign_attrs(config=configuration.to_json(config))
    workdir.mkdir(parents=True, exist_ok=True)
    epochs = {e for part in parts for e in checkpoint.epochs_in(part.workdir / "checkpoints")}
    saved = checkpoint.Checkpoints(workdir / "checkpoints", keep=max(1, len(epochs)))
    joining.join_checkpoints(parts, grid, sources, configuration.to_mapping(config), saved)
    saved.close()
    history.save(recorded, workdir / "history.nc")
    journal.mend(workdir / "metrics.jsonl", recorded)
    write_atomically(workdir / "config.json", configuration.to_json(config).encode())


def _part_of(plan: Plan, config: Config, workdir: Path) -> Plan:
    """Returns the plan of a part of the runs, on the same data."""
    grid = configuration.make_grid(config, plan.dataset.num_classes)
    return plan._replace(config=config, grid=grid, workdir=workdir, grown_from=None)


def _replace(workdir: Path, joined: Path) -> None:
    """Moves joined files to where the old ones are; may be repeated after any interruption."""
    for name in _FILES:
        new, old = joined / name, workdir / name
        if not new.exists():
            continue
        if new.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        os.replace(new, old)
