"""Reads labels in the forms that people keep them in: integers, bool, a column, one-hot."""

import numpy as np

from ncjax.errors import InputError

_NAMES = "number the classes as the head's rows are, or np.unique(labels, return_inverse=True)[1]"


def as_labels(value: np.ndarray) -> np.ndarray:
    """Returns integers, (N,), of labels that are so, bool, a column (N, 1), or one-hot rows.

    Raises:
      InputError: they name classes, are real numbers, or rows that are not one-hot.
    """
    kind = value.dtype.kind
    if kind not in "iubf":
        raise InputError("labels", str(value.dtype), f"give integers, 0 to C - 1: {_NAMES}")
    if value.ndim == 2 and value.shape[1] > 1:
        return _of_one_hot(value)
    if kind == "f":
        whole = bool(np.all(np.mod(value, 1) == 0))
        way_out = "labels.astype(int)" if whole else "probabilities and scores name no class"
        raise InputError("labels", str(value.dtype), f"give integers, 0 to C - 1; {way_out}")
    if kind == "b":
        value = value.astype(np.int8)
    return value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value


def _of_one_hot(rows: np.ndarray) -> np.ndarray:
    ones = rows == 1
    if not ((ones | (rows == 0)).all() and (ones.sum(axis=1) == 1).all()):
        way_out = "give one per example; rows that are not one-hot have no class but argmax(1)"
        raise InputError("labels", rows.shape, way_out)
    return ones.argmax(axis=1)
