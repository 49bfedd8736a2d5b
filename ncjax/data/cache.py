"""Keeps decoded data sets in the user's cache folder, and decodes anew what has changed."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ncjax.data.dataset import Dataset, Split
from ncjax.errors import warn
from ncjax.paths import cache_folder

_NAMES, _CHECKSUMS = "label_names.json", "checksums.json"


def cached(
    name: str, make: Callable[[], Dataset], sources: Mapping[str, list[int]] | None = None
) -> Dataset:
    """Returns decoded data from the cache; decodes where they, or their sources, have changed.

    The folder appears whole or not at all; where none can be written, each run decodes anew.
    """
    root = cache_folder()
    if root is None:
        return make()
    folder = root / "datasets" / name
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
    made = make()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError:
        return made
    try:
        _write(scratch, made, sources)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError:  # disk full, or another process was first
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def _write(folder: Path, dataset: Dataset, sources: Mapping[str, list[int]]) -> None:
    for split in ("train", "test"):
        held = getattr(dataset, split)
        for part, array in held._asdict().items() if held else ():
            np.save(folder / f"{split}_{part}.npy", array)
    (folder / _NAMES).write_text(json.dumps(dataset.label_names))
    content = {**sources, **_file_checksums(folder)}
    (folder / _CHECKSUMS).write_text(json.dumps(content))


def _read(folder: Path, sources: Mapping[str, list[int]]) -> Dataset:
    stored = json.loads((folder / _CHECKSUMS).read_text())
    found = {**sources, **_file_checksums(folder)}
    if changed := sorted(
        part for part in stored.keys() | found.keys() if stored.get(part) != found.get(part)
    ):
        raise ValueError(f"changed: {', '.join(changed)}")
    splits = [
        Split(*(np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in Split._fields))
        for split in ("train", "test")
        if f"{split}_images.npy" in found
    ]
    names = json.loads((folder / _NAMES).read_text())
    return Dataset(splits[0], splits[1] if len(splits) > 1 else None, tuple(names), folder.name)


def _file_checksums(folder: Path) -> dict[str, int]:
    """Returns the CRC-32 of every file but that of the checksums themselves."""
    return {
        path.name: _file_checksum(path)
        for path in sorted(folder.iterdir())
        if path.name != _CHECKSUMS
    }


def _file_checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
