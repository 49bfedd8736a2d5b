"""Finds the floor of a training step: FLOPs at the rate of matmuls, bytes at that of memory.

Both rates are measured on all cores at once. That of matmuls is the higher of JAX's and PyTorch's,
so that the floor is the machine's and no library's.
"""

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.machine import CORES, seconds
from benchmarks.networks import Network

# Passes over an array of the parameters' size in one step of SGD with momentum: forward and
# backward read the weights, the gradient is written, the update reads gradient, weights and momenta
# and writes the latter two.
_PASSES, _PASSES_OF_UPDATE = 8, 5
# Passes over an array of a layer's outputs: written, read by the next layer, read again by its
# gradient, and the gradient itself written and read twice.
_PASSES_OF_OUTPUTS = 6


def matmul_rates(size: int = 2048, repeats: int = 10) -> dict[str, float]:
    """Returns GFLOP/s of float32 square matmuls on all cores, the best of `repeats`, by library.

    JAX multiplies on each of its devices at the same time, as a sweep does, PyTorch on all threads
    together.
    """
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    on_jax, on_torch = [jax.device_put(a, d) for d in jax.devices()], torch.from_numpy(a)
    matmul, out = jax.jit(jnp.matmul), torch.empty(size, size)
    torch.set_num_threads(CORES)
    flops = {"jax": 2 * size**3 * len(on_jax), "torch": 2 * size**3}
    calls: dict[str, Callable[[], object]] = {
        "jax": lambda: jax.block_until_ready([matmul(mine, mine) for mine in on_jax]),
        "torch": lambda: torch.matmul(on_torch, on_torch, out=out),
    }
    for call in calls.values():
        call()
    return {
        name: 1e-9 * flops[name] / min(seconds(call) for _ in range(repeats))
        for name, call in calls.items()
    }


def bandwidth(size: int, repeats: int = 5) -> float:
    """Returns GB/s at which all cores together add to an array, each its own share of `size` bytes.

    A working set that fits the caches is read and written faster than memory is.
    """
    numbers = max(size // (2 * 4 * CORES), 256)  # two arrays of float32
    pairs = [(np.ones(numbers, np.float32), np.ones(numbers, np.float32)) for _ in range(CORES)]
    times = max(1, 2**26 // numbers)

    def add(a: np.ndarray, b: np.ndarray) -> None:
        for _ in range(times):
            np.add(a, b, out=a)

    def everywhere() -> None:
        threads = [threading.Thread(target=add, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    moved = 3 * 4 * numbers * times * CORES
    return 1e-9 * moved / min(seconds(everywhere) for _ in range(repeats))


def step_bytes(network: Network) -> int:
    """Returns the bytes that one step of one run must move at least."""
    weights, outputs = _sizes(network)
    return 4 * (_PASSES * weights + _PASSES_OF_OUTPUTS * outputs)


def update_share(network: Network) -> float:
    """Returns the share of `step_bytes` that the update of the weights moves."""
    weights, _ = _sizes(network)
    return 4 * _PASSES_OF_UPDATE * weights / step_bytes(network)


def _sizes(network: Network) -> tuple[int, int]:
    """Returns the numbers of weights, and of outputs of all layers for a batch."""
    layers = list(network.layers())
    outputs = network.batch * sum(layer.outputs for layer in layers)
    return sum(layer.weights for layer in layers), outputs


def samples_per_second(network: Network, gflops: float) -> float:
    """Returns the most samples/s at a rate of matmuls, if none of the memory's work overlaps."""
    weights, outputs = _sizes(network)
    state = 4 * (3 * weights + outputs)
    moving = step_bytes(network) / (1e9 * bandwidth(CORES * state))
    return network.batch / (network.batch * network.flops / (1e9 * gflops) + moving)
