"""Computes a convolution as one matmul over sliced patches.

The result is that of `lax.conv_general_dilated`. Under `vmap` over runs the latter becomes a
grouped convolution, and on a CPU its gradients inside `scan` are one to two orders of magnitude
slower than a matmul; slices and a batched matmul are not (docs/performance.md). `models.placed`
says which of them a platform takes.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def patches(
    x: Float[Array, "B H W c"],
    window: tuple[int, int],
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
) -> Float[Array, "B h w klc"]:
    """Returns every window of a zero-padded image as one row.

    The pixels of a window are in reading order, and channels vary fastest.
    """
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    (height, width), (down, across) = window, strides
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    slices = [
        x[:, i : i + rows : down, j : j + columns : across]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(slices, axis=-1)


def convolve(
    x: Float[Array, "B H W c"],
    kernel: Float[Array, "k l c d"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    dimension_numbers: lax.ConvDimensionNumbers | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "B h w d"]:
    """Returns y[b, i, j] = sum over k, l, c of x[b, i s + k, j t + l, c] kernel[k, l, c].

    x is padded by zeros, and the strides are (s, t). It is a drop-in for two-dimensional
    convolution in `flax.linen.Conv(conv_general_dilated=convolve)`.

    Args:
      padding: `SAME`, `VALID`, or (before, after) for height and width.
      dimension_numbers: ignored; those of nn.Conv are the layouts in the annotations.

    Raises:
      NotImplementedError: a dilation or a group count other than 1.
    """
    del dimension_numbers
    if {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        raise NotImplementedError("convolve has no dilations and no groups")
    *window, _, out = kernel.shape
    pads = (
        lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
        if isinstance(padding, str)
        else padding
    )
    rows = patches(x, (window[0], window[1]), strides, pads)
    outputs = jnp.dot(
        rows.reshape(-1, rows.shape[-1]), kernel.reshape(-1, out), precision=precision
    )
    return outputs.reshape(*rows.shape[:3], out)
