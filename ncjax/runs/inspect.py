"""Reads and checks a WORKDIR, measures its checkpoints again, and exports runs; changes nothing."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from ncjax import config as configuration
from ncjax import plan
from ncjax.errors import InputError
from ncjax.metrics import theory
from ncjax.runs.load import (
    Run,
    changes,
    check_present,
    load_data,
    parse_config,
    read_config,
    slice_of,
)
from ncjax.storage import checkpoint
from ncjax.storage import history as histories
from ncjax.storage.checkpoint import CheckpointMetadata, Damaged
from ncjax.storage.files import write_atomically
from ncjax.training import evaluate, every_layer, layers, own, parallel, program, sweep

# The largest relative deviation from the recorded value that passes: another program rounds
# differently.
TOLERANCE = {"float32": 1e-3, "float64": 1e-9}
# It is added to the magnitude that a deviation is relative to, because numbers near 0 have fewer
# digits in common.
FLOOR = 1e-2


class Parameter(NamedTuple):
    """Describes a leaf of the parameters of one run."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


class Saved(NamedTuple):
    """Describes a checkpoint on disk.

    Attributes:
      epoch: the epoch of the checkpoint.
      bytes: the size of its files.
      problem: what is wrong with it; None if it is undamaged.
      parameters: the parameters that can be read.
    """

    epoch: int
    bytes: int
    problem: str | None
    parameters: list[Parameter]


