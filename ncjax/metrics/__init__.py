"""Defines the metrics: their vocabulary, formulas and theory, in functions of arrays alone.

Public are the metrics one by one, imported when asked for: `ncjax.metrics.nc1(features, labels)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncjax.metrics.functions import (
        cdnv,
        etf_error,
        nc1,
        nc1_bound,
        nc1_trace_ratio,
        nc2_bound,
        nc2_equiangular,
        nc2_equinorm,
        nc3,
        nc3_bound,
        nc4,
        nc4_bound,
    )

__all__ = [
    "cdnv",
    "etf_error",
    "nc1",
    "nc1_bound",
    "nc1_trace_ratio",
    "nc2_bound",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc3",
    "nc3_bound",
    "nc4",
    "nc4_bound",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ncjax.metrics import functions

        return getattr(functions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
