"""Checks what can be checked before JAX is imported: config, WORKDIR, data, variables, addresses.

Other errors are found later, by the modules that meet them: too few devices for the mesh, too
little memory, another process in WORKDIR, and damage in its checkpoints and its history.
"""

import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ncjax import config as configuration
from ncjax import environment, variation
from ncjax.data import preparation
from ncjax.data.dataset import Dataset
from ncjax.data.preparation import PreparedDataset
from ncjax.errors import InputError
from ncjax.paths import check_importable, check_name, expanded
from ncjax.variation import Label, Variation

# The files of a run in WORKDIR. A folder that has other files, and no config.json, is refused.
_OWN = {"history.nc", "history.nc.sha256", "metrics.jsonl", "checkpoints", "figures"}
# TensorStore takes a backslash for a separator of folders, and Orbax takes the other names for
# storage buckets. Neither accepts surrogates, which stand for bytes that are not UTF-8.
_MISTAKEN = re.compile(r"\\|gs:/|^/(gs|s3|az|hf)/|[\ud800-\udfff]")


class Plan(NamedTuple):
    """Holds a valid config, its WORKDIR, its data and its grid, all checked.

    A dry run need not name a WORKDIR; `workdir` is then the current folder, and is not used.

    Attributes:
      grown_from: the config of the runs in WORKDIR, if they are some of those planned; else None.
    """

    config: configuration.Config
    workdir: Path
    dataset: PreparedDataset
    grid: configuration.Grid
    grown_from: configuration.Config | None = None


class VariedPlan(NamedTuple):
    """Holds the plans of the variants of a config, each in its folder of a WORKDIR.

    Attributes:
      workdir: the folder of all.
      variation: the fields that vary.
      plans: of every variant, in the order of `variation.combinations`.
    """

    workdir: Path
    variation: Variation
    plans: list[Plan]

    @property
    def named(self) -> list[tuple[dict[str, Label], Plan]]:
        """Returns the labels and the plan of every variant."""
        return list(zip(self.variation.combinations(), self.plans, strict=True))


class Processes(NamedTuple):
    """Holds arguments of `jax.distributed.initialize`, which finds out those that are None."""

    coordinator: str | None
    processes: int | None
    process: int | None


def prepare(
    config: configuration.Config, workdir: str | Path, dataset: Dataset | None = None
) -> Plan:
    """Validates a config, makes its WORKDIR and loads its data, or raises InputError.

    `dataset`: arrays from Python, in place of those that `config.data.name` names.
    """
    plan = examine(config, workdir, dataset)
    _make_folder("--workdir", plan.workdir)
    if plan.config.profile.dir:
        _make_folder("config.profile.dir", Path(plan.config.profile.dir))
    return plan


def prepare_varied(
    config: configuration.Config,
    vary: Mapping[str, Sequence],
    workdir: str | Path,
    dataset: Dataset | None = None,
) -> VariedPlan:
    """Does what `prepare` does for every variant of a config; see `ncjax.train`."""
    plan = examine_varied(config, vary, workdir, dataset)
    _make_folder("--workdir", plan.workdir)
    if profile := plan.plans[0].config.profile.dir:
        _make_folder("config.profile.dir", Path(profile))
    return plan


def examine_varied(
    config: configuration.Config,
    vary: Mapping[str, Sequence],
    workdir: str | Path | None,
    given: Dataset | None = None,
) -> VariedPlan:
    """Returns the plan of `prepare_varied` without making a folder; `workdir` may be None."""
    varied = variation.make(vary)
    if given is not None and "data.name" in varied.values:
        raise InputError("vary", "data.name", "a dataset is given as arrays; leave one of them out")
    variants = variation.make_variants(config, varied)
    folder = Path() if workdir is None else _check_varied(workdir, varied)
    loaded: dict[str, PreparedDataset] = {}

    def load(settings: configuration.DataConfig, given: Dataset | None) -> PreparedDataset:
        # Variants on the same data have one copy of them.
        key = repr(settings)
        if key not in loaded:
            loaded[key] = preparation.load(settings, given)
        return loaded[key]

    plans = []
    for variant in variants:
        place = None if workdir is None else folder / variant.folder
        try:
            plans.append(examine(variant.config, place, given, load))
        except InputError as error:
            raise variation.of_variant(error, variant.words) from error
    return VariedPlan(folder, varied, plans)


