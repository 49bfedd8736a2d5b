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


def pooled(features: Any, pool: Pool, channels: int | None = None) -> Any:
    """Returns features (N, p) of arrays or tensors; those of two axes as they are.

    Args:
      channels: the axis that counts p; None: axis 1 of four axes and more, as PyTorch's
        convolutions leave them, the last of three, a sequence of tokens.

    Raises:
      InputError: there is no rule for so many axes, or a function returns no array.
    """
    if features.ndim <= 2:
        return features
    if callable(pool):
        found = pool(features)
        if not hasattr(found, "ndim"):
            raise InputError("pool", type(found).__name__, "the function returns an array (N, p)")
        return found
    if channels is None:
        channels = 1 if features.ndim > 3 else 2
    channels %= features.ndim
    if pool == "flatten":
        return features.reshape(features.shape[0], -1)
    if pool == "mean":
        axes = tuple(axis for axis in range(1, features.ndim) if axis != channels)
        return features.mean(axis=axes)
    if pool == "cls" and features.ndim == 3 and channels == 2:
        return features[:, 0]
    if pool == "cls":
        raise InputError("pool", pool, f"features of {features.ndim} axes have no first token")
    raise InputError("features", tuple(features.shape), _WAYS_OUT)
