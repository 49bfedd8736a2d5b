"""Describes accelerators that are not here, so that a dry run compiles for them: XLA needs to know
a chip, not to have one.

`parse` reads the text of --target and `prepare` sets what JAX reads when it starts, both before JAX
is imported; `find` then describes the chips. Nothing is executed on them.
"""

import os
import re
from collections.abc import Sequence
from importlib import metadata, util
from math import prod
from typing import Any, NamedTuple

from ncjax.errors import InputError, last_line

Device = Any  # jax.Device, which type checkers take for a variable
_GIB = 2**30
# What a process on a GPU may take: JAX's default of XLA_PYTHON_CLIENT_MEM_FRACTION.
_PREALLOCATED = 0.75
# NVLink joins up to eight cards of one machine.
_MOST_CARDS = 8


class _TpuKind(NamedTuple):
    """A kind of TPU, from the table of its page at cloud.google.com/tpu/docs.

    Attributes:
      memory: of a chip, in bytes.
      sides: how many numbers a topology has.
      most: chips of the largest slice.
      options: of libtpu's topology.
    """

    memory: int
    sides: int
    most: int
    options: dict[str, str]


_TPUS = {
    # A chip of v4 is two cores, which are one device as a megacore.
    "v4": _TpuKind(32 * _GIB, 3, 4096, {"chip_config_name": "megacore"}),
    "v5e": _TpuKind(16 * _GIB, 2, 256, {}),
    "v5p": _TpuKind(95 * _GIB, 3, 6144, {}),
    "v6e": _TpuKind(32 * _GIB, 2, 256, {}),
}


