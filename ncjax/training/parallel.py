"""Places runs on a mesh `run` x `data` of devices, and gives each device its share of a batch."""

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from ncjax.errors import InputError, last_line
from ncjax.training.targets import Device

T = TypeVar("T")
# Of arrays that are worked on together, 1 MiB in float64.
_CACHED_NUMBERS = 2**17
# Of features that are kept of both splits, in the memory of an accelerator, and in that of a host.
_HELD_BYTES = {"accelerator": 2**31, "host": 2**30}
RUN, DATA = "run", "data"


def use_every_core() -> None:
    """Makes each CPU core a JAX device of its own, unless JAX_NUM_CPU_DEVICES says otherwise.

    Runs never wait for each other, so a core per group of runs is faster than all cores on one
    small matmul (docs/performance.md). It has an effect only before JAX's first computation.

    Raises:
      InputError: JAX has no device of the kind that it is told to use.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):  # JAX has already started and keeps its devices
            jax.config.update("jax_num_cpu_devices", _cores())
    find_devices()


def find_devices() -> None:
    """Starts JAX, or raises InputError if there is no device of the kind that it is told to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        name = "JAX_PLATFORM_NAME" if "JAX_PLATFORM_NAME" in os.environ else "JAX_PLATFORMS"
        way_out = f"JAX finds no such device ({last_line(error)}); name another, or unset it"
        raise InputError(name, os.environ.get(name), way_out) from error


def _cores() -> int:
    """Returns the number of cores that this process may use, or of all if unknown (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_mesh(
    num_runs: int, run: int = 0, data: int = 1, devices: Sequence[Device] | None = None
) -> Mesh:
    """Returns a mesh of `run` x `data` of these devices; None: of those that JAX has.

    Runs are spread over the first axis, and the batch of each run over the second. `run` = 0
    chooses the fewest devices with which no device has more runs than it would have if all devices
    were used; of TPUs, all. Several processes always use all their devices.

    Raises:
      InputError: there are fewer devices.
    """
    devices, several = devices or jax.devices(), jax.process_count() > 1
    available, kind = len(devices), devices[0].platform
    name = f"{available} {kind} device{'s' * (available > 1)}"
    hint = " (JAX_NUM_CPU_DEVICES simulates more)" if kind == "cpu" else ""
    if data > available:
        raise InputError("config.mesh.data", data, f"there is no more than {name}{hint}")
    most = available // data
    shared = f" with config.mesh.data={data}" if data > 1 else ""
    if run > most:
        raise InputError(
            "config.mesh.run", run, f"there is no more than {name}, so at most {most}{shared}{hint}"
        )
    if not run:
        # A slice of TPUs is routed as a whole: programs for a part of a large one do not compile.
        takes_all = several or kind == "tpu"
        run = most if takes_all else _ceil(num_runs, _ceil(num_runs, most))
    if several and run * data != available:
        way_out = (
            f"several processes use all of their {name}: config.mesh.run x config.mesh.data must "
            f"be {available}"
        )
        raise InputError("config.mesh", (run, data), way_out)
    shape, axes, types = (run, data), (RUN, DATA), (AxisType.Auto,) * 2
    if run * data == available:
        return jax.make_mesh(shape, axes, axis_types=types, devices=devices)
    # jax.make_mesh looks for neighbours, and on a TPU refuses chips that are no rectangle.
    return Mesh(np.reshape(devices[: run * data], shape), axes, axis_types=types)


def platform(mesh: Mesh) -> str:
    """Returns what programs on a mesh are compiled for: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def by_run(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of (padded, ...) leaves over the mesh's `run` axis.

    Devices along the `data` axis hold the same.
    """
    return NamedSharding(mesh, PartitionSpec(RUN))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def padded(num_runs: int, mesh: Mesh) -> int:
    """Returns the number of runs, rounded up to a multiple of the `run` axis."""
    return _ceil(num_runs, mesh.shape[RUN]) * mesh.shape[RUN]


def pad_runs(tree: T, total: int) -> T:
    """Repeats the last run of every (R, ...) NumPy leaf up to `total`."""
    return jax.tree.map(
        lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], total - len(leaf), axis=0)]), tree
    )


def place(tree: T, sharding: NamedSharding) -> T:
    """Places NumPy leaves, which are the same in every process, as arrays of all processes."""

    def put(leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def fetch(tree: T) -> T:
    """Returns the leaves as NumPy arrays, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils  # needed only with several processes

    with jax.enable_x64(True):
        return multihost_utils.process_allgather(tree, tiled=True)


def device_memory(mesh: Mesh) -> int | None:
    """Returns the memory of the smallest device in bytes, or None if devices do not tell (CPUs)."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    smallest = min(s.get("bytes_limit", 0) for s in stats)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        mebibytes = multihost_utils.process_allgather(np.array([smallest >> 20], np.int32))
        smallest = int(mebibytes.min()) << 20
    return smallest or None


class Share(NamedTuple):
    """Describes one device's share of a batch along the `data` axis.

    With more than one device it must be used under shard_map over that axis.

    Attributes:
      devices: the number d of devices along the axis.
    """

    devices: int = 1

    def first(self, rows: int) -> Int[Array, ""] | int:
        """Returns the index of this device's first row, if each device has `rows` of them."""
        return lax.axis_index(DATA) * rows if self.devices > 1 else 0

    def part(
        self, whole: Shaped[Array, "B ..."]
    ) -> tuple[Shaped[Array, "b ..."], Bool[Array, " b"]]:
        """Returns this device's b = ceil(B/d) rows, and a mask that is False for padding.

        Padding repeats the last row.
        """
        if self.devices == 1:
            return whole, jnp.ones(len(whole), bool)
        rows = _ceil(len(whole), self.devices)
        places = self.first(rows) + jnp.arange(rows)
        return whole.at[places].get(mode="clip"), places < len(whole)

    def sum(self, tree: T) -> T:
        """Sums over the devices, with the same bits on each; it is one all-reduce per leaf type."""
        if self.devices == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        for dtype in {leaf.dtype for leaf in leaves}:
            chosen = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
            total = lax.psum(jnp.concatenate([leaves[i].ravel() for i in chosen]), DATA)
            ends = np.cumsum([leaves[i].size for i in chosen])
            for i, part in zip(chosen, jnp.split(total, ends[:-1]), strict=True):
                leaves[i] = part.reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, leaves)


