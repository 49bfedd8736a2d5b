"""Writes metrics.jsonl: one line of strict JSON per measured epoch, with its wall times."""

import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ncjax.metrics.vocabulary import metrics_in
from ncjax.storage.files import write_atomically

# A line that `append` wrote: the checksum is that of the record without it.
_SEALED = re.compile(
    r'(?P<record>\{"epoch": (?P<epoch>\d{1,18}), .*), "crc32": (?P<crc32>\d{1,10})\}'
)


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
        if epoch in lines and _has_metrics(lines[epoch], metrics):
            whole.append(lines[epoch])
        else:
            unknown: dict[str, float | None] = {"train_seconds": None, "measure_seconds": None}
            whole.append(_line(epoch, unknown, metrics))
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
        text = line.decode(errors="replace")
        sealed = _SEALED.fullmatch(text)
        if sealed and zlib.crc32(f"{sealed['record']}}}".encode()) == int(sealed["crc32"]):
            found[int(sealed["epoch"])] = f"{text}\n"
    return found


def _line(epoch: int, times: dict[str, float | None], metrics: dict[str, np.ndarray]) -> str:
    numbers = {name: _as_lists(values) for name, values in metrics.items()}
    record = json.dumps({"epoch": epoch, **strict(times), "metrics": numbers})
    return f'{record[:-1]}, "crc32": {zlib.crc32(record.encode())}}}\n'


def _as_lists(values: np.ndarray) -> Any:
    """Returns what `strict` makes of `values.tolist()`, without a step of Python for each number:
    thousands of runs have millions.
    """
    finite = np.isfinite(values)
    if finite.all():
        return values.tolist()
    known = values.astype(object)
    known[~finite] = None
    return known.tolist()


def _by_run(values: xr.DataArray, inner: int) -> np.ndarray:
    """Returns one variable of one epoch as (R, ...); its last `inner` dimensions are kept."""
    return values.values.reshape(-1, *values.shape[values.ndim - inner :])


def _has_metrics(line: str, metrics: dict[str, np.ndarray]) -> bool:
    found = json.loads(line)["metrics"]
    return all(found.get(name) == _as_lists(values) for name, values in metrics.items())
