"""Pools features of images and sequences to one vector per example, by a named rule."""

from collections.abc import Callable
from typing import Any, TypeAlias

from ncjax.errors import InputError

# A rule's name, or a function of the features; None refuses what has to be pooled.
Pool: TypeAlias = str | Callable[[Any], Any] | None

POOLS = ("mean", "flatten", "cls")
_WAYS_OUT = (
    "say what makes (N, p) of them: pool is mean (over the positions of N x C x H x W, the tokens "
    "of N x T x p), flatten, cls (the first token), or a function"
)


def check_pool(pool: Pool) -> None:
    """Raises InputError for a rule that there is not."""
    if pool is not None and not callable(pool) and pool not in POOLS:
        raise InputError("pool", pool, f"choose {', '.join(POOLS)}, or give a function")


def pooled(features: Any, pool: Pool) -> Any:
    """Returns features (N, p) of arrays or tensors; those of two axes as they are.

    Four axes and more are (N, C, ...), as PyTorch's convolutions leave them, three are (N, T, p),
    a sequence of tokens.

    Raises:
      InputError: there is no rule for so many axes.
    """
    if features.ndim <= 2:
        return features
    if callable(pool):
        return pool(features)
    if pool == "flatten":
        return features.reshape(features.shape[0], -1)
    if pool == "mean":
        axes = (1,) if features.ndim == 3 else tuple(range(2, features.ndim))
        return features.mean(axis=axes)
    if pool == "cls" and features.ndim == 3:
        return features[:, 0]
    if pool == "cls":
        raise InputError("pool", pool, f"features of {features.ndim} axes have no first token")
    raise InputError("features", tuple(features.shape), _WAYS_OUT)
