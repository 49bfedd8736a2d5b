"""Reads a folder of images, `train/CLASS/*.png|jpg`: classes are the names of folders."""

import zlib
from pathlib import Path

import numpy as np

from ncjax.data import images
from ncjax.data.dataset import Dataset, Split
from ncjax.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg")
# The first of these folders that there is holds the test split.
_HELD_OUT = ("test", "validation", "val")


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder that holds a folder of training images."""
    try:
        return (path / "train").is_dir()
    except (OSError, ValueError):  # too long a name; a null byte
        return False


def read(root: Path, size: int) -> Dataset:
    """Decodes a folder: classes sorted by name (by number, where all are numbers), files too.

    Raises:
      InputError: a class has no image, a file is none, the splits have different classes, or sizes
        differ.
    """
    files = {"train": _files(root / "train")}
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    names = _sorted(files["train"])
    if held_out:
        files["test"] = _files(held_out)
        if foreign := sorted(files["test"].keys() ^ files["train"].keys()):
            way_out = (
                f"{foreign[0]} is in one of train and {held_out.name} alone; it must be in both"
            )
            raise InputError("config.data.name", str(root), way_out)
    # All splits at once: they are of one size, and all gray or none.
    paths = [path for split in files for name in names for path in files[split][name]]
    labels = [
        np.repeat(np.arange(len(names), dtype=np.int32), [len(of_split[name]) for name in names])
        for of_split in files.values()
    ]
    decoded = images.decode(paths, size)
    ends = np.cumsum([len(of_split) for of_split in labels])[:-1]
    splits = [Split(*parts) for parts in zip(np.split(decoded, ends), labels, strict=True)]
    return Dataset(splits[0], splits[1] if held_out else None, tuple(names), str(root))


def state(root: Path) -> list[int]:
    """Returns the number of files, and a checksum of their names, sizes and times of change."""
    lines = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            lines.append(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}")
    return [len(lines), zlib.crc32("\n".join(lines).encode(errors="surrogateescape"))]


def _files(split: Path) -> dict[str, list[Path]]:
    """Returns the image files of every class of a split."""
    classes = {}
    for folder in sorted(split.iterdir()):
        if folder.name.startswith("."):
            continue
        if not folder.is_dir():
            raise InputError("config.data.name", str(folder), "a folder per class stands here")
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        for path in files:
            if path.suffix.lower() not in _SUFFIXES:
                way_out = f"it is none of {', '.join(_SUFFIXES)}; convert or remove it"
                raise InputError("config.data.name", str(path), way_out)
        if not files:
            raise InputError("config.data.name", str(folder), "the class has no image; remove it")
        classes[folder.name] = files
    if not classes:
        raise InputError("config.data.name", str(split), "it holds no folder of a class")
    return classes


def _sorted(names: dict[str, list[Path]]) -> list[str]:
    are_numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers else sorted(names)
