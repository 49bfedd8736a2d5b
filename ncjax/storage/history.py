"""Measurements as a labelled xarray Dataset on disk: what each number is, for which run, epoch,
split and layer.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import xarray as xr

from ncjax import config
from ncjax.config import Grid
from ncjax.errors import InputError
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.storage.files import write_atomically

# Measured with the others, but only the newest is kept: C^2 numbers a run.
COSINES = "class_mean_cosine"
_COSINES_DEFINITION = (
    "cos between centred class means of the training split, at the last epoch measured"
)

# A run whose 2 lambda t is shorter is not near equilibrium: layer norms still differ by 5% of what
# they did.
RELAXED = 3.0

# Every history has them.
_COORDINATES = {"weight_decay", "seed", "epoch", "split"}


def one_epoch(
    epoch: int,
    metrics: dict[str, np.ndarray],
    *,
    grid: Grid,
    layers: tuple[str, ...],
    label_names: tuple[str, ...],
    attrs: dict[str, str],
) -> xr.Dataset:
    """Labels the measurements of one epoch, each (R, ...) in the order of `grid`."""
    coords = {
        **grid.dim_values,
        "epoch": [epoch],
        "split": ["train", "test"],
        "layer": list(layers),
        "mode": list(range(1, len(label_names) + 1)),
        "label": list(label_names),
        "other_label": list(label_names),
    }
    variables = {}
    for name, metric in VOCABULARY.items():
        values = np.expand_dims(grid.unflatten(metrics[name]), len(grid.shape))
        dims = (*grid.dims, "epoch", *metric.dims)
        variables[name] = (dims, values, metric.attributes)
    cosines = grid.unflatten(metrics[COSINES])
    cosine_attrs = {
        "definition": _COSINES_DEFINITION,
        "long_name": "cosine between class means",
        "units": "1",
    }
    variables[COSINES] = ((*grid.dims, "label", "other_label"), cosines, cosine_attrs)
    history = xr.Dataset(variables, coords, attrs)
    history["weight_decay"].attrs["definition"] = (
        "lambda given to the optimizer, in the project's units"
    )
    return history


def append(history: xr.Dataset | None, newest: xr.Dataset) -> xr.Dataset:
    """`history` with one more epoch; what has no epoch is the newest's."""
    if history is None:
        return newest
    by_epoch = [part.drop_vars(COSINES) for part in (history, newest)]
    joined = xr.concat(
        by_epoch, "epoch", data_vars="minimal", coords="minimal", compat="override", join="exact"
    )
    return joined.assign({COSINES: newest[COSINES]})


def up_to(history: xr.Dataset, epoch: int) -> xr.Dataset:
    """The epochs up to `epoch` (those after a checkpoint are measured again)."""
    return history.isel(epoch=np.flatnonzero(history["epoch"].values <= epoch))


def missing(history: xr.Dataset) -> str:
    """The first few variables that a history of ours has and this one lacks; empty if it has
    all.
    """
    return ", ".join(sorted({*VOCABULARY, COSINES} - set(map(str, history.variables)))[:3])


def extinct(history: xr.Dataset) -> xr.DataArray:
    """Returns where weight decay has put a network out: outputs are the same for every input, and
    there is nothing to collapse.

    1 - (epsilon + delta) is the margin of the class-mean outputs (probabilities with
    cross-entropy), whatever meets their sum: epsilon alone stops at (C-1)/C where a bias does, or
    where targets are centred.
    """
    train = history[["epsilon", "delta"]].sel(split="train", drop=True)
    return abs(1 - train["epsilon"] - train["delta"]) < 1e-3


def class_sizes(history: xr.Dataset) -> np.ndarray:
    """Returns the number of training examples of every class; older histories are balanced."""
    sizes = json.loads(history.attrs.get("class_sizes", "null"))
    return np.array(sizes or [int(history.attrs["per_class"])] * history.sizes["label"])