class _GpuKind(NamedTuple):
    """A kind of GPU with what XLA's compiler asks of it.

    Memory and bandwidth are those of NVIDIA's data sheets; the rest is what its driver says of such
    a card, as in XLA's own descriptions (xla/backends/gpu/target_config/specs).

    Attributes:
      name: as its driver gives it.
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      lanes: float32 units of a core.
      shared: KiB of shared memory of a core; a block can use all but one.
      cache: MiB of the second-level cache.
      memory, bandwidth: in bytes, and in bytes per second.
      clock: in GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    shared: int
    cache: int
    memory: int
    bandwidth: int
    clock: float

    def description(self) -> str:
        """Returns XLA's description of such a card, a GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_block: {48 * 1024}
              shared_memory_per_block_optin: {(self.shared - 1) * 1024}
              shared_memory_per_core: {self.shared * 1024}
              l2_cache_size: {self.cache * 2**20}
              memory_bandwidth: {self.bandwidth}
              device_memory_size: {self.memory}
              clock_rate_ghz: {self.clock}
            }}
        """


_GPUS = {
    "a100": _GpuKind(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 40, 80 * _GIB, 2_039 * 10**9, 1.41
    ),
    "h100": _GpuKind(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 50, 80 * _GIB, 3_350 * 10**9, 1.98
    ),
    "h200": _GpuKind("NVIDIA H200", (9, 0), 132, 128, 228, 50, 141 * _GIB, 4_800 * 10**9, 1.98),
}
_KNOWN = (
    f"name tpu:KIND:TOPOLOGY with KIND one of {', '.join(_TPUS)}, as in tpu:v5e:2x2, or cuda:KIND "
    f"or cuda:KIND:CARDS with KIND one of {', '.join(_GPUS)}, as in cuda:h100:4"
)


class Asked(NamedTuple):
    """Holds what a text asks for: `platform` is tpu or cuda, `kind` one that is known, and `shape`
    the sides of a topology or the number of cards.
    """

    text: str
    platform: str
    kind: str
    shape: tuple[int, ...]


class Target(NamedTuple):
    """Holds accelerators that are not here.

    Attributes:
      devices: their descriptions, which programs can be compiled for and nothing else.
      memory: the bytes of one that a program may use.
      words: what they are, and the versions of what compiles for them.
    """

    devices: Sequence[Device]
    memory: int
    words: str


def parse(text: str) -> Asked:
    """Reads tpu:KIND:TOPOLOGY, cuda:KIND or cuda:KIND:CARDS, or raises InputError."""
    platform, _, rest = text.partition(":")
    kind, colon, shape = rest.partition(":")
    if platform == "tpu" and kind in _TPUS:
        return Asked(text, platform, kind, _topology(text, shape, _TPUS[kind]))
    if platform == "cuda" and kind in _GPUS:
        if colon and not re.fullmatch(f"[1-{_MOST_CARDS}]", shape):
            way_out = f"CARDS must be a number from 1 to {_MOST_CARDS}, those of one machine"
            raise InputError("--target", text, way_out)
        return Asked(text, platform, kind, (int(shape or 1),))
    raise InputError("--target", text, _KNOWN)


def _topology(text: str, shape: str, kind: _TpuKind) -> tuple[int, ...]:
    """Returns the sides of a topology such as 4x4, or raises InputError."""
    example = "x".join("2" * kind.sides)
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (kind.sides - 1), shape):
        way_out = f"TOPOLOGY must be {kind.sides} sides in chips, as in {example}"
        raise InputError("--target", text, way_out)
    sides = tuple(map(int, shape.split("x")))
    if prod(sides) > kind.most:
        way_out = f"its largest slice has {kind.most:,} chips, and this would have {prod(sides):,}"
        raise InputError("--target", text, way_out)
    return sides


def prepare(asked: Asked) -> None:
    """Sets what JAX and libtpu read from the environment when they start: JAX computes on the CPU,
    and libtpu looks for no chip. It has to be called before JAX is imported.

    Raises:
      InputError: what compiles for such an accelerator is not installed.
    """
    if _compiler(asked.platform) is None:
        package = "libtpu" if asked.platform == "tpu" else "JAX's plugin for CUDA"
        way_out = (
            f'{package}, which compiles for it, is missing; pip install "ncjax[{asked.platform}]"'
        )
        raise InputError("--target", asked.text, way_out)
    os.environ["JAX_PLATFORMS"] = "cpu"
    # JAX would keep these programs, and warn when it cannot load them without their devices.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if asked.platform == "tpu":
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server of Google Cloud
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of a host that is not asked for
            "TPU_WORKER_HOSTNAMES": "localhost",
            # Its lock keeps two processes from one chip, and would keep them from compiling.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }


def _compiler(platform: str) -> str | None:
    """Returns the name and version of the package that compiles for a platform, if installed."""
    if platform == "tpu":
        found = [metadata.distribution("libtpu")] if util.find_spec("libtpu") else []
    else:
        plugins = metadata.entry_points(group="jax_plugins")
        found = [one.dist for one in plugins if one.name.startswith("xla_cuda") and one.dist]
    return f"{found[0].name} {found[0].version}" if found else None


def find(asked: Asked) -> Target:
    """Describes the accelerators that are asked for.

    Raises:
      InputError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    if asked.platform == "tpu":
        memory, options = _TPUS[asked.kind].memory, _TPUS[asked.kind].options
        name = f"{asked.kind}:{'x'.join(map(str, asked.shape))}"
        call = {"topology_name": name, "platform": "tpu", **options}
    else:
        card = _GPUS[asked.kind]
        memory = int(_PREALLOCATED * card.memory)
        call = {
            "topology_name": asked.kind,
            "platform": "cuda",
            "topology": f"1x1x{asked.shape[0]}",  # slices, machines, cards
            "target_config": card.description(),
        }
    try:
        devices = topologies.get_topology_desc(**call).devices
    except RuntimeError as error:
        way_out = f"{_compiler(asked.platform)} cannot compile for it ({last_line(error)})"
        raise InputError("--target", asked.text, way_out) from error
    words = (
        f"{asked.text}, {len(devices)} {devices[0].device_kind}, none of them here: by JAX "
        f"{jax.__version__} and {_compiler(asked.platform)}"
    )
    return Target(devices, memory, words)
