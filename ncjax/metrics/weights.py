"""Computes on the host what the weights of a network alone say of its layers.

NumPy's LAPACK does it, which cannot be used inside the compiled program, see `linalg`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from ncjax.metrics import geometry
from ncjax.metrics.blas import one_thread
from ncjax.metrics.vocabulary import RANK_SHARE


@one_thread
def measure(
    kernels: Sequence[Float[np.ndarray, "R ..."]], following: Sequence[int | None]
) -> dict[str, Float[np.ndarray, "R L"]]:
    """Returns ranks, condition and imbalance of the L layers of R runs; NaN where weights are not
    finite.

    Args:
      kernels: the weights of every layer, inputs before outputs as in Flax.
      following: for every layer the index of the one that takes its output, as it is or after a
        ReLU; None if there is none, and its imbalance is NaN.
    """
    # A thread for each core measures its share of the runs: over several matrices, not over one,
    # NumPy's LAPACK lets go of Python's lock.
    cores = min(os.cpu_count() or 1, len(kernels[0]))
    shares = zip(*(np.array_split(kernel, cores) for kernel in kernels), strict=True)
    with ThreadPoolExecutor(cores) as pool:
        found = list(pool.map(lambda share: _measure_share(share, following), shares))
    return {name: np.concatenate([share[name] for share in found]) for name in found[0]}


def _measure_share(
    kernels: Sequence[Float[np.ndarray, "R ..."]], following: Sequence[int | None]
) -> dict[str, Float[np.ndarray, "R L"]]:
    matrices = [
        kernel.astype(np.float64).reshape(len(kernel), -1, kernel.shape[-1]) for kernel in kernels
    ]
    layers = [
        _measure_layer(one, None if index is None else matrices[index])
        for one, index in zip(matrices, following, strict=True)
    ]
    return {name: np.stack([layer[name] for layer in layers], axis=1) for name in layers[0]}


def _measure_layer(
    matrices: Float[np.ndarray, "R n m"], above: Float[np.ndarray, "R k l"] | None
) -> dict[str, Float[np.ndarray, " R"]]:
    spectra = singular_values(matrices)
    counted = np.sum(spectra > RANK_SHARE * spectra[:, :1], axis=1)
    return {
        "layer_rank": np.where(np.isfinite(spectra[:, 0]), counted, np.nan),
        "layer_effective_rank": geometry.effective_rank(spectra),
        "layer_condition": geometry.condition_number(spectra),
        "layer_imbalance": np.full(len(matrices), np.nan)
        if above is None
        else imbalance(matrices, above),
    }


def imbalance(
    below: Float[np.ndarray, "R n out"], above: Float[np.ndarray, "R k next_out"]
) -> Float[np.ndarray, " R"]:
    """Returns ||W_{k+1}^T W_{k+1} - W_k W_k^T||_F.

    Where nothing stands between the two layers, gradient flow with weight decay lambda shrinks the
    difference as exp(-2 lambda t), whatever it begins at; after a ReLU its diagonal alone.

    Args:
      below: W_k^T.
      above: W_{k+1}^T. If it takes the outputs of a convolution at several positions, they are
        ordered by position, and W_{k+1}^T W_{k+1} is summed over these.

    References:
      Du, Hu & Lee, "Algorithmic regularization in learning deep homogeneous models: layers are
      automatically balanced", NeurIPS 2018; Jacot et al., "Wide neural networks trained with weight
      decay provably exhibit neural collapse", ICLR 2025.
    """
    runs, _, width = below.shape
    by_position = above.reshape(runs, -1, width, above.shape[-1])
    by_channel = by_position.swapaxes(1, 2).reshape(runs, width, -1)
    difference = by_channel @ by_channel.mT - below.mT @ below
    return np.linalg.norm(difference, axis=(1, 2))


def singular_values(matrices: Float[np.ndarray, "R n m"]) -> Float[np.ndarray, "R k"]:
    """Returns the singular values, descending; NaN of a matrix that is not finite."""
    is_finite = np.isfinite(matrices).all(axis=(1, 2), keepdims=True)
    values = np.linalg.svd(np.where(is_finite, matrices, 0), compute_uv=False)
    return np.where(np.reshape(is_finite, (-1, 1)), values, np.nan)
