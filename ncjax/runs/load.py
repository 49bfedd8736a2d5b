"""Loads one trained run of a WORKDIR for use in Python: `ncjax.load_run`.

Only that run's part of a checkpoint is read.
"""

import functools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped

from ncjax import config as configuration
from ncjax import plan
from ncjax.data import preparation, sources
from ncjax.data.dataset import Dataset, check_given
from ncjax.data.preparation import PreparedDataset
from ncjax.errors import InputError, last_line
from ncjax.paths import expanded
from ncjax.runs import variants
from ncjax.storage import checkpoint
from ncjax.storage import history as histories
from ncjax.training import models, own

# Rows of a forward pass, which bound its memory however many images are given.
_ROWS = 1024
# Attempts at the newest checkpoint, while a training process removes checkpoints as they are read.
ATTEMPTS = 5

Images = Shaped[np.ndarray | jax.Array, "B *image"] | Sequence


@dataclass(frozen=True, eq=False)
class Run:
    """Holds one network of a sweep at one epoch, as `ncjax.load_run` returns it.

    Its data and its history are read when they are first used.

    Attributes:
      workdir: the folder it was read from.
      epoch: the epoch of its weights.
      coordinates: its value on every axis of the grid, in the project's units, and of every field
        that varies, as in history.nc.
      config: the config of the whole sweep, as in config.json, from the checkpoint's own copy.
      model: the flax module: `model.apply(run.variables, run.normalize(images))`.
      variables: nested dicts of NumPy arrays: `params`, and `batch_stats` with batch normalization.
      checksums: the checksums of the data that it was trained on; empty if its checkpoint has none.
      given: the data set that `load_run` was given.
    """

    workdir: Path
    epoch: int
    coordinates: Mapping[str, float | int | str]
    config: dict[str, Any] = field(repr=False)
    model: nn.Module
    variables: dict = field(repr=False)
    checksums: dict[str, int] = field(repr=False)
    given: Dataset | None = field(repr=False, default=None)

    @property
    def params(self) -> dict:
        """Returns its weights by layer: dense kernels (in, out), convolutions (3, 3, in, out)."""
        return self.variables["params"]

    @functools.cached_property
    def dataset(self) -> PreparedDataset:
        """Returns the data it was trained on; raises InputError if they are lost or changed."""
        settings = configuration.from_stored(self.config).data
        return load_data(settings, self.checksums, self.given)

    @functools.cached_property
    def history(self) -> xr.Dataset:
        """Returns its slice of history.nc; raises InputError if there is no such history."""
        return slice_of(histories.load(self.workdir / "history.nc"), self.coordinates)

    def normalize(self, images: Images) -> Float[np.ndarray, "B *image"]:
        """Returns the network's inputs, (images - center) * scale, in its precision.

        `center` and `scale` are statistics of the run's own training split.

        Args:
          images: `(B, *image)` as the data set has them (digits: 0 to 16, (8, 8, 1); TFDS: uint8, 0
            to 255).

        Raises:
          InputError: the images have another shape than those of the data set.
        """
        images = _as_array(images)
        center, scale = (
            np.asarray(a, self.config["train"]["precision"])
            for a in (self.dataset.center, self.dataset.scale)
        )
        if images.shape[1:] != center.shape or not images.shape[0]:
            name, shape = self.config["data"]["name"], ", ".join(map(str, center.shape))
            raise InputError(
                "images",
                images.shape,
                f"{name} has images ({shape}); give (B, {shape}) with B >= 1",
            )
        return (np.asarray(images).astype(center.dtype) - center) * scale

    def features(self, images: Images) -> Float[np.ndarray, "B p"]:
        """Returns the features h(x) of raw images; see `normalize`."""
        return self._forward(images, "features")

    def logits(self, images: Images) -> Float[np.ndarray, "B C"]:
        """Returns the outputs f(x) = W h(x) + b of raw images; see `normalize`."""
        return self._forward(images, models.outputs)

    def _forward(self, images: Images, method: str | Callable) -> np.ndarray:
        images = _as_array(images)
        parts = [images[i : i + _ROWS] for i in range(0, max(1, len(images)), _ROWS)]
        # This is how metrics were measured, and a float64 network stays float64.
        network = self.config["model"].get("network", "")
        with (
            own.restored(network),
            jax.enable_x64(True),
            jax.default_matmul_precision("highest"),
        ):
            outputs = [
                _apply(self.model, method, self.variables, self.normalize(part)) for part in parts
            ]
            return np.concatenate([np.asarray(output) for output in outputs])