class WorkdirContents(NamedTuple):
    """Holds what was found in a WORKDIR.

    Attributes:
      workdir: the folder.
      config: config.json, or the config of the newest checkpoint or of the history.
      axes: the values of every axis of the grid, in the order of its runs.
      place: the one run asked for; None: all runs.
      history: the measurements, of the one run if one was asked for; None: there are none, or they
        cannot be trusted.
      history_problem: why they cannot be trusted; None: they can, or there are none.
      history_is_sealed: whether there is a checksum of history.nc.
      checkpoints: all checkpoints, checked, oldest first; only one run's part if one was asked for.
      provenance: `versions`, `device`, `git_revision` and `data_checksums`, as far as they are
        known.
      notes: a line for each thing that is not as it should be.
    """

    workdir: Path
    config: dict[str, Any]
    axes: dict[str, list]
    place: configuration.Place | None
    history: xr.Dataset | None
    history_problem: str | None
    history_is_sealed: bool
    checkpoints: list[Saved]
    provenance: dict[str, Any]
    notes: list[str]

    @property
    def folder(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def measured(self) -> list[int]:
        return [] if self.history is None else self.history["epoch"].values.tolist()

    @property
    def places(self) -> list[configuration.Place]:
        """The run asked for, or all runs of the grid."""
        return [self.place] if self.place else configuration.Grid(self.axes).places()


class Verification(NamedTuple):
    """Describes how a checkpoint that was measured again deviates from the history.

    Attributes:
      epoch: the epoch of the checkpoint.
      runs, variables: the number of runs and of variables that were compared.
      deviation: the largest relative deviation from the history.
      variable, coordinates: the variable and the run in which it occurs.
      tolerance: the largest deviation that passes.
    """

    epoch: int
    runs: int
    variables: int
    deviation: float
    variable: str
    coordinates: dict[str, float | int]
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.deviation <= self.tolerance


def read(workdir: Path, coordinates: Mapping[str, float | str]) -> WorkdirContents:
    """Reads what a WORKDIR holds, without computing metrics.

    Every checkpoint is read once, or only one run's part of it if `coordinates` names a run.

    Raises:
      InputError: the WORKDIR has nothing that ncjax wrote, or there is no such run.
    """
    if not workdir.is_dir():
        raise InputError(
            "WORKDIR", str(workdir), "no such folder; name one that `ncjax train` has left"
        )
    plan.check_path("WORKDIR", workdir)
    folder, notes = workdir / "checkpoints", []
    history, history_problem = _read_history(workdir / "history.nc")
    metadata = _newest_metadata(folder)
    config = _config(workdir, metadata, history, notes)
    axes = _axes(config, metadata, history)
    single = all(len(values) == 1 for values in axes.values())
    place = configuration.Grid(axes).find(coordinates) if coordinates or single else None
    if history is not None and place is not None:
        history = slice_of(history, place.coordinates, keep_axes=True)
    checkpoints = [_check(folder, epoch, place) for epoch in checkpoint.epochs_in(folder)]
    return WorkdirContents(
        *(workdir, config, axes, place, history, history_problem),
        history_is_sealed=(workdir / "history.nc.sha256").exists(),
        # A run in training removes its oldest checkpoints, perhaps while they are read here.
        checkpoints=[saved for saved in checkpoints if saved.epoch in checkpoint.epochs_in(folder)],
        provenance=_provenance(metadata, history),
        notes=notes,
    )


def _read_history(path: Path) -> tuple[xr.Dataset | None, str | None]:
    if not path.exists():
        return None, None
    try:
        history = histories.load(path)
    except InputError as error:
        return None, str(error)
    missing = histories.missing(history)
    return (None, f"history.nc lacks {missing}") if missing else (history, None)


def _newest_metadata(folder: Path) -> CheckpointMetadata | None:
    for epoch in reversed(checkpoint.epochs_in(folder)):
        try:
            return checkpoint.read_metadata(folder, epoch)
        except Damaged:  # reported where checkpoints are checked
            continue
    return None


def _config(
    workdir: Path, metadata: CheckpointMetadata | None, history: xr.Dataset | None, notes: list[str]
) -> dict[str, Any]:
    """Returns config.json, or else the config of the newest checkpoint, or else of the history.

    Problems are added to `notes`.
    """
    config = read_config(workdir)
    if config is not None:
        if metadata and changes(config, metadata):
            lines = "; ".join(changes(config, metadata))
            notes.append(f"config.json is not that of checkpoint {metadata.epoch}: {lines}")
        return config
    if metadata:
        config, source = metadata.config, f"checkpoint {metadata.epoch}"
    elif history is not None and (config := parse_config(history.attrs.get("config"))):
        source = "history.nc"
    else:
        raise InputError(
            "WORKDIR",
            str(workdir),
            "it holds neither a config.json nor a checkpoint nor a history to read",
        )
    state = "damaged" if (workdir / "config.json").exists() else "missing"
    notes.append(f"config.json is {state}; the config is that of {source}")
    return config


def _axes(
    config: dict[str, Any], metadata: CheckpointMetadata | None, history: xr.Dataset | None
) -> dict[str, list]:
    """Returns the axes of the grid, in the project's units.

    They are those of the config if nothing says how many classes there are.
    """
    if metadata:
        return metadata.axes
    if history is None:
        values = configuration.swept_values(configuration.from_stored(config))
        return {name: list(given) for name, given in values.items()}
    grid = configuration.make_grid(configuration.from_stored(config), history.sizes["label"])
    return {name: list(values) for name, values in grid.axes.items()}


def _provenance(metadata: CheckpointMetadata | None, history: xr.Dataset | None) -> dict[str, Any]:
    attrs = {} if history is None else history.attrs
    versions = metadata.versions if metadata else {}
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        versions = json.loads(attrs["versions"]) if "versions" in attrs else versions
    return {
        "versions": versions,
        "device": attrs.get("device"),
        "git_revision": attrs.get("git_revision"),
        "data_checksums": metadata.data if metadata else {},
    }


def _check(folder: Path, epoch: int, place: configuration.Place | None) -> Saved:
    """Compares every leaf, for one run or all, with its checksum, and describes the checkpoint."""
    size = _size(folder / str(epoch))
    parameters = []
    try:
        metadata = checkpoint.read_metadata(folder, epoch)
        wanted = slice(place.index, place.index + 1) if place else slice(None)
        for name in metadata.crc32:
            leaf = checkpoint.read_leaf(folder, metadata, name, wanted)
            if name.startswith("params."):
                parameters.append(
                    Parameter(name.removeprefix("params."), leaf.shape[1:], str(leaf.dtype))
                )
    except Damaged as damage:
        return Saved(epoch, size, str(damage), parameters)
    order = layers.display_order(parameter.name for parameter in parameters)
    return Saved(epoch, size, None, sorted(parameters, key=lambda p: order.index(p.name)))


def _size(folder: Path) -> int:
    """Returns the bytes in a folder's files; those that a training run is removing do not count."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def verify(contents: WorkdirContents, epoch: int, data: str = "") -> Verification:
    """Measures the checkpoint of an epoch again, run by run, and compares it with the history.

    All variables that depend on weights are compared, but for those that the version which trained
    up to this epoch did not have.

    `data`: where the data are now; empty: where the config says.

    Raises:
      Removed: a training run has removed the checkpoint.
      InputError: the checkpoint is damaged, or its data are not found or have changed.
    """
    assert contents.history is not None
    deviations = {}
    try:
        metadata = checkpoint.read_metadata(contents.folder, epoch)
        measure = _make_measure(metadata, data)
        for place in contents.places:
            values = measure(
                checkpoint.read_run(contents.folder, epoch, place.index), place.coordinates
            )
            recorded = slice_of(contents.history, place.coordinates)
            if epoch != contents.measured[-1]:
                del values[histories.COSINES]  # only the newest are kept
            for name, value in values.items():
                if epoch <= recorded[name].attrs.get(histories.UNKNOWN_UNTIL, -1):
                    continue  # the version that trained it did not measure this
                one = (
                    recorded[name].sel(epoch=epoch)
                    if "epoch" in recorded[name].dims
                    else recorded[name]
                )
                deviations[name, place.index] = deviation(value, one.values)
    except Damaged as damage:
        check_present(contents.folder, epoch)
        raise InputError("--epoch", epoch, f"this checkpoint is damaged: {damage}") from damage
    variable, index = max(deviations, key=deviations.__getitem__)
    return Verification(
        epoch=epoch,
        runs=len(contents.places),
        variables=len({name for name, _ in deviations}),
        deviation=deviations[variable, index],
        variable=variable,
        coordinates=configuration.Grid(contents.axes).places()[index].coordinates,
        tolerance=TOLERANCE[metadata.config["train"]["precision"]],
    )


def deviation(found: np.ndarray, recorded: np.ndarray) -> float:
    """Returns max |found - recorded|/(|recorded| + FLOOR), with NaN equal to NaN, inf to inf."""
    found, recorded = np.asarray(found, np.float64), np.asarray(recorded, np.float64)
    same = (found == recorded) | (np.isnan(found) & np.isnan(recorded))
    with np.errstate(invalid="ignore"):
        relative = np.abs(found - recorded) / (np.abs(recorded) + FLOOR)
    return float(np.max(np.where(same, 0.0, np.where(np.isnan(relative), np.inf, relative))))


def _make_measure(
    metadata: CheckpointMetadata, data_name: str
) -> Callable[[dict, Mapping[str, Any]], dict[str, np.ndarray]]:
    """Returns measure(variables, coordinates), which computes the metrics of a run's network.

    It is compiled once for all runs.
    """
    settings = configuration.from_stored(metadata.config)
    if data_name:
        settings.data.name = data_name
    dataset = load_data(settings.data, metadata.data)
    recipe = sweep.make_recipe(settings, dataset)
    data = program.place_data(dataset, parallel.make_mesh(1), settings.train.precision)

    @jax.jit
    def compiled(variables: dict, hyper: program.Hyper, data: evaluate.Data) -> dict:
        runs, hypers = jax.tree.map(lambda leaf: leaf[None], (variables, hyper))
        values = program.measure(runs, hypers, data, recipe, jax.default_backend())
        effective = recipe.effective_decay(hyper.weight_decay, hyper.momentum)
        return {name: of_runs[0] for name, of_runs in values.items()} | {
            "effective_decay": effective
        }

    def measure(variables: dict, coordinates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with own.restored(settings.model.network), jax.enable_x64(True):
            hyper = program.Hyper(
                *(
                    jnp.asarray(coordinates.get(name, 1), data.center.dtype)
                    for name in program.Hyper._fields
                )
            )
            values = jax.device_get(compiled(variables, hyper, data))
        if recipe.wiring is not None:
            params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], variables["params"])
            of_weights = every_layer.weight_metrics(
                params, values["finite"][None], recipe.structure, recipe.wiring
            )
            values |= {name: one for name, (one,) in of_weights.items()}
        return values | {
            "mode_eigenvalues": theory.mode_eigenvalues(values.pop("class_mean_logits"))
        }

    return measure


def export(run: Run, path: Path) -> None:
    """Writes the weights of a run under flat names such as `layer_1.kernel` (in, out).

    The config, coordinates and epoch of the run are written with them. `path` ends in .safetensors
    (strings in its metadata) or .npz (one JSON string, `__metadata__`). Config and coordinates are
    JSON in both.
    """
    tensors = {
        checkpoint.leaf_name(at): np.ascontiguousarray(leaf)
        # The second collection is that of batch normalization, if there is any.
        for collection in run.variables.values()
        for at, leaf in jax.tree_util.tree_leaves_with_path(collection)
    }
    metadata = {
        "config": json.dumps(run.config),
        "coordinates": json.dumps(run.coordinates),
        "epoch": str(run.epoch),
        "layout": "kernels are (in, out) or (3, 3, in, out); normalize inputs by the statistics "
        "of the training split",
    }
    if path.suffix == ".safetensors":
        import safetensors.numpy

        content = safetensors.numpy.save(tensors, metadata)
    else:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**tensors, "__metadata__": np.array(json.dumps(metadata))}
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
    write_atomically(path, content)
