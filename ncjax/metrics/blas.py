"""Keeps NumPy's linear algebra from competing with XLA for the cores."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import threadpoolctl

T = TypeVar("T")


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def one_thread(function: Callable[..., T]) -> Callable[..., T]:
    """Limits OpenBLAS to one thread inside a function.

    OpenBLAS's threads wait by spinning; beside XLA's, two of them took five to ten times as long as
    one.
    """

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> T:
        with _blas().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited
