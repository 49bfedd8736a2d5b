"""Loads a data set by name as balanced arrays: digits, synthetic, identity, or one of TFDS.

No JAX here: a wrong name or size must be reported at once.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ncjax.data import tfds
from ncjax.errors import InputError, warn
from ncjax.paths import cache_folder, expanded

_SYNTHETIC_DIM = 32


class Split(NamedTuple):
    """Holds M examples, class after class.

    images (M, ...) are uint8 or float32, labels (M,) int32 in [0, C).
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Holds balanced splits and the statistics of the training split that normalize both.

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


class _Raw(NamedTuple):
    train: Split
    test: Split
    label_names: tuple[str, ...]


def load(
    name: str,
    *,
    directory: str = "",
    per_class: int = 0,
    num_classes: int = 0,
    input_scale: float = 2.0,
    standardize: bool = False,
    pad: int = 0,
) -> Dataset:
    """Loads, balances and measures a data set. Deterministic: the same arguments give the same
    arrays.

    Args:
      name: `digits`, `synthetic`, `identity` or a TFDS name (`mnist`, `emnist/letters`,
        `mnist:3.0.1`).
      directory: where TFDS data sets lie; default `$TFDS_DATA_DIR`, then `~/tensorflow_datasets`.
      per_class: training examples per class, the first in the set's order (synthetic and identity:
        made anew); 0: the size of the smallest class. The test split shrinks by the same factor, so
        that measuring it stays cheap beside the training split.
      num_classes: classes of `synthetic` and `identity`; 0: ten.
      input_scale: mean norm of a training input after centring each pixel.
      standardize: give each channel (last axis) mean 0 and variance 1 instead.
      pad: height and width that images get by a border of zeros; 0: their own.

    Raises:
      InputError: unknown or unprepared set, per_class beyond the smallest class, num_classes where
        the set decides, pad below the size of the images.
    """
    if name in ("synthetic", "identity"):
        make = _synthetic if name == "synthetic" else _identity
        try:
            raw = make(num_classes or 10, per_class)
        except (MemoryError, ValueError, OverflowError) as error:
            field = "num_classes" if num_classes > per_class else "per_class"
            raise InputError(
                f"config.data.{field}", max(num_classes, per_class), "does not fit into memory"
            ) from error
    else:
        if num_classes:
            raise InputError(
                "config.data.num_classes", num_classes, f"leave it 0: {name} has its own classes"
            )
        raw = _embedded_digits() if name == "digits" else _tfds(name, directory)
    train, test = (_padded(split, pad) for split in _balance(raw, per_class))
    if name == "identity":
        center, scale = np.zeros(train.images.shape[1:]), np.array(1.0)
    else:
        center, scale = _statistics(train.images, input_scale, standardize)
    return Dataset(train, test, center, scale, raw.label_names)


def checksums(dataset: Dataset) -> dict[str, int]:
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


def _embedded_digits() -> _Raw:
    # Cached like the others: importing scikit-learn takes a second.
    return _cached(f"digits-{metadata.version('scikit-learn')}", _digits)


def _digits() -> _Raw:
    """Returns scikit-learn's 1,797 scans of 8x8 pixels; every sixth of each class is test."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    split = Split(bunch.images[..., None].astype(np.uint8), bunch.target.astype(np.int32))
    return _Raw(*_hold_out(split), label_names=tuple(map(str, bunch.target_names)))


def _hold_out(split: Split) -> tuple[Split, Split]:
    """Returns training and test splits: of each class, in the set's order, every sixth is test."""
    is_test = np.zeros(len(split.labels), bool)
    for label in np.unique(split.labels):
        is_test[np.flatnonzero(split.labels == label)[5::6]] = True
    return Split(*(a[~is_test] for a in split)), Split(*(a[is_test] for a in split))


def _synthetic(num_classes: int, per_class: int) -> _Raw:
    """Draws Gaussian classes: x = mu_c + z with mu_c and z standard normal in R^32.

    The training and the test split are drawn alike.
    """
    per_class = per_class or 100
    rng = np.random.default_rng(0)
    means = rng.standard_normal((num_classes, _SYNTHETIC_DIM))
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    draws = rng.standard_normal((2, len(labels), _SYNTHETIC_DIM))
    train, test = (Split((means[labels] + z).astype(np.float32), labels) for z in draws)
    return _Raw(train, test, tuple(map(str, range(num_classes))))


def _identity(num_classes: int, per_class: int) -> _Raw:
    """Returns x_n = e_n in R^{NC}, five per class by default.

    The first layer is then a free feature per example.
    """
    per_class = per_class or 5
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    split = Split(np.eye(len(labels), dtype=np.float32), labels)
    return _Raw(split, split, tuple(map(str, range(num_classes))))


