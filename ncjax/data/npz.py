"""Reads a data set from a .npz of train_images, train_labels, test_images and test_labels."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ncjax.data.dataset import Dataset
from ncjax.errors import InputError, last_line

_NEEDED = ("train_images", "train_labels")
_KNOWN = (*_NEEDED, "test_images", "test_labels", "label_names")


def read(path: Path) -> Dataset:
    """Returns the data set of a .npz; `label_names` may be in it, and the test split need not be.

    Raises:
      InputError: no such file, not a .npz, damaged; an array is missing, unknown or cannot be
        used.
    """
    try:
        # Of a damaged file that it has opened itself, NumPy does not let go.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    except OSError as error:
        reason = error.strerror or last_line(error)
        raise InputError("config.data.name", str(path), f"cannot be read ({reason})") from error
    except MemoryError:
        raise
    except Exception as error:  # of zipfile, zlib, tokenize, ...
        way_out = f"it is damaged, or holds Python objects ({last_line(error)}); save it anew"
        raise InputError("config.data.name", str(path), way_out) from error
    if missing := [name for name in _NEEDED if name not in arrays]:
        found = ", ".join(arrays) or "nothing"
        way_out = f"it lacks {missing[0]}: it holds {found}, and a data set {', '.join(_KNOWN)}"
        raise InputError("config.data.name", str(path), f"{way_out}; rename the arrays")
    if unknown := sorted(arrays.keys() - set(_KNOWN)):
        way_out = f"it holds {unknown[0]}, which is none of {', '.join(_KNOWN)}"
        raise InputError("config.data.name", str(path), f"{way_out}; rename or remove it")
    if "label_names" in arrays:
        arrays["label_names"] = arrays["label_names"].ravel().astype(str).tolist()
    try:
        dataset = Dataset.from_arrays(**arrays)
    except InputError as error:
        raise InputError("config.data.name", str(path), str(error)) from error
    return dataclasses.replace(dataset, name=str(path))