def imbalance_ratio(history: xr.Dataset) -> float:
    """Returns the size of the largest class over that of the smallest."""
    sizes = class_sizes(history)
    return float(sizes.max() / sizes.min())


def save(history: xr.Dataset, path: Path) -> None:
    """Writes a history, and beside it `path`.sha256 in the format of sha256sum.

    The sum is written first, beside that of the file it replaces: whenever a crash comes, one of
    them is the file's.
    """
    # In a fixed order, so that the same numbers are the same bytes however the history was put
    # together.
    coords = {name: history.variables[name] for name in sorted(map(str, history.coords))}
    variables = {name: history.variables[name] for name in sorted(map(str, history.data_vars))}
    content = bytes(xr.Dataset(variables, coords, history.attrs).to_netcdf(engine="scipy"))
    sums, line = _sums(path), f"{_sha256(content)}  {path.name}\n"
    if path.exists():
        write_atomically(sums, (line + f"{_sha256(path.read_bytes())}  {path.name}\n").encode())
    write_atomically(path, content)
    write_atomically(sums, line.encode())


def _sums(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def load(path: Path) -> xr.Dataset:
    """Reads a history into memory, verified where its checksum lies beside it, or raises
    InputError naming the file.
    """
    try:
        content = _read_verified(path)
    except FileNotFoundError as error:
        raise InputError(
            "history", str(path), "no such file; train first, or name a WORKDIR that holds one"
        ) from error
    try:
        # From memory: of a damaged file that it has mapped, scipy cannot let go without a warning.
        history = xr.load_dataset(io.BytesIO(content), engine="scipy")
    except Exception as error:  # scipy reports damaged bytes by many types
        raise InputError(
            "history",
            str(path),
            "not readable as netCDF; remove it, and the same command trains anew",
        ) from error
    if not set(history.indexes) >= _COORDINATES or set(history["split"].values.tolist()) != {
        "train",
        "test",
    }:
        raise InputError(
            "history",
            str(path),
            "its coordinates are not those of a history; it is damaged, or none",
        )
    try:
        config.from_json(history.attrs["config"])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            "history", str(path), "its attribute config is no config; it is damaged, or none"
        ) from error
    return _renewed(history)


def _read_verified(path: Path) -> bytes:
    """Returns the content of a file that its checksum, if there is one, is of; or raises
    InputError.
    """
    while True:
        content = path.read_bytes()
        sums = _sums(path).read_bytes() if _sums(path).exists() else None
        if sums is None or _sha256(content).encode() in sums.split():
            return content
        if path.read_bytes() == content:  # not replaced, with its checksum, by a run in between
            way_out = (
                f"does not match {_sums(path).name}: one of them was changed or damaged; restore "
                "it, or train anew"
            )
            raise InputError("history", str(path), f"{way_out} in another WORKDIR")


def _renewed(history: xr.Dataset) -> xr.Dataset:
    """Gives a history of an older version today's names and variables.

    `nc3_floor` used to be the nc3 of a symmetric solution, as the definition kept with every
    variable says. The true floor follows from what such a history holds: 1 - nc3/2 = (1 -
    nc3_centered/2) ||P W_L||_F/||W_L||_F.
    """
    floor, symmetric = VOCABULARY["nc3_floor"], VOCABULARY["symmetric_nc3"]
    if (
        "nc3_floor" not in history
        or history["nc3_floor"].attrs.get("definition") != symmetric.definition
    ):
        return history
    history = history.rename(nc3_floor="symmetric_nc3")
    if not {"nc3", "nc3_centered"} <= set(history):
        return history
    duality, centred = (
        history[name].sel(split="train", drop=True) for name in ("nc3", "nc3_centered")
    )
    share = ((2 - duality.astype(np.float64)) / (2 - centred.astype(np.float64))).clip(max=1)
    restored = (2 - 2 * share).astype(duality.dtype).assign_attrs(floor.attributes)
    return history.assign(nc3_floor=restored)
