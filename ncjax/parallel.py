"""Where runs live: one mesh axis, `run`, over the devices; runs padded to fill it."""

import contextlib
import os
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")


def use_every_core() -> None:
    """Makes each CPU core a JAX device of its own, unless JAX_NUM_CPU_DEVICES says otherwise.

    Runs never wait for each other, so a core per group of runs beats all cores on one small matmul
    (docs/performance.md). Has an effect only before JAX's first computation.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices it has
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def run_mesh(num_runs: int) -> Mesh:
    """The fewest devices that still finish first: no device could be spared without another taking a run more."""
    available = jax.device_count()
    runs_per_device = -(-num_runs // available)
    devices = -(-num_runs // runs_per_device)
    return jax.make_mesh((devices,), ("run",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def padded(num_runs: int, mesh: Mesh) -> int:
    """The number of runs, filled up to a multiple of the `run` axis."""
    return -(-num_runs // mesh.shape["run"]) * mesh.shape["run"]


def pad_runs(tree: T, mesh: Mesh) -> T:
    """Repeats the last run of every (R, ...) leaf up to `padded(R)`, and shards the result over the mesh."""

    def pad(leaf: jax.Array) -> jax.Array:
        missing = padded(len(leaf), mesh) - len(leaf)
        return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)]) if missing else leaf

    return jax.device_put(jax.tree.map(pad, tree), NamedSharding(mesh, PartitionSpec("run")))


def drop_padding(tree: T, num_runs: int) -> T:
    """Inverse of `pad_runs` on (padded, ...) leaves; those already of length R are returned as they are."""
    return jax.tree.map(lambda leaf: leaf if len(leaf) == num_runs else leaf[:num_runs], tree)


def replicate(tree: T, mesh: Mesh) -> T:
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def group_sizes(runs_per_device: int, platform: str, convolves: bool) -> tuple[int, int]:
    """Runs that (train, are measured) side by side on one device; the groups follow one another.

    An accelerator takes all at once. A CPU core trains two to four, which turns a layer into one batched matmul and
    still keeps the weights in cache, and measures one, whose batches are larger; of convolutional networks it trains
    one too, whose patches fill the cache (docs/performance.md).
    """
    if platform != "cpu":
        return runs_per_device, runs_per_device
    if convolves:
        return 1, 1
    return next((g for g in (2, 3, 4) if runs_per_device % g == 0), runs_per_device), 1
