"""Writes metrics.jsonl: one line of strict JSON per measured epoch, with its wall times."""

import contextlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ncjax.metrics.vocabulary import metrics_in
from ncjax.storage.files import write_atomically


def append(
    path: Path, epoch: int, times: dict[str, float | None], metrics: dict[str, np.ndarray]
) -> None:
    with open(path, "a") as file:
        file.write(_line(epoch, times, metrics))
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path, recorded: xr.Dataset | None) -> None:
    """Makes the file hold each epoch of a history once.

    A lost or damaged line is written again without its wall times, which history.nc does not have.
    """
    lines = _lines(path)
    whole = []
    for i in range(0 if recorded is None else recorded.sizes["epoch"]):
        assert recorded is not None
        one = recorded.isel(epoch=i)
        epoch = one["epoch"].item()
        metrics = {
            name: _by_run(one[name], len(metric.dims)) for name, metric in metrics_in(one).items()
        }
        anew = _line(epoch, {"train_seconds": None, "measure_seconds": None}, metrics)
        whole.append(lines[epoch] if epoch in lines and _same_metrics(lines[epoch], anew) else anew)
    write_atomically(path, "".join(whole).encode())


def strict(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None in dicts, lists and scalars."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> dict[int, str]:
    """Returns the undamaged lines by epoch."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = line.decode()
            record = json.loads(text)
            if record.pop("crc32") == _crc32(record):
                found[record["epoch"]] = text + "\n"
    return found


def _crc32(record: dict) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _line(epoch: int, times: dict[str, float | None], metrics: dict[str, np.ndarray]) -> str:
    numbers = {name: values.tolist() for name, values in metrics.items()}
    record = strict({"epoch": epoch, **times, "metrics": numbers})
    return json.dumps(record | {"crc32": _crc32(record)}) + "\n"


def _by_run(values: xr.DataArray, inner: int) -> np.ndarray:
    """Returns one variable of one epoch as (R, ...); its last `inner` dimensions are kept."""
    return values.values.reshape(-1, *values.shape[values.ndim - inner :])


def _same_metrics(line: str, other: str) -> bool:
    mine, theirs = (json.loads(text)["metrics"] for text in (line, other))
    return isinstance(mine, dict) and all(mine.get(name) == value for name, value in theirs.items())
