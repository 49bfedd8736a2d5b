"""Names of files and folders that a user gives, and folders made for them."""

import os
from pathlib import Path

from ncjax.errors import InputError

_FIGURES = {
    ".png",
    ".pdf",
    ".svg",
    ".jpg",
    ".jpeg",
    ".eps",
    ".ps",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
}


def expanded(field: str, path: str | Path) -> Path:
    """Returns a path with its ~ written out; raises InputError, which names the field, where that
    is nobody's home.

    A name that begins with ~ and is no user's is that of a file, if there is one.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):
            return Path(path)
        raise InputError(
            field, str(path), "there is no such home; write the folder out, or set HOME"
        ) from error


def cache_folder() -> Path | None:
    """Returns $XDG_CACHE_HOME/ncjax, by default ~/.cache/ncjax; None of a user who has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ncjax"
    except RuntimeError:
        return None


def check_name(field: str, path: Path) -> None:
    """Raises InputError where a path, the current folder included, is no UTF-8: libraries in C++
    take no other.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise InputError(field, str(path), "its name is not UTF-8; choose another") from error


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
