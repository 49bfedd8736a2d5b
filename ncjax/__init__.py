"""Neural collapse and weight decay: sweeps trained and measured in one compiled JAX program."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncjax.api import train
    from ncjax.errors import InputError
    from ncjax.features import measure
    from ncjax.runs.load import load_run

__all__ = ["InputError", "load_run", "measure", "train"]
__version__ = "0.1.0"

# Where public names are defined. They are imported when they are first used: a command line must
# not wait for JAX.
_HOMES = {
    "InputError": "ncjax.errors",
    "load_run": "ncjax.runs.load",
    "measure": "ncjax.features",
    "train": "ncjax.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    try:
        value = getattr(home, name)
    except AttributeError:
        value = importlib.import_module(f"{_HOMES[name]}.{name}")  # a module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
