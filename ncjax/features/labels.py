"""Reads labels in the forms that people keep them in: integers, bool, a column, one-hot."""

import numbers

import numpy as np

from ncjax.data.dataset import of_one_hot
from ncjax.errors import InputError

_NAMES = "number the classes as the head's rows are, or np.unique(labels, return_inverse=True)[1]"
_MISSING = "every example needs a label; leave it out, or give it a number that is to be ignored"


def as_labels(value: np.ndarray, name: str = "labels") -> np.ndarray:
    """Returns integers, (N,), of labels that are so, bool, a column (N, 1), or one-hot rows.

    Args:
      value: the labels.
      name: what a message calls them.

    Raises:
      InputError: they name classes, are real numbers, or rows that are not one-hot.
    """
    kind = value.dtype.kind
    if kind == "O":
        _check_objects(value, name)
    if kind not in "iubf":
        raise InputError(name, str(value.dtype), f"give integers, 0 to C - 1: {_NAMES}")
    if value.ndim == 2 and value.shape[1] > 1:
        return of_one_hot(value, name)
    if kind == "f":
        if (lacking := np.isnan(value)).any():
            raise InputError(name, f"NaN in example {int(np.argmax(lacking))}", _MISSING)
        whole = bool(np.all(np.mod(value, 1) == 0))
        way_out = "labels.astype(int)" if whole else "probabilities and scores name no class"
        raise InputError(name, str(value.dtype), f"give integers, 0 to C - 1; {way_out}")
    if kind == "b":
        value = value.astype(np.int8)
    return value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value


def _check_objects(values: np.ndarray, name: str) -> None:
    """Raises InputError for Python objects that are no names of classes."""
    whole = (numbers.Integral, np.bool_)
    for place, value in enumerate(values.flat):
        if value is None or value != value:  # NaN differs from itself
            raise InputError(name, f"{value} in example {place}", _MISSING)
        if not isinstance(value, (str, *whole)):
            shown = f"a {type(value).__name__} in example {place}"
            raise InputError(name, shown, "give an integer for each, 0 to C - 1")
    if all(isinstance(value, whole) for value in values.flat):
        raise InputError(name, "integers as Python objects", "labels.astype(int)")