def _as_array(images: Any) -> np.ndarray | jax.Array:
    """Returns images of any type as an array of numbers, or raises InputError."""
    try:
        array = images if isinstance(images, jax.Array) else np.asarray(images)
    except (ValueError, TypeError, RuntimeError) as error:
        way_out = f"no array can be made of it: {last_line(error)}"
        raise InputError("images", type(images).__name__, way_out) from error
    if array.dtype.kind not in "biuf":
        raise InputError("images", str(array.dtype), "give real numbers")
    return array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: nn.Module, method: str | Callable, variables: dict, x: jax.Array) -> jax.Array:
    return jnp.asarray(model.apply(variables, x, False, method=method))


def load_run(
    workdir: str | Path,
    *,
    epoch: int | None = None,
    dataset: Dataset | None = None,
    **coordinates: Any,
) -> Run:
    """Returns one run of a sweep, as in `load_run("runs/digits", weight_decay=1e-3, seed=0)`.

    Only the run's part of a checkpoint is read, and compared with its checksums.

    Args:
      workdir: the folder that `ncjax.train` or `ncjax train` has written.
      epoch: the epoch of a checkpoint; None: the newest undamaged one (a warning names damaged
        ones).
      dataset: the data of a run that was trained on arrays; they are compared with the run's
        checksums when they are first used.
      coordinates: the run's numbers on the axes of the grid, in the project's units, as in
        history.nc, and its values of fields that vary, as in `optimizer="sgd"`. An axis of one
        value may be left out.

    Returns:
      A `Run`: its weights, its outputs on images, its data and its history.

    Raises:
      InputError: there is no such checkpoint or run, or it is damaged.

    Examples:
      >>> import tempfile
      >>> import ncjax
      >>> config = ncjax.Config()
      >>> config.data.name, config.data.per_class, config.model.widths = "synthetic", 20, (8, 8)
      >>> config.train.epochs, config.train.batch_size, config.sweep.seed = 2, 16, (0, 1)
      >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
      ...     history = ncjax.train(config, folder)
      ...     run = ncjax.load_run(folder, seed=1)
      2 runs (1 weight_decay x 2 seed) of 32-8-8-10 on synthetic: ...
      >>> run.epoch, run.params["head"]["kernel"].shape
      (2, (8, 10))
    """
    check_given(dataset)
    workdir = expanded("workdir", workdir)
    if not workdir.is_dir():
        raise InputError(
            "workdir", str(workdir), "no such folder; name one that `ncjax train` has left"
        )
    plan.check_path("workdir", workdir)
    found = variants.find(workdir)
    if found is not None:
        labels, folder, rest = found.find(coordinates)
        run = load_run(folder, epoch=epoch, dataset=dataset, **rest)
        return replace(run, coordinates={**labels, **run.coordinates})
    for _ in range(ATTEMPTS - 1):
        try:
            return _load_run(workdir, epoch, dataset, coordinates)
        except Removed:
            if epoch is not None:
                raise
    return _load_run(workdir, epoch, dataset, coordinates)


