"""A data set as it is given: labelled examples of two splits, checked, and not yet balanced."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ncjax.errors import InputError

# Names of arrays from Python begin with it, so that no file and no TFDS set is meant.
ARRAYS = "arrays:"

_CHANNELS = (1, 3, 4)


class Split(NamedTuple):
    """Holds M examples.

    images (M, ...) are uint8, uint16 or float32, labels (M,) int32 in [0, C).
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """Holds labelled examples to train on, as `ncjax.train(config, workdir, dataset=...)` takes
    them.

    `config.data` says what is done to them before training: how many examples a class has, how
    images are resized and inputs are scaled.

    Attributes:
      train: `images` (N, ...) and `labels` (N,), which count from 0 in the order of `label_names`.
      test: the same of the test split; None: `config.data.test_fraction` of each class is held out.
      label_names: a name per class.
      name: what the run records as `config.data.name`.

    Examples:
      >>> import ncjax
      >>> dataset = ncjax.Dataset.from_arrays([[0.0, 1.0], [2.0, 0.0]], ["no", "yes"], name="toy")
      >>> dataset.label_names, dataset.name, dataset.train.images.shape
      (('no', 'yes'), 'arrays:toy', (2, 2))
    """

    train: Split
    test: Split | None
    label_names: tuple[str, ...]
    name: str

    @classmethod
    def from_arrays(
        cls,
        train_images: Any,
        train_labels: Any,
        test_images: Any = None,
        test_labels: Any = None,
        *,
        label_names: Sequence[str] | None = None,
        name: str = "unnamed",
    ) -> "Dataset":
        """Returns the data set of arrays in memory.

        Args:
          train_images: (N, height, width, channels), (N, height, width) of gray images, or vectors
            (N, d): a NumPy array, or whatever has `__array__` or `__dlpack__` (PyTorch tensors on
            the CPU, JAX arrays, columns of Hugging Face `datasets` in NumPy format), or a list.
            Integers become uint8 or uint16 where these hold them, all else float32.
          train_labels: (N,) integers, booleans or strings, or one-hot rows (N, C). Their sorted
            values, of rows the columns with a 1, are the classes, and their names are kept.
          test_images: the same of the test split; None: there is none.
          test_labels: the same of the test split.
          label_names: names of the classes 0 to C - 1, where labels are these integers.
          name: what a run of these arrays is called; `config.data.name` is `arrays:NAME`.

        Raises:
          InputError: of an argument that cannot be used: lengths that differ, infinite or undefined
            numbers, no example, a test label that no training example has.

        Examples:
          >>> import numpy as np
          >>> import ncjax
          >>> images, labels = np.zeros((6, 8, 8), np.uint8), [5, 5, 5, 7, 7, 7]
          >>> ncjax.Dataset.from_arrays(images, labels).train.labels.tolist()
          [0, 0, 0, 1, 1, 1]
          >>> ncjax.Dataset.from_arrays(images, labels[:4])
          Traceback (most recent call last):
          ncjax.errors.InputError: train_labels: got 4; there are 6 images, and a label each
        """
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InputError("name", name, "name the data set in printable characters")
        if isinstance(label_names, str):
            raise InputError("label_names", label_names, "give a list of names")
        if (test_images is None) != (test_labels is None):
            missing = "test_images" if test_images is None else "test_labels"
            raise InputError(missing, None, "give images and labels of the test split, or neither")
        given = {"train": (train_images, train_labels)}
        if test_images is not None:
            given["test"] = (test_images, test_labels)
        images, labels = {}, {}
        for split, (of_split, labels_of_split) in given.items():
            images[split] = _as_images(f"{split}_images", of_split)
            labels[split] = _as_labels(f"{split}_labels", labels_of_split)
            if len(images[split]) != len(labels[split]):
                way_out = f"there are {len(images[split])} images, and a label each"
                raise InputError(f"{split}_labels", len(labels[split]), way_out)
        if "test" in given:
            _check_alike(images["train"], images["test"])
        names, numbered = _numbered(labels, label_names)
        splits = {split: Split(images[split], numbered[split]) for split in given}
        return cls(splits["train"], splits.get("test"), names, f"{ARRAYS}{name}")


def check_given(dataset: Any) -> None:
    """Raises InputError for arguments of `dataset=` that are neither a `Dataset` nor None."""
    if not isinstance(dataset, Dataset | None):
        way_out = "give ncjax.Dataset.from_arrays(images, labels), or None"
        raise InputError("dataset", f"a {type(dataset).__name__}", way_out)


