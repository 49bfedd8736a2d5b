"""Trains from Python what `ncjax train` trains from a command line."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncjax import environment, plan
from ncjax.config import Config
from ncjax.data.dataset import Dataset, check_given
from ncjax.errors import InputError

if TYPE_CHECKING:
    import xarray as xr


def train(
    config: "Config | str",
    workdir: str | Path,
    *,
    vary: Mapping[str, Sequence] | None = None,
    dataset: Dataset | None = None,
    on_measurement: "Callable[[xr.Dataset], object] | None" = None,
) -> "xr.Dataset":
    """Trains a sweep, measures neural collapse as it goes, and returns the history.

    All runs of the grid (weight decays x seeds, and whatever else `config.sweep` lists) train
    together in one compiled program. A folder that holds a part of the same sweep is continued
    where it stopped, to the same bits; one that holds all of it is read. Figures are drawn by
    `ncjax plot WORKDIR`.

    Args:
      config: an `ncjax.Config`; or the name of a config that ships, as in "digits" or
        "mnist:smoke"; or the path of a Python file with `get_config()`.
      workdir: the folder for config.json, history.nc, metrics.jsonl and checkpoints/. It is made
        where it is missing.
      vary: fields of the config with several values each, as in `{"train.optimizer": ("sgd",
        "adamw"), "model.widths": ((256, 256), (512, 512))}`. Every combination of them is trained
        in a program and a folder of its own below `workdir`, and the history has a dimension
        named after each field (`optimizer`, `widths`; `loss_function` of `loss`, `data_name` of
        `data.name`). What a combination does not have, as layers of another depth, is NaN.
      dataset: arrays of your own to train on, in place of the data set that `config.data.name`
        names; the other fields of `config.data` apply to it. A folder of such a run is continued
        with the same arrays alone.
      on_measurement: called after every measurement with its epoch of the history, all runs of the
        grid, once that is on disk. What it raises ends the run, which can then be continued.
        Epochs that the folder holds already are not measured again.

    Returns:
      The measurements, with dimensions `weight_decay`, `seed`, every other axis that was swept,
      `epoch` and, where they apply, `split`, `layer`, `mode` and `label`. Each variable carries
      its definition in `attrs["definition"]`. A run that diverged is NaN.

    Raises:
      InputError: a field, the data or `workdir` cannot be used; the message names the field, its
        value and the way out. Nothing has been trained.
      OSError: `workdir` can be written no more; what it holds is whole and can be continued.

    Examples:
      >>> import tempfile
      >>> import ncjax
      >>> config = ncjax.Config()
      >>> config.data.name, config.data.per_class, config.model.widths = "synthetic", 20, (8, 8)
      >>> config.train.epochs, config.train.batch_size = 2, 16
      >>> config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-3), (0, 1)
      >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
      ...     history = ncjax.train(config, folder)
      4 runs (2 weight_decay x 2 seed) of 32-8-8-10 on synthetic: ...
      >>> history.nc1.sel(split="train", epoch=2).shape
      (2, 2)
    """
    _check_types(config, vary, dataset, on_measurement)
    if isinstance(config, str):
        from ncjax.cli.train import load_config

        config = load_config(config)
    if vary:
        prepared = plan.prepare_varied(config, vary, workdir, dataset)
        environment.import_jax()
        from ncjax.runs import varied

        return varied.train(prepared, on_measurement)
    prepared = plan.prepare(config, workdir, dataset)
    environment.import_jax()
    from ncjax.runs import loop

    return loop.train(prepared, on_measurement)


def _check_types(config: Any, vary: Any, dataset: Any, on_measurement: Any) -> None:
    """Raises InputError for arguments of a wrong type."""
    if not isinstance(config, Config | str):
        way_out = "give an ncjax.Config, whose update() takes fields by name, or the name of one"
        raise InputError("config", f"a {type(config).__name__}", way_out)
    if not isinstance(vary, Mapping | None) or not all(isinstance(key, str) for key in vary or ()):
        way_out = 'give values by field, as in {"train.optimizer": ("sgd", "adamw")}'
        raise InputError("vary", vary, way_out)
    check_given(dataset)
    if on_measurement is not None and not callable(on_measurement):
        raise InputError("on_measurement", on_measurement, "give a function of an xarray.Dataset")