def _balance(raw: _Raw, per_class: int) -> tuple[Split, Split]:
    if len(raw.label_names) < 2:
        raise InputError("config.data.name", "a set of one class", "choose one of two or more")
    counts = np.bincount(raw.train.labels, minlength=len(raw.label_names))
    available = int(counts.min())
    if per_class > available:
        raise InputError(
            "config.data.per_class",
            per_class,
            f"the smallest class has {available} training examples",
        )
    test_available = int(np.bincount(raw.test.labels, minlength=len(raw.label_names)).min())
    if not test_available:
        raise InputError(
            "config.data.name",
            "a test split without some class",
            "choose a set whose test split has all",
        )
    per_class = per_class or available
    test_per_class = max(1, round(test_available * per_class / available))
    return _first_of_each_class(raw.train, per_class), _first_of_each_class(
        raw.test, test_per_class
    )


def _first_of_each_class(split: Split, per_class: int) -> Split:
    # A stable sort keeps the set's order within each class.
    by_class = np.argsort(split.labels, kind="stable")
    starts = np.searchsorted(split.labels[by_class], np.arange(split.labels.max() + 1))
    chosen = by_class[(starts[:, None] + np.arange(per_class)).ravel()]
    return Split(split.images[chosen], split.labels[chosen])


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
    """Returns center and scale of `Dataset`, in float64.

    They are computed in chunks: CIFAR-10 in float64 is 1.2 GB.
    """
    chunks = [images[i : i + 4096] for i in range(0, len(images), 4096)]
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


def _tfds(name: str, directory: str) -> _Raw:
    directory = directory or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets"
    root = expanded("config.data.dir", directory)
    try:
        home = tfds.find(name, root).resolve()
        sources = _states(home)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # too long a name; a null byte
        raise InputError("config.data.dir", directory, f"cannot be read ({error})") from error
    place = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    folder = f"{name.replace('/', '-').replace(':', '-')}-{place}"
    return _cached(folder, lambda: _decode(name, root, home), sources)


def _states(home: Path) -> dict[str, list[int]]:
    """Returns the size and the time of change of each file that a set is decoded from."""
    states = {path: path.stat() for path in sorted(home.rglob("*")) if path.is_file()}
    return {str(path): [state.st_size, state.st_mtime_ns] for path, state in states.items()}


def _decode(name: str, root: Path, home: Path) -> _Raw:
    contents = tfds.read(name, root, home)
    train = Split(*contents.train)
    train, test = (train, Split(*contents.held_out)) if contents.held_out else _hold_out(train)
    if train.labels.max() < 0:
        raise InputError(
            "config.data.name", name, "its training split has no labels; choose another"
        )
    return _only_present_classes(train, test, contents.class_name)


def _only_present_classes(train: Split, test: Split, class_name: Callable[[int], str]) -> _Raw:
    """Drops unlabelled examples, and classes that have none in training (emnist/letters declares
    37 and has 26).
    """
    present = np.unique(train.labels[train.labels >= 0])

    def keep(split: Split) -> Split:
        kept = np.isin(split.labels, present)
        return Split(
            split.images[kept], np.searchsorted(present, split.labels[kept]).astype(np.int32)
        )

    return _Raw(keep(train), keep(test), tuple(class_name(int(label)) for label in present))


_PARTS = tuple(f"{split}_{part}.npy" for split in ("train", "test") for part in Split._fields)
_NAMES, _CHECKSUMS = "label_names.json", "checksums.json"


def _cached(
    name: str, make: Callable[[], _Raw], sources: Mapping[str, list[int]] | None = None
) -> _Raw:
    """Returns decoded data from the cache; decodes where they, or their sources, have changed.

    The folder appears whole or not at all; where none can be written, each run decodes anew.
    """
    root = cache_folder()
    if root is None:
        return make()
    folder = root / "data" / name
    sources = sources or {}
    try:
        return _read(folder, sources)
    except (
        OSError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        # The last three: checksums.json is damaged.
        if os.path.isdir(folder):  # unlike Path.is_dir, also where it must not be asked
            warn(f"the decoded data in {folder} are not used ({error}): decoding anew")
    raw = make()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError:
        return raw
    try:
        _write(scratch, raw, sources)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError:  # disk full, or another process was first
        shutil.rmtree(scratch, ignore_errors=True)
    return raw


def _write(folder: Path, raw: _Raw, sources: Mapping[str, list[int]]) -> None:
    for name, array in zip(_PARTS, (*raw.train, *raw.test), strict=True):
        np.save(folder / name, array)
    (folder / _NAMES).write_text(json.dumps(raw.label_names))
    (folder / _CHECKSUMS).write_text(json.dumps({**sources, **_file_checksums(folder)}))


def _read(folder: Path, sources: Mapping[str, list[int]]) -> _Raw:
    stored = json.loads((folder / _CHECKSUMS).read_text())
    found = {**sources, **_file_checksums(folder)}
    if changed := sorted(
        name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name)
    ):
        raise ValueError(f"changed: {', '.join(changed)}")
    arrays = [np.load(folder / name, mmap_mode="r") for name in _PARTS]
    names = json.loads((folder / _NAMES).read_text())
    return _Raw(Split(*arrays[:2]), Split(*arrays[2:]), label_names=tuple(names))


def _file_checksums(folder: Path) -> dict[str, int]:
    return {name: _file_checksum(folder / name) for name in (*_PARTS, _NAMES)}


def _file_checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
