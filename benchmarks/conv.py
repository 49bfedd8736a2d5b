"""Ways to convolve in a sweep, in our own training program: which is fast, and how far from
PyTorch.

    pip install -e ".[bench]"
    python -m benchmarks.conv             # docs/performance.md quotes it
    python -m benchmarks.conv --quick     # two rounds, without what is slow: does it still work?

The network of Rangamani & Banburski (ICASSP 2022), 32x32x3-32-64-128-256-10, batches of 128, 8
runs; without and with batch normalization. Ways to convolve reach the same weights, which is
asserted. Samples/s are over all runs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from benchmarks import floor, rivals, sweep
from benchmarks.machine import Watch
from benchmarks.networks import NETWORKS, Network
from benchmarks.noise import noise
from ncjax.training import conv, layers, parallel
from ncjax.training import program as train

NETWORK = NETWORKS["32x32x3-32-64-128-256-10"]
RUNS = 8
SLOW_EXAMPLES = 256  # two steps of each run: what is slow takes 20 seconds for them


def lax_conv(x, kernel, strides, padding, **_):
    """Grouped where vmap adds runs."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def taps(x, kernel, strides, padding, **_):
    """A matmul for each of the nine places of the window, added up: no patches are stored."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = kernel.shape[:2]
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    return sum(
        jnp.dot(x[:, i : i + rows : strides[0], j : j + columns : strides[1]], kernel[i, j])
        for i in range(height)
        for j in range(width)
    )


class Way(NamedTuple):
    convolve: Callable
    side_by_side: int
    examples: int = NETWORK.examples


WAYS = {
    "sliced patches": Way(conv.convolve, 1),
    "sliced patches, 2 runs side by side": Way(conv.convolve, 2),
    "sliced patches, 4 runs side by side": Way(conv.convolve, 4),
    "nine matmuls": Way(taps, 1),
    "nine matmuls, 4 runs side by side": Way(taps, 4),
    "lax.conv": Way(lax_conv, 1, SLOW_EXAMPLES),
    "lax.conv, 4 runs side by side: grouped": Way(lax_conv, 4, SLOW_EXAMPLES),
}


class Sweep:
    """RUNS runs of a network in one program, convolving in some way."""

    def __init__(self, network: Network, way: Way) -> None:
        self.network, self.way = network._replace(examples=way.examples), way
        sweep.compiled.cache_clear()  # it does not know of ways
        self.advance, start, self.data = sweep.compiled(
            self.network, RUNS, way.examples, network.batch
        )
        self.states, self.keys, self.hyper = start()
        self(0)

    def __call__(self, epochs: int) -> None:
        groups = (self.way.side_by_side, 1)
        with (
            mock.patch.object(conv, "convolve", self.way.convolve),
            mock.patch.object(parallel, "group_sizes", return_value=groups),
        ):
            self.states, _ = self.advance(
                self.states, self.keys, self.hyper, self.data, epochs, False
            )
        jax.block_until_ready(self.states)


def call_per_step(network: Network) -> Callable[[int], None]:
    """lax.conv outside of any loop: a compiled step of one run, called from Python, one run
    after another.
    """
    with mock.patch.object(conv, "convolve", lax_conv):
        mesh = parallel.make_mesh(1)
        structure = layers.find(network.model, network.image, "none", "float32")
        recipe = train.Recipe(
            network.model, structure, "none", "constant", network.batch, 1, network.examples
        )
        data = train.place_data(
            noise(network.image, network.examples, network.batch), mesh, "float32"
        )
        columns: dict[str, Any] = {
            "weight_decay": [1e-3],
            "learning_rate": [0.01],
            "momentum": [0.9],
        }
        states, _, hyper = train.start(
            recipe, mesh, columns | {"init_scale": [1.0], "seed": [0]}, data
        )
        state, hyper = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (states, hyper))
        step = jax.jit(
            lambda state, index, hyper, data: train.train_step(
                state, index, jax.random.key(0), hyper, data, recipe
            ),
            donate_argnums=0,
        )
        order = np.arange(network.samples_per_epoch, dtype=np.int32).reshape(-1, network.batch)
        state = step(state, order[0], hyper, data)

    def run(epochs: int) -> None:
        nonlocal state
        for _ in range(epochs * RUNS):
            for index in order:
                state = step(state, index, hyper, data)
        jax.block_until_ready(state)

    return run


def check_same_weights(network: Network) -> None:
    """Asserts that every way to convolve ends two steps at the same weights."""
    ends = []
    for convolve in (lax_conv, conv.convolve, taps):
        program = Sweep(network, Way(convolve, 1, SLOW_EXAMPLES))
        program(1)
        ends.append(jax.device_get(program.states.params))
    for other in ends[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ends[0], other
        )


def rates(contender: Callable[[int], None], network: Network, repeats: int) -> list[float]:
    """Samples/s of each round, over all runs."""
    epochs = max(1, round(network.samples / (RUNS * network.samples_per_epoch)))
    samples = RUNS * epochs * network.samples_per_epoch
    return [samples / rivals.seconds(contender, epochs) for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds, without what is slow")
    quick = parser.parse_args().quick
    parallel.use_every_core()
    watch = Watch(concludes=not quick)
    matmul = [floor.matmul_rates()]
    if not quick:
        check_same_weights(NETWORK)
    found: dict[tuple[str, str], list[float]] = {}
    for title, network in (("none", NETWORK), ("batch", NETWORK._replace(batch_norm=True))):
        ways = {
            n: w
            for n, w in WAYS.items()
            if w.examples == NETWORK.examples or not (quick or network.batch_norm)
        }
        for name, way in ways.items():
            print(f"normalization {title}: {name} ...", file=sys.stderr)
            slow = way.examples == SLOW_EXAMPLES
            measured = network._replace(
                examples=way.examples, samples=1 if slow else network.samples
            )
            found[title, name] = rates(
                Sweep(network, way), measured, 1 if slow else 2 if quick else 5
            )
        if not quick:
            few = network._replace(examples=SLOW_EXAMPLES, samples=1)
            found[title, "lax.conv, a call per step of one run"] = rates(call_per_step(few), few, 1)
        variant, _ = rivals.best_variant(network, list(rivals.VARIANTS)[: 1 if quick else None])
        loop = rivals.TorchLoop(network, *rivals.VARIANTS[variant])
        loop(1)
        pytorch = rates(lambda epochs, loop=loop: loop(epochs * RUNS), network, 2 if quick else 5)
        found[title, f"PyTorch, one run at a time ({variant})"] = pytorch
        matmul.append(floor.matmul_rates())
    show(found, {library: max(each[library] for each in matmul) for library in matmul[0]})
    watch.conclude()


def show(found: dict[tuple[str, str], list[float]], matmul: dict[str, float]) -> None:
    title = (
        f"8 runs; float32 matmul of 2048: JAX {matmul['jax']:.0f}, PyTorch {matmul['torch']:.0f} "
        "GFLOP/s"
    )
    table = Table(title=title)
    for column in (
        "normalization",
        "way to convolve",
        "samples/s",
        "min-max",
        "GFLOP/s",
        "of matmul",
        "of PyTorch",
    ):
        table.add_column(
            column, justify="left" if "n" in column[:2] or column[0] == "w" else "right"
        )
    for (normalization, name), rounds in found.items():
        median, is_torch = statistics.median(rounds), name.startswith("PyTorch")
        rival = next(
            statistics.median(r)
            for (n, c), r in found.items()
            if n == normalization and c[:2] == "Py"
        )
        gflops = median * NETWORK.flops / 1e9
        table.add_row(
            normalization,
            name,
            f"{median:,.0f}",
            f"{min(rounds):,.0f}-{max(rounds):,.0f}",
            f"{gflops:.1f}",
            f"{gflops / matmul['torch' if is_torch else 'jax']:.0%}",
            "" if is_torch else f"{median / rival:.3f}x",
            end_section=is_torch,
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
