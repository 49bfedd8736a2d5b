"""Neural collapse and weight decay: sweeps trained and measured in one compiled JAX program."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncjax import metrics
    from ncjax.errors import InputError
    from ncjax.features.measure import measure, measure_batches
    from ncjax.features.result import Measurement
    from ncjax.runs.load import load_run

__version__ = "0.1.0"

# Where each public name lies. They are imported when asked for: JAX takes seconds, for which a
# command line, or a reader of --help, must not wait.
_PUBLIC = {
    "InputError": "ncjax.errors",
    "Measurement": "ncjax.features.result",
    "load_run": "ncjax.runs.load",
    "measure": "ncjax.features.measure",
    "measure_batches": "ncjax.features.measure",
    "metrics": "",
}
__all__ = ["InputError", "Measurement", "load_run", "measure", "measure_batches", "metrics"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _PUBLIC[name]:
        return importlib.import_module(f"ncjax.{name}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