def _as_array(part: str, values: Any) -> np.ndarray:
    if not hasattr(values, "__array__") and hasattr(values, "__dlpack__"):
        return np.from_dlpack(values)
    try:
        return np.asarray(values)
    except Exception as error:  # a tensor on a device or with a gradient, lists of unequal lengths
        reason = str(error).strip().partition("\n")[0]
        way_out = f"it is no array ({reason}); give NumPy arrays, of images of one shape"
        raise InputError(part, type(values).__name__, way_out) from error


def _as_images(part: str, values: Any) -> np.ndarray:
    """Returns examples (N, d) or (N, height, width, channels) in a type that is trained on."""
    images = _as_array(part, values)
    if images.ndim not in (2, 3, 4) or not images.size:
        way_out = "give (N, height, width, channels), (N, height, width) or vectors (N, d)"
        raise InputError(part, images.shape, way_out)
    if images.ndim == 4 and images.shape[1] in _CHANNELS and images.shape[3] not in _CHANNELS:
        raise InputError(part, images.shape, "channels come last: transpose by (0, 2, 3, 1)")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype.kind == "b":
        return images.astype(np.uint8)
    if images.dtype.kind in "iu":
        least, most = int(images.min()), int(images.max())
        fitting = (t for t in (np.uint8, np.uint16) if least >= 0 and most <= np.iinfo(t).max)
        return images.astype(next(fitting, np.float32), copy=False)
    try:
        # bfloat16 and the like are no floats to NumPy, but become some.
        numbers = images.astype(np.float32, copy=False) if images.dtype.kind in "fV" else None
    except (TypeError, ValueError):
        numbers = None
    if numbers is None:
        raise InputError(part, str(images.dtype), "give real numbers")
    if not np.isfinite(numbers).all():
        first = int(np.flatnonzero(~np.isfinite(numbers).all(tuple(range(1, numbers.ndim))))[0])
        raise InputError(
            part, f"undefined or infinite numbers, first in example {first}", "remove them"
        )
    return numbers


def of_one_hot(rows: np.ndarray, name: str) -> np.ndarray:
    """Returns labels (N,) of one-hot rows (N, C), or raises InputError where a row is none."""
    ones = rows == 1
    if not ((ones | (rows == 0)).all() and (ones.sum(axis=1) == 1).all()):
        way_out = "give one per example; rows that are not one-hot have no class but argmax(1)"
        raise InputError(name, rows.shape, way_out)
    return ones.argmax(axis=1)


def _as_labels(part: str, values: Any) -> np.ndarray:
    """Returns (N,) integers or strings."""
    labels = _as_array(part, values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1] and labels.dtype.kind in "biuf":
        return of_one_hot(labels, part)
    if labels.ndim == 1 and labels.dtype.kind in "OT" and all(isinstance(v, str) for v in labels):
        labels = labels.astype(str)
    if labels.ndim == 1 and labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "backslashreplace")
    if labels.ndim != 1 or labels.dtype.kind not in "biuU":
        way_out = "give (N,) integers or strings, or one-hot rows (N, C)"
        raise InputError(part, f"{labels.dtype} {labels.shape}", way_out)
    return labels.astype(np.int64) if labels.dtype.kind == "b" else labels


def _check_alike(train: np.ndarray, test: np.ndarray) -> None:
    if test.shape[1:] != train.shape[1:]:
        way_out = f"training images are {train.shape[1:]}; test images must be so too"
        raise InputError("test_images", test.shape[1:], way_out)
    if test.dtype != train.dtype:
        way_out = f"training images are {train.dtype}; give both in one type and range"
        raise InputError("test_images", str(test.dtype), way_out)


def _numbered(
    labels: dict[str, np.ndarray], label_names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Returns the names of the classes, and labels that count from 0 in their order."""
    classes = np.unique(labels["train"])
    for split, values in labels.items():
        if (values.dtype.kind == "U") != (classes.dtype.kind == "U"):
            way_out = f"training labels are {classes.dtype}; give both as integers or as strings"
            raise InputError(f"{split}_labels", str(values.dtype), way_out)
        if label_names is None and (foreign := np.setdiff1d(values, classes)).size:
            way_out = "it has no training example; remove its test examples"
            raise InputError(f"{split}_labels", foreign[0].item(), way_out)
    if label_names is None:
        numbered = {split: np.searchsorted(classes, values) for split, values in labels.items()}
        names = tuple(str(label) for label in classes)
    else:
        numbered, names = labels, tuple(str(label) for label in label_names)
        for split, values in labels.items():
            if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= len(names):
                way_out = f"label_names has {len(names)} names; give integers from 0 that index it"
                raise InputError(f"{split}_labels", values[:3].tolist(), way_out)
    return names, {split: values.astype(np.int32) for split, values in numbered.items()}
