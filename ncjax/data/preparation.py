"""Prepares a data set for training: balance, size, colour, border, and the statistics that
normalize it.

No JAX here: a wrong name or size must be reported at once.
"""

import zlib
from typing import NamedTuple

import numpy as np

from ncjax.config import DataConfig, parse_classes
from ncjax.data import images, sources
from ncjax.data.dataset import Dataset, Split
from ncjax.errors import InputError

# Images that statistics are computed of at once.
_CHUNK = 4096


class PreparedDataset(NamedTuple):
    """Holds both splits, class after class, and the statistics of the training split that
    normalize both.

    The network's input is `(images - center) * scale`, float64: center has the shape of one image,
    scale too or it is one number.
    """

    train: Split
    test: Split
    center: np.ndarray
    scale: np.ndarray
    label_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def class_sizes(self) -> tuple[int, ...]:
        """The number of training examples of every class."""
        return tuple(np.bincount(self.train.labels, minlength=self.num_classes).tolist())

    @property
    def is_balanced(self) -> bool:
        """Returns whether all classes have as many training examples."""
        return len(set(self.class_sizes)) == 1


def load(settings: DataConfig, given: Dataset | None = None) -> PreparedDataset:
    """Returns the data that a config's `data` section describes, prepared for training.

    Deterministic: the same settings give the same arrays. Of each class the first examples in the
    set's order are taken. The test split has as many of every class, and shrinks by the factor of
    the largest training class, so that measuring it stays cheap beside training.

    Args:
      settings: of the data; `name` is not looked for where a data set is given.
      given: arrays from Python.

    Raises:
      InputError: unknown or unprepared set, per_class beyond the smallest class, num_classes where
        the set decides, a class without examples, pad below the size of the images, size or color
        of what are no images.
    """
    if given is not None:
        sources.check_decides(settings)
    dataset = sources.read(settings) if given is None else given
    chosen = _choose(dataset, settings)
    _check_memory(chosen, settings)
    train, test = (_shaped(split, settings) for split in chosen)
    if settings.name == "identity":
        center, scale = np.zeros(train.images.shape[1:]), np.array(1.0)
    else:
        center, scale = _statistics(train.images, settings.input_scale, settings.standardize)
    return PreparedDataset(train, test, center, scale, dataset.label_names)


def checksums(dataset: PreparedDataset) -> dict[str, int]:
    """Returns a CRC-32 of each array that is trained on or measured: `train_images`,
    `train_labels`, `test_images`, ...

    They tell one data set from another, shapes and dtypes included, and cost a second per 2 GB.
    """
    splits = {"train": dataset.train, "test": dataset.test}
    return {
        f"{name}_{part}": _crc(array)
        for name, split in splits.items()
        for part, array in split._asdict().items()
    }


def _crc(array: np.ndarray) -> int:
    array = np.ascontiguousarray(array)
    return zlib.crc32(
        array.view(np.uint8).data, zlib.crc32(f"{array.dtype.str}{array.shape}".encode())
    )


def _choose(dataset: Dataset, settings: DataConfig) -> tuple[Split, Split]:
    """Returns the examples that are trained on, as many of each class as `settings.classes` says,
    and a test split of as many of every class.
    """
    if len(dataset.label_names) < 2:
        raise InputError("config.data.name", dataset.name, "it has one class; two are needed")
    train, test = _splits(dataset, settings.test_fraction)
    available = _counts(dataset, train, "training")
    sizes = _class_sizes(settings, available)
    test_available = int(_counts(dataset, test, "test").min())
    share = min(1.0, int(sizes.max()) / int(available.min()))
    test_size = max(1, round(test_available * share))
    return _first_of_each_class(train, sizes), _first_of_each_class(
        test, np.full(len(sizes), test_size)
    )