def group_sizes(runs_per_device: int, platform: str, convolves: bool) -> tuple[int, int]:
    """Returns how many runs one device trains at the same time, and how many it measures.

    Groups of runs follow one another. An accelerator takes all runs at once. A CPU core trains two
    to four, which makes each layer one batched matmul and still keeps the weights in cache. It
    measures one, because measurement has larger batches, and trains one convolutional network,
    whose patches fill the cache (docs/performance.md).
    """
    if platform != "cpu":
        return runs_per_device, runs_per_device
    if convolves:
        return 1, 1
    return next((g for g in (2, 3, 4) if runs_per_device % g == 0), runs_per_device), 1


def held_bytes(at_once: int, platform: str) -> int:
    """Returns how many bytes of a split's features each run may keep between the passes of a
    measurement, if a device measures so many runs at once.

    Both splits of all these runs share 2 GiB of an accelerator, or, with the other devices, half as
    much of a CPU's memory.
    """
    splits = 2
    if platform == "cpu":
        return _HELD_BYTES["host"] // (jax.local_device_count() * splits * at_once)
    return _HELD_BYTES["accelerator"] // (splits * at_once)


def side_by_side(runs_per_device: int, numbers: int, platform: str) -> int:
    """Returns how many runs, of so many numbers each, one device does arithmetic on at once.

    On a CPU they stay in a core's cache.
    """
    if platform != "cpu":
        return runs_per_device
    most = max(1, _CACHED_NUMBERS // numbers)
    return max(g for g in range(1, runs_per_device + 1) if runs_per_device % g == 0 and g <= most)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
