"""Neural collapse and weight decay: sweeps trained and measured in one compiled JAX program."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncjax.features import measure
    from ncjax.runs.load import load_run

__all__ = ["load_run", "measure"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_run":  # imports JAX, for which a command line must not wait
        from ncjax.runs.load import load_run

        return load_run
    if name == "measure":
        import importlib

        return importlib.import_module("ncjax.features.measure")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