def _class_sizes(settings: DataConfig, available: np.ndarray) -> np.ndarray:
    """Returns how many training examples each class gets, of those that there are.

    Profiles after Cui et al. (CVPR 2019; exponential) and Buda et al. (Neural Networks 2018; step).
    """
    profile, most = parse_classes(settings.classes), settings.per_class
    assert profile is not None  # `config.validate` has seen to it
    if profile.kind == "natural":
        return np.minimum(available, most) if most else available
    num_classes = len(available)
    if profile.kind == "step" and profile.minority >= num_classes:
        way_out = f"there are {num_classes} classes, of which one must keep its size"
        raise InputError("config.data.classes", settings.classes, way_out)
    shares = np.ones(num_classes)
    if profile.kind == "exponential":
        shares = profile.ratio ** (-np.arange(num_classes) / (num_classes - 1))
    elif profile.kind == "step":
        shares[-(profile.minority or num_classes // 2) :] = 1 / profile.ratio
    # What rounding leaves below an integer counts as that integer.
    largest = int(np.min(available / shares) + 1e-9)
    if most > largest:
        limit = int(np.argmin(available / shares))
        words = "the smallest class" if profile.ratio == 1 else f"class {limit}"
        way_out = f"{words} has {available[limit]} training examples"
        if profile.ratio > 1:
            way_out += f"; take at most {largest}"
        raise InputError("config.data.per_class", most, way_out)
    sizes = np.floor((most or largest) * shares + 1e-9).astype(np.int64)
    if not sizes.all():
        way_out = f"of {most or largest} examples the smallest class would have none"
        raise InputError("config.data.classes", settings.classes, f"{way_out}; take a smaller R")
    return sizes


def _splits(dataset: Dataset, test_fraction: float) -> tuple[Split, Split]:
    """Returns training and test splits; the latter is held out where a set has none."""
    if dataset.test is None:
        return _hold_out(dataset.train, test_fraction or 1 / 6)
    if test_fraction:
        way_out = "leave it 0: the set has a test split"
        raise InputError("config.data.test_fraction", test_fraction, way_out)
    return dataset.train, dataset.test


def _hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """Returns training and test splits: of each class, evenly spread over the set's order, a
    fraction is test.

    Example i of a class (from 0) is test where floor(i fraction) < floor((i + 1) fraction); of a
    sixth that is every sixth.
    """
    is_test = np.zeros(len(split.labels), bool)
    for label in np.unique(split.labels):
        index = np.flatnonzero(split.labels == label)
        # What rounding leaves below an integer counts as that integer.
        passed = np.floor(np.arange(len(index) + 1) * fraction + 1e-9)
        is_test[index[np.diff(passed) > 0]] = True
    return Split(*(a[~is_test] for a in split)), Split(*(a[is_test] for a in split))


def _counts(dataset: Dataset, split: Split, words: str) -> np.ndarray:
    """Returns the number of examples of every class in a split, or raises InputError where one has
    none.
    """
    counts = np.bincount(split.labels, minlength=len(dataset.label_names))
    if not counts.all():
        name = dataset.label_names[int(np.argmin(counts))]
        way_out = f"its class {name} has no {words} example; add some, or leave the class out"
        raise InputError("config.data.name", dataset.name, way_out)
    return counts


def _first_of_each_class(split: Split, sizes: np.ndarray) -> Split:
    # A stable sort keeps the set's order within each class.
    by_class = np.argsort(split.labels, kind="stable")
    starts = np.searchsorted(split.labels[by_class], np.arange(len(sizes)))
    taken = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    chosen = by_class[np.concatenate(taken)]
    return Split(split.images[chosen], split.labels[chosen])


def _check_memory(splits: tuple[Split, Split], settings: DataConfig) -> None:
    """Raises InputError where images of the side asked for do not fit into memory."""
    train, test = splits
    field, side = ("pad", settings.pad) if settings.pad else ("size", settings.size)
    if not side or train.images.ndim != 4:  # what are no images is refused later
        return
    channels = train.images.shape[-1]
    if settings.color != "own":
        channels = 1 if settings.color == "gray" else 3
    bytes_per_channel = train.images.itemsize * (len(train.labels) + len(test.labels))
    # Statistics are computed in float64.
    bytes_per_channel += 8 * min(_CHUNK, len(train.labels))
    images.check_memory(f"config.data.{field}", side, channels * bytes_per_channel)


def _shaped(split: Split, settings: DataConfig) -> Split:
    """Returns a split whose images have the size, the channels and the border asked for."""
    arrays = split.images
    if settings.size:
        arrays = images.resized(arrays, settings.size)
    arrays = images.in_color(arrays, settings.color)
    return _padded(split._replace(images=arrays), settings.pad)


def _padded(split: Split, side: int) -> Split:
    """Returns images (M, side, side, channels) with a border of zeros.

    The larger half of an odd border is below and to the right.
    """
    shape = split.images.shape[1:]
    if not side:
        return split
    if len(shape) != 3 or max(shape[:2]) > side:
        raise InputError(
            "config.data.pad",
            side,
            f"its examples have shape {shape}; pad images, to their size or more",
        )
    borders = [((side - size) // 2, side - size - (side - size) // 2) for size in shape[:2]]
    return split._replace(images=np.pad(split.images, [(0, 0), *borders, (0, 0)]))


def _statistics(
    images: np.ndarray, input_scale: float, standardize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns center and scale of a `PreparedDataset`, in float64.

    They are computed in chunks: CIFAR-10 in float64 is 1.2 GB.
    """
    chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
    pixel_mean = np.sum([chunk.sum(0, dtype=np.float64) for chunk in chunks], axis=0) / len(images)
    if not np.isfinite(pixel_mean).all():
        raise InputError(
            "config.data.name",
            "images with infinite or undefined pixels",
            "choose a set without them",
        )
    if standardize:
        axes = tuple(range(images.ndim - 1)) if images.ndim > 2 else (0,)
        center = np.broadcast_to(
            pixel_mean.mean(tuple(range(pixel_mean.ndim - 1))), pixel_mean.shape
        )
        squares = np.sum([((chunk - center) ** 2).sum(axes) for chunk in chunks], axis=0)
        spread = np.sqrt(squares / (images.size / images.shape[-1]))
        return np.array(center), np.array(
            np.broadcast_to(1 / np.where(spread > 0, spread, 1), center.shape)
        )
    norms = sum(
        float(np.linalg.norm((chunk - pixel_mean).reshape(len(chunk), -1), axis=1).sum())
        for chunk in chunks
    )
    if not norms:
        raise InputError(
            "config.data.name",
            "a training split of equal images",
            "choose a set whose images differ",
        )
    return pixel_mean, np.array(input_scale * len(images) / norms)
