"""Names of files and folders that a user gives, and folders made for them."""

import importlib.util
import os
import sys
from pathlib import Path

from ncjax.errors import InputError, last_line

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
    except TypeError as error:
        raise InputError(field, path, "give a path, as text or a pathlib.Path") from error
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


def check_importable(path: str) -> None:
    """Raises InputError where the module of an import path, `package.module:Class`, is not there.

    The current folder is looked in first, as by `python -m`.
    """
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())
    module = path.partition(":")[0]
    if module in sys.modules:
        return
    missing = module
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        found, missing = None, error.name
    except Exception as error:  # its package is the user's: anything may be wrong in it
        reason = f"{type(error).__name__}: {last_line(error)}"
        way_out = f"importing its package failed ({reason}); correct it"
        raise InputError("config.model.network", path, way_out) from error
    if found is None:
        way_out = (
            f"there is no module {missing}; start in the folder that holds it, or put that on "
            "PYTHONPATH"
        )
        raise InputError("config.model.network", path, way_out)
