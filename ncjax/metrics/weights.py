"""Computes on the host what the weights of a network alone say of its layers.

NumPy's LAPACK does it, which cannot be used inside the compiled program, see `linalg`.
"""

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
    # LAPACK lets go of Python's lock.
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda *run: measure_run(run, following), *kernels))
    return {name: np.stack([run[name] for run in runs]) for name in runs[0]}


def measure_run(
    kernels: Sequence[Float[np.ndarray, "..."]], following: Sequence[int | None]
) -> dict[str, Float[np.ndarray, " L"]]:
    """Returns `measure` of one run."""
    matrices = [kernel.astype(np.float64).reshape(-1, kernel.shape[-1]) for kernel in kernels]
    # W W^T of every layer, with W (out, in) as in h -> W h.
    outputs = [matrix.T @ matrix for matrix in matrices]
    spectra = [singular_values(matrix) for matrix in matrices]
    return {
        "layer_rank": np.array([_rank(values) for values in spectra]),
        "layer_effective_rank": np.array([geometry.effective_rank(s) for s in spectra]),
        "layer_condition": np.array([geometry.condition_number(s) for s in spectra]),
        "layer_imbalance": np.array(
            [
                np.nan if above is None else imbalance(product, matrices[above])
                for product, above in zip(outputs, following, strict=True)
            ]
        ),
    }


def imbalance(
    product: Float[np.ndarray, "out out"], above: Float[np.ndarray, "n next_out"]
) -> float:
    """Returns ||W_{k+1}^T W_{k+1} - W_k W_k^T||_F.

    Where nothing stands between the two layers, gradient flow with weight decay lambda shrinks the
    difference as exp(-2 lambda t), whatever it begins at; after a ReLU its diagonal alone.

    Args:
      product: W_k W_k^T.
      above: W_{k+1}^T. If it takes the outputs of a convolution at several positions, they are
        ordered by position, and W_{k+1}^T W_{k+1} is summed over these.

    References:
      Du, Hu & Lee, "Algorithmic regularization in learning deep homogeneous models: layers are
      automatically balanced", NeurIPS 2018; Jacot et al., "Wide neural networks trained with weight
      decay provably exhibit neural collapse", ICLR 2025.
    """
    width = len(product)
    by_channel = above.reshape(-1, width, above.shape[-1]).swapaxes(0, 1).reshape(width, -1)
    return float(np.linalg.norm(by_channel @ by_channel.T - product))


def singular_values(matrix: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " k"]:
    """Returns the singular values, descending; NaN if the matrix is not finite."""
    if not np.isfinite(matrix).all():
        return np.full(min(matrix.shape), np.nan)
    return np.linalg.svd(matrix, compute_uv=False)


def _rank(values: Float[np.ndarray, " k"]) -> float:
    return float(np.sum(values > RANK_SHARE * values[0])) if np.isfinite(values[0]) else np.nan