def examine(
    config: configuration.Config,
    workdir: str | Path | None,
    given: Dataset | None = None,
    load: Callable[..., PreparedDataset] | None = None,
) -> Plan:
    """Returns the plan of `prepare` without making a folder; `workdir` may be None.

    `load`: in place of `preparation.load`.
    """
    if sys.platform == "win32":
        way_out = "WORKDIR is locked by flock, which Windows lacks; use WSL, Linux or macOS"
        raise InputError("platform", sys.platform, way_out)
    config = configuration.validate(config)
    if given is not None:
        config.data.name = given.name
    environment.check(os.environ)
    if config.model.network:
        check_importable(config.model.network)
    checked, old = (Path(), None) if workdir is None else _check_workdir(workdir, config)
    dataset = (load or preparation.load)(config.data, given)
    train_size = len(dataset.train.labels)
    if config.train.batch_size > train_size:
        raise InputError(
            "config.train.batch_size",
            config.train.batch_size,
            f"the training split has {train_size} examples; take fewer, or 0 for full batch",
        )
    _check_images(config, dataset)
    configuration.check_units(config, dataset.num_classes)
    _check_scale(config, dataset)
    if config.profile.dir:
        _check_profile(config.profile.dir)
    grid = configuration.make_grid(config, dataset.num_classes)
    return Plan(config, checked, dataset, grid, old)


def find_processes(
    coordinator: str, count: int | None, number: int | None, environment: Mapping[str, str]
) -> Processes | None:
    """Returns how this process joins others, or None if it is alone.

    The options --coordinator, --processes and --process decide it, or else the environment. Tasks
    of one SLURM step and hosts of one TPU slice are such processes. `auto` leaves the choice to
    JAX.
    """
    if not coordinator and count is None and number is None:
        tasks, hosts = (
            environment.get("SLURM_STEP_NUM_TASKS", "1"),
            environment.get("TPU_WORKER_HOSTNAMES", ""),
        )
        return Processes(None, None, None) if tasks != "1" or "," in hosts else None
    if coordinator == "auto" and count is None and number is None:
        return Processes(None, None, None)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        way_out = "name process 0 as host:port, the same in all processes, or auto and no more"
        raise InputError("--coordinator", coordinator, way_out)
    if count is None or count < 1:
        raise InputError("--processes", count, "say how many there are in all, an integer >= 1")
    if number is None or not 0 <= number < count:
        raise InputError(
            "--process",
            number,
            f"must be an integer from 0 to {count - 1}, another in each process",
        )
    _check_address(coordinator, host, int(port), number)
    return Processes(coordinator, count, number)


def _check_address(coordinator: str, host: str, port: int, number: int) -> None:
    """Raises InputError for an unknown host, which JAX would wait for, and for a port in use.

    JAX would crash because of the latter.
    """
    try:
        socket.getaddrinfo(host.strip("[]"), port)
        if number == 0:
            socket.create_server(("", port)).close()
    except OSError as error:
        way_out = f"{error.strerror}; name process 0 as host:port, and a port that is free"
        raise InputError("--coordinator", coordinator, way_out) from error


def _check_images(config: configuration.Config, dataset: PreparedDataset) -> None:
    """Raises InputError if convolutions or random crops are asked for and data are not images."""
    shape = dataset.center.shape
    if len(shape) == 3:
        return
    way_out = (
        f"{config.data.name} has examples of shape {shape}; it needs images (height, width, "
        "channels)"
    )
    if config.model.kind in ("conv", "resnet18") and not config.model.network:
        raise InputError("config.model.kind", config.model.kind, way_out)
    if config.train.augment != "none":
        raise InputError("config.train.augment", config.train.augment, way_out)


