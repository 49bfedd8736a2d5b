"""Sources of data by `config.data.name`: each an entry of `SOURCES`, the one place to add one.

No JAX here: a wrong name or size must be reported at once.
"""

import hashlib
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ncjax.config import DataConfig
from ncjax.data import folder, npz, tfds
from ncjax.data.cache import cached
from ncjax.data.dataset import ARRAYS, Dataset, Split
from ncjax.errors import InputError
from ncjax.paths import expanded

_SYNTHETIC_DIM = 32


class Source(NamedTuple):
    """Reads one kind of data set.

    Attributes:
      owns: returns whether a name is one of this kind.
      read: returns the data set that a config's `data` section names, or raises InputError.
      restore: the way out where a run's data are not found again, or are others.
      is_drawn: whether `num_classes` and `per_class` say how much there is.
    """

    owns: Callable[[str], bool]
    read: Callable[[DataConfig], Dataset]
    restore: str
    is_drawn: bool = False


def find(name: str) -> Source:
    """Returns the source of a data set's name: the first of `SOURCES` that owns it."""
    return next(source for source in SOURCES if source.owns(name))


def read(settings: DataConfig) -> Dataset:
    """Returns the data set that a config's `data` section names, whole and unbalanced.

    Raises:
      InputError: it does not exist, is not prepared or damaged, or `num_classes` is set where the
        set decides.
    """
    source = find(settings.name)
    if settings.num_classes and not source.is_drawn:
        check_decides(settings)
    try:
        return source.read(settings)
    except (MemoryError, OverflowError) as error:
        way_out = "it does not fit into memory"
        raise InputError("config.data.name", settings.name, way_out) from error


def check_decides(settings: DataConfig) -> None:
    """Raises InputError where `num_classes` is set and the data say what it is."""
    if settings.num_classes:
        way_out = f"leave it 0: {settings.name} has its own classes"
        raise InputError("config.data.num_classes", settings.num_classes, way_out)


def _digits(settings: DataConfig) -> Dataset:
    # Cached like the others: importing scikit-learn takes a second.
    return cached(f"digits-{metadata.version('scikit-learn')}", _embedded_digits)


