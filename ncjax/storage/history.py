"""Keeps measurements as an xarray Dataset on disk, labelled by run, epoch, split and layer."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import xarray as xr

from ncjax import config
from ncjax.config import Grid
from ncjax.errors import InputError
from ncjax.metrics.vocabulary import VOCABULARY, metrics_in
from ncjax.storage import monitored
from ncjax.storage.files import write_atomically

# It is measured with the others, but only the newest is kept, because it has C^2 numbers a run.
COSINES = "class_mean_cosine"
_COSINES_DEFINITION = (
    "cos between centred class means of the training split, at the last epoch measured"
)

# A run with a smaller 2 lambda t is not near equilibrium: differences of squared layer norms are
# still more than 5% of what they were.
RELAXED = 3.0
# A mode with an eigenvalue below this is gone.
DEAD = 0.01

# The coordinates that every history has.
_COORDINATES = {"weight_decay", "seed", "epoch", "split"}


# Variables that no version has lacked. Where a history lacks another, its version had none.
_LASTING = ("finite", "loss", "accuracy", "nc1", "nc3", "nc4", "epsilon", "weight_norm_sq")

# The attribute of a variable that says up to which epoch it is NaN because the version that
# trained did not have it.
UNKNOWN_UNTIL = "unknown_until_epoch"


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
    for name, metric in metrics_in(metrics).items():
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
    """Appends one epoch to a history; variables without an epoch are those of the newest."""
    if history is None:
        return newest
    by_epoch = [part.drop_vars(COSINES) for part in (history, newest)]
    joined = xr.concat(
        by_epoch, "epoch", data_vars="minimal", coords="minimal", compat="override", join="exact"
    )
    return joined.assign({COSINES: newest[COSINES]})


def up_to(history: xr.Dataset, epoch: int) -> xr.Dataset:
    """Returns the history up to an epoch; the epochs after a checkpoint are measured again."""
    return history.isel(epoch=np.flatnonzero(history["epoch"].values <= epoch))


def missing(history: xr.Dataset) -> str:
    """Returns the names of variables of every version that a history lacks; empty if it has all."""
    return ", ".join(sorted({*_LASTING, COSINES} - set(map(str, history.variables)))[:3])


def extinct(history: xr.Dataset) -> xr.DataArray:
    """Returns a mask of the networks whose outputs weight decay has made the same for every input.

    Nothing is left in them to collapse. 1 - (epsilon + delta) is the margin of the class-mean
    outputs (probabilities with cross-entropy), whether or not a bias fits their sum. epsilon alone
    goes only to (C-1)/C with a bias or centred targets.
    """
    train = history[["epsilon", "delta"]].sel(split="train", drop=True)
    return abs(1 - train["epsilon"] - train["delta"]) < 1e-3


def class_sizes(history: xr.Dataset) -> np.ndarray:
    """Returns the number of training examples of every class; older histories are balanced."""
    sizes = json.loads(history.attrs.get("class_sizes", "null"))
    return np.array(sizes or [int(history.attrs["per_class"])] * history.sizes["label"])


def versions(history: xr.Dataset) -> dict[str, str]:
    """Returns the versions of Python and packages that trained a history; none if it says none."""
    try:
        return dict(json.loads(history.attrs["versions"]))
    except (KeyError, ValueError, TypeError):
        return {}


def imbalance_ratio(history: xr.Dataset) -> float:
    """Returns the size of the largest class over that of the smallest."""
    sizes = class_sizes(history)
    return float(sizes.max() / sizes.min())


def save(history: xr.Dataset, path: Path) -> None:
    """Writes a history, and its checksum to `path`.sha256 in the format of sha256sum.

    The checksum is written before the history, together with that of the file it replaces, so that
    after a crash at any time one of the two is that of the file.
    """
    # Variables are in a fixed order, so that the same numbers are the same bytes however the
    # history was put together.
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
    """Reads a history into memory, or raises InputError naming the file.

    It is verified if there is a checksum beside it.
    """
    return checked(read(path), path)


def read(path: Path) -> xr.Dataset:
    """Reads whatever netCDF a file holds, verified where its checksum lies beside it, or raises
    InputError naming the file.
    """
    try:
        content = _read_verified(path)
    except FileNotFoundError as error:
        raise InputError(
            "history", str(path), "no such file; train first, or name a WORKDIR that holds one"
        ) from error
    try:
        # It is read from memory, because scipy cannot close a damaged file that it has mapped
        # without a warning.
        return xr.load_dataset(io.BytesIO(content), engine="scipy")
    except Exception as error:  # scipy reports damaged bytes by many types
        raise InputError(
            "history",
            str(path),
            "not readable as netCDF; remove it, and the same command trains anew",
        ) from error


def checked(history: xr.Dataset, path: Path) -> xr.Dataset:
    """Returns what was read from a file if it is the history of a sweep, or raises InputError."""
    if monitored.is_monitored(history):
        way_out = "ncjax.Monitor wrote it, of a model of another kind; `ncjax show` and `plot` read"
        raise InputError("history", str(path), f"{way_out} it; choose another WORKDIR")
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
    """Returns the content of a file, or raises InputError if it has a checksum that differs."""
    while True:
        content = path.read_bytes()
        sums = _sums(path).read_bytes() if _sums(path).exists() else None
        if sums is None or _sha256(content).encode() in sums.split():
            return content
        if path.read_bytes() == content:  # no run has replaced it and its checksum in between
            way_out = (
                f"does not match {_sums(path).name}: one of them was changed or damaged; restore "
                "it, or train anew"
            )
            raise InputError("history", str(path), f"{way_out} in another WORKDIR")


def _renewed(history: xr.Dataset) -> xr.Dataset:
    """Gives a history that an older version has written the variables of this one.

    Metrics that the version did not have are NaN. `nc3_floor` used to be the nc3 of a symmetric
    solution, as the definition stored with the variable says. The true floor follows from other
    variables of such a history: 1 - nc3/2 = (1 - nc3_centered/2) ||P W_L||_F/||W_L||_F.
    """
    if not set(_LASTING) <= set(history):  # it is damaged, as will be said of it
        return history
    floor, symmetric = VOCABULARY["nc3_floor"], VOCABULARY["symmetric_nc3"]
    if (
        "nc3_floor" in history
        and history["nc3_floor"].attrs.get("definition") == symmetric.definition
    ):
        history = history.rename(nc3_floor="symmetric_nc3")
        duality, centred = (
            history[name].sel(split="train", drop=True) for name in ("nc3", "nc3_centered")
        )
        share = ((2 - duality.astype(np.float64)) / (2 - centred.astype(np.float64))).clip(max=1)
        restored = (2 - 2 * share).astype(duality.dtype).assign_attrs(floor.attributes)
        history = history.assign(nc3_floor=restored)
    return history.assign(_unknown(history))


def _unknown(history: xr.Dataset) -> dict[str, xr.DataArray]:
    """Returns the variables that a history lacks, each NaN, and marked up to which epoch."""
    mark = {UNKNOWN_UNTIL: int(history["epoch"].values[-1])}
    alike = xr.full_like(history["finite"], np.nan, dtype=history["nc1"].dtype)
    lacking = {name: metric for name, metric in VOCABULARY.items() if name not in history}
    unknown = {}
    for name, metric in lacking.items():
        sizes = {dim: history.sizes[dim] for dim in metric.dims}
        values = alike.expand_dims(sizes).transpose(..., *metric.dims)
        unknown[name] = values.assign_attrs(metric.attributes | mark)
    return unknown
