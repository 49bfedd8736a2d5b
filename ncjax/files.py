"""Names of files and folders, and files that appear whole or not at all."""

import os
from pathlib import Path

from ncjax.errors import InputError

_FIGURES = {".png", ".pdf", ".svg", ".jpg", ".jpeg", ".eps", ".ps", ".gif", ".tif", ".tiff", ".webp"}


def expand(path: str | Path) -> Path:
    """Replaces a leading ~ or ~user by the home folder. `Path.expanduser` fails where `~name` is no user but a file."""
    return Path(os.path.expanduser(path))


def remove_leftovers(folder: Path) -> None:
    """What a killed process was writing."""
    for scratch in folder.glob(".*.tmp"):
        scratch.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`; a reader, or a crash, sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)  # left over only where writing failed


def make_folder(field: str, folder: Path) -> None:
    """Makes a folder of figures where there is none.

    Raises:
      InputError: it cannot be made, or has the name of one figure.
    """
    if folder.suffix.lower() in _FIGURES and not folder.is_dir():
        raise InputError(field, str(folder), "figures are several; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(field, str(folder), f"{error.strerror}; name a folder") from error