def _embedded_digits() -> Dataset:
    """Returns scikit-learn's 1,797 scans of 8x8 pixels."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    scans = Split(bunch.images[..., None].astype(np.uint8), bunch.target.astype(np.int32))
    return Dataset(scans, None, tuple(map(str, bunch.target_names)), "digits")


def _drawn(settings: DataConfig) -> Dataset:
    """Returns `synthetic` or `identity`, of as many classes and examples as are asked for."""
    make = _synthetic if settings.name == "synthetic" else _identity
    num_classes = settings.num_classes or 10
    try:
        splits = make(num_classes, settings.per_class)
    except (MemoryError, ValueError, OverflowError) as error:
        field = "num_classes" if settings.num_classes > settings.per_class else "per_class"
        value = max(settings.num_classes, settings.per_class)
        raise InputError(f"config.data.{field}", value, "does not fit into memory") from error
    return Dataset(*splits, tuple(map(str, range(num_classes))), settings.name)


def _synthetic(num_classes: int, per_class: int) -> tuple[Split, Split]:
    """Draws Gaussian classes: x = mu_c + z with mu_c and z standard normal in R^32.

    The training and the test split are drawn alike.
    """
    per_class = per_class or 100
    rng = np.random.default_rng(0)
    means = rng.standard_normal((num_classes, _SYNTHETIC_DIM))
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    draws = rng.standard_normal((2, len(labels), _SYNTHETIC_DIM))
    train, test = (Split((means[labels] + z).astype(np.float32), labels) for z in draws)
    return train, test


def _identity(num_classes: int, per_class: int) -> tuple[Split, Split]:
    """Returns x_n = e_n in R^{NC}, five per class by default.

    The first layer is then a free feature per example.
    """
    per_class = per_class or 5
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    split = Split(np.eye(len(labels), dtype=np.float32), labels)
    return split, split


def _arrays(settings: DataConfig) -> Dataset:
    way_out = (
        "these arrays were given from Python; give the same by dataset=..., or to --verify by "
    )
    way_out += "--data FILE.npz"
    raise InputError("config.data.name", settings.name, way_out)


def _npz(settings: DataConfig) -> Dataset:
    return npz.read(expanded("config.data.name", settings.name))


def _folder(settings: DataConfig) -> Dataset:
    root = expanded("config.data.name", settings.name)
    if not folder.is_folder(root):
        raise _no_data_set(settings.name)
    try:
        place, state = _place(root.resolve()), folder.state(root)
        key = f"folder-{place}-{settings.size}"
        return cached(key, lambda: folder.read(root, settings.size), {"files": state})
    except OSError as error:
        raise InputError("config.data.name", settings.name, f"cannot be read ({error})") from error


def _no_data_set(path: str) -> InputError:
    way_out = "no data set is here: name a .npz, or a folder that holds train/CLASS/*.png or *.jpg"
    return InputError("config.data.name", path, way_out)


def _tfds(settings: DataConfig) -> Dataset:
    directory = settings.dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets"
    root = expanded("config.data.dir", directory)
    try:
        home = tfds.find(settings.name, root).resolve()
        states = _states(home)
    except InputError as error:
        if os.path.lexists(settings.name):  # a file, or a folder without images
            raise _no_data_set(settings.name) from error
        raise
    except (OSError, ValueError) as error:  # too long a name; a null byte
        raise InputError("config.data.dir", directory, f"cannot be read ({error})") from error
    name = settings.name.replace("/", "-").replace(":", "-")
    key = f"{name}-{_place(home)}" + (f"-{settings.size}" if settings.size else "")
    return cached(key, lambda: _decode(settings, root, home), states)


def _place(path: Path) -> str:
    return hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:12]


def _states(home: Path) -> dict[str, list[int]]:
    """Returns the size and the time of change of each file that a set is decoded from."""
    states = {path: path.stat() for path in sorted(home.rglob("*")) if path.is_file()}
    return {str(path): [state.st_size, state.st_mtime_ns] for path, state in states.items()}


def _decode(settings: DataConfig, root: Path, home: Path) -> Dataset:
    contents = tfds.read(settings.name, root, home, settings.size)
    train = Split(*contents.train)
    held_out = Split(*contents.held_out) if contents.held_out else None
    if train.labels.max() < 0:
        way_out = "its training split has no labels; choose another"
        raise InputError("config.data.name", settings.name, way_out)
    return _only_present_classes(train, held_out, contents.class_name, settings.name)


def _only_present_classes(
    train: Split, test: Split | None, class_name: Callable[[int], str], name: str
) -> Dataset:
    """Drops unlabelled examples, and classes that have none in training (emnist/letters declares
    37 and has 26).
    """
    present = np.unique(train.labels[train.labels >= 0])

    def keep(split: Split) -> Split:
        kept = np.isin(split.labels, present)
        return Split(
            split.images[kept], np.searchsorted(present, split.labels[kept]).astype(np.int32)
        )

    names = tuple(class_name(int(label)) for label in present)
    return Dataset(keep(train), keep(test) if test else None, names, name)


def _is_named(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


SOURCES = (
    Source(_is_named("digits"), _digits, "install the scikit-learn that it was trained with"),
    Source(_is_named("synthetic", "identity"), _drawn, "use the NumPy of then", is_drawn=True),
    Source(
        lambda name: name.startswith(ARRAYS),
        _arrays,
        "give the arrays that it was trained on by dataset=...",
    ),
    Source(lambda name: name.endswith(".npz"), _npz, "restore the file"),
    Source(
        lambda name: name[0] in "./~" or folder.is_folder(Path(name)),
        _folder,
        "restore the files of the folder",
    ),
    Source(
        lambda name: True,
        _tfds,
        "restore the data set (config.data.dir, TFDS_DATA_DIR and its version decide which it is)",
    ),
)
