"""Brings PyTorch's tensors to the host; who has a tensor has imported PyTorch already."""

import sys
from typing import Any

import numpy as np


def on_host(tensor: Any) -> np.ndarray:
    """Returns a tensor's numbers as NumPy's; those of bfloat16 in float32, which holds them."""
    tensor = tensor.detach().to("cpu")
    return (tensor.float() if tensor.dtype == sys.modules["torch"].bfloat16 else tensor).numpy()