def _load_run(
    workdir: Path, epoch: int | None, given: Dataset | None, coordinates: Mapping[str, Any]
) -> Run:
    folder = workdir / "checkpoints"
    found = checkpoint.epochs_in(folder)
    if not found:
        raise InputError("workdir", str(workdir), "it holds no checkpoint yet")
    if epoch is not None and epoch not in found:
        raise InputError(
            "epoch", epoch, f"there are checkpoints of epochs {', '.join(map(str, found))}"
        )
    if epoch is None and (newer := [e for e in checkpoint.unfinished_in(folder) if e > found[-1]]):
        warnings.warn(
            f"checkpoint {newer[-1]} in {workdir} is not used: it is not finished", stacklevel=3
        )
    for candidate in reversed(found) if epoch is None else [epoch]:
        try:
            metadata = checkpoint.read_metadata(folder, candidate)
            place = configuration.Grid(metadata.axes).find(coordinates)
            variables = checkpoint.read_run(folder, candidate, place.index)
        except checkpoint.Damaged as damage:
            check_present(folder, candidate)
            if epoch is not None:
                raise InputError(
                    "epoch", epoch, f"this checkpoint is damaged: {damage}"
                ) from damage
            warnings.warn(
                f"checkpoint {candidate} in {workdir} is not used: {damage}", stacklevel=3
            )
            continue
        changed = changes(read_config(workdir), metadata)
        if changed:
            line = (
                f"config.json in {workdir} is not used, the checkpoint has another: "
                f"{'; '.join(changed)}"
            )
            warnings.warn(line, stacklevel=3)
        model = make_model(metadata.config, variables["params"])
        return Run(
            *(workdir, candidate, place.coordinates, metadata.config, model, variables),
            metadata.data,
            given,
        )
    raise InputError("workdir", str(workdir), "none of its checkpoints is sound")


class Removed(InputError):
    """Reports a checkpoint that a training process, which keeps only the newest, has removed."""

    def __init__(self, epoch: int):
        super().__init__(
            "epoch", epoch, "a training process has removed this checkpoint; name a newer one"
        )


def check_present(folder: Path, epoch: int) -> None:
    """Raises `Removed` if a checkpoint that could not be read no longer exists."""
    if epoch != max(checkpoint.epochs_in(folder), default=None):
        time.sleep(0.2)  # its mark of success may be removed last
    if epoch not in checkpoint.epochs_in(folder):
        raise Removed(epoch)


def slice_of(
    history: xr.Dataset, coordinates: Mapping[str, float | int | str], *, keep_axes: bool = False
) -> xr.Dataset:
    """Returns one run of a history, with axes of length 1 if `keep_axes`."""
    at = {
        name: [value] if keep_axes else value
        for name, value in coordinates.items()
        if name in history.dims
    }
    try:
        return history.sel(at)
    except KeyError as error:
        raise InputError(
            "history", at, "history.nc has no such run; is it of this WORKDIR?"
        ) from error


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the content of config.json, or None if it is missing or no config."""
    try:
        return parse_config((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return None


def parse_config(text: Any) -> dict[str, Any] | None:
    """Parses a config from JSON text, or returns None if it is none."""
    try:
        config = json.loads(text)
        return config if _is_config(config) else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _is_config(config: Any) -> bool:
    """Returns whether a config has all sections and all fields of its grid.

    An older config may lack other fields.
    """
    sections = ("data", "model", "train", "sweep", "checkpoint", "log")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(name), dict) for name in sections
    ):
        return False
    if (
        not all(config["sweep"].get(name) for name in configuration.SWEPT)
        or "epochs" not in config["train"]
    ):
        return False
    return configuration.is_sound(config)


def changes(config: dict[str, Any] | None, metadata: checkpoint.CheckpointMetadata) -> list[str]:
    """Returns a line per field in which config.json, if any, differs from a checkpoint's config."""
    if config is None:
        return []
    return configuration.differences(config, metadata.config)


def load_data(
    settings: configuration.DataConfig,
    checksums: Mapping[str, int],
    given: Dataset | None = None,
) -> PreparedDataset:
    """Returns the data set that settings name; raises InputError if its checksums differ.

    `given`: arrays from Python, in place of those that the settings name.
    """
    dataset = preparation.load(settings, given)
    check_data(settings.name, preparation.checksums(dataset), checksums)
    return dataset


def check_data(name: str, found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Raises InputError if a data set is not that of a checkpoint.

    A checkpoint that is too old to have checksums accepts any data set.
    """
    changed = [part for part, crc in expected.items() if found.get(part) != crc]
    if changed:
        way_out = (
            f"it is not what the checkpoint was trained on: {', '.join(changed)} differ; "
            f"{sources.find(name).restore}"
        )
        raise InputError("config.data.name", name, way_out)


def make_model(config: Mapping[str, Any], params: dict) -> nn.Module:
    """Returns the network of a parsed config.json; the head in `params` has a column per class."""
    settings = configuration.from_stored(config)
    return models.make(settings.model, params["head"]["kernel"].shape[-1], settings.train.precision)