def _check_scale(config: configuration.Config, dataset: PreparedDataset) -> None:
    """Raises InputError if inputs scaled to the norm asked for would be 0 or infinite."""
    if not config.data.standardize:
        factor = float(dataset.scale) / config.data.input_scale
        configuration.check_held(
            "config.data.input_scale", (config.data.input_scale,), config.train.precision, factor
        )


def check_path(field: str, folder: Path) -> None:
    """Raises InputError if Orbax or TensorStore would take a folder's path for another place."""
    found = _MISTAKEN.search(f"{os.path.realpath(folder)}/")
    if found:
        way_out = (
            f"Orbax and TensorStore take {found[0].strip('/')!a} in its path for another place; "
            "choose another"
        )
        raise InputError(field, str(folder), way_out)


def _check_workdir(
    name: str | Path, config: configuration.Config
) -> tuple[Path, configuration.Config | None]:
    """Returns the path of a WORKDIR, and the config of its runs if they are to grow."""
    workdir, stored = _read_workdir(name)
    if stored is None:
        return workdir, None
    if (held := _held(workdir, stored)) is not None:
        fields = ", ".join(f"config.{field}" for field in held.values)
        way_out = f"it holds variants of {fields}; vary the same, or choose another WORKDIR"
        raise InputError("--workdir", str(workdir), way_out)
    try:
        differences = configuration.differences(config, stored)
        if configuration.grows(config, stored):
            return workdir, configuration.from_stored(stored)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(workdir) from error
    if differences:
        way_out = (
            f"it holds a run of another config: {'; '.join(differences)}; choose another WORKDIR"
        )
        if len(differences) == 1 and differences[0].startswith("config.train.epochs"):
            way_out += (
                " (a run never shrinks; it grows with train.schedule=constant, or "
                "train.schedule_epochs set)"
            )
        raise InputError("--workdir", str(workdir), way_out)
    return workdir, None


def _check_varied(name: str | Path, varied: Variation) -> Path:
    """Returns the path of a WORKDIR of variants, or raises InputError if it holds other ones."""
    workdir, stored = _read_workdir(name)
    if stored is not None:
        variation.check_grows(varied, _held(workdir, stored), workdir)
    return workdir


def _held(workdir: Path, stored: Any) -> Variation | None:
    """Returns the variation of a parsed config.json, or raises InputError where it is damaged."""
    try:
        return variation.from_stored(stored)
    except InputError as error:
        raise _damaged(workdir) from error


def _read_workdir(name: str | Path) -> tuple[Path, Any]:
    """Returns the path of a WORKDIR and its parsed config.json, None where there is none."""
    workdir = expanded("--workdir", name)
    try:
        check_name("--workdir", workdir)
        check_path("--workdir", workdir)
        if workdir.exists() and not workdir.is_dir():
            raise InputError("--workdir", str(workdir), "it is a file; name a folder")
        content = (workdir / "config.json").read_bytes()
    except FileNotFoundError:
        foreign = sorted(
            path.name for path in workdir.glob("*") if path.name not in _OWN and path.name[0] != "."
        )
        if foreign:
            way_out = f"it holds {foreign[0]} and no run; choose an empty or a new folder"
            raise InputError("--workdir", str(workdir), way_out) from None
        return workdir, None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the name is too long, or has a null byte
        raise InputError(
            "--workdir", str(name), f"cannot be read ({getattr(error, 'strerror', error)})"
        ) from error
    try:
        stored = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(workdir) from error
    if stored is None:  # JSON, but no config
        raise _damaged(workdir)
    return workdir, stored


def _damaged(workdir: Path) -> InputError:
    return InputError(
        "--workdir", str(workdir), "its config.json is damaged; choose another WORKDIR"
    )


def _check_profile(name: str) -> None:
    """Raises InputError if a trace cannot be written to a folder, long before training."""
    check_name("config.profile.dir", Path(name))
    try:
        folder = Path(name)
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OSError(f"{folder} is no folder that can be written")
    except (OSError, ValueError) as error:  # the name is too long, or has a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError("config.profile.dir", name, f"{reason}; choose another folder") from error


def _make_folder(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            name, str(folder), f"cannot be written ({error.strerror}); choose another"
        ) from error
