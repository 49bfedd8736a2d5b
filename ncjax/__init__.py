"""Neural collapse and weight decay: sweeps trained and measured in one compiled JAX program."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncjax import metrics
    from ncjax.api import train
    from ncjax.config import Config
    from ncjax.data.dataset import Dataset
    from ncjax.errors import InputError
    from ncjax.features.measure import measure, measure_batches
    from ncjax.features.model import measure_model
    from ncjax.features.monitor import Monitor
    from ncjax.features.result import LayerMeasurements, Measurement
    from ncjax.runs.load import Run, load_run

__all__ = [
    "Config",
    "Dataset",
    "InputError",
    "LayerMeasurements",
    "Measurement",
    "Monitor",
    "Run",
    "load_run",
    "measure",
    "measure_batches",
    "measure_model",
    "metrics",
    "train",
]
__version__ = "0.1.0"

# Where public names are defined. They are imported when they are first used: a command line must
# not wait for JAX.
_HOMES = {
    "Config": "ncjax.config",
    "Dataset": "ncjax.data.dataset",
    "InputError": "ncjax.errors",
    "LayerMeasurements": "ncjax.features.result",
    "Measurement": "ncjax.features.result",
    "Monitor": "ncjax.features.monitor",
    "Run": "ncjax.runs.load",
    "load_run": "ncjax.runs.load",
    "measure": "ncjax.features.measure",
    "measure_batches": "ncjax.features.measure",
    "measure_model": "ncjax.features.model",
    "train": "ncjax.api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _HOMES:
        return importlib.import_module(f"ncjax.{name}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
