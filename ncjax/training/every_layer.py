"""Measures every layer of a network, where `log.layers` asks for it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ncjax.metrics import weights
from ncjax.training.layers import Structure
from ncjax.training.wiring import Wiring


def weight_metrics(
    params: Mapping[str, Any], finite: np.ndarray, structure: Structure, wiring: Wiring
) -> dict[str, np.ndarray]:
    """Returns ranks, condition and imbalance of the layers of R runs, each (R, L), on the host.

    Args:
      params: the parameters, NumPy arrays of the shapes (R, ...).
      finite: the metric of this name: where it is 0, all others are NaN.
    """
    pairs = zip(wiring.following, wiring.between, strict=True)
    following = [None if between == "other" else index for index, between in pairs]
    measured = weights.measure([layer.of(params) for layer in structure.layers], [*following, None])
    is_finite = finite[:, None] == 1
    return {
        name: np.where(is_finite, values, np.nan).astype(finite.dtype)
        for name, values in measured.items()
    }
