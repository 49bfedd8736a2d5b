"""Finds what numbers depend on besides config and data: versions, source, settings and devices."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
from jax.sharding import Mesh

import ncjax
from ncjax.training import parallel

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Initial weights and the order of batches depend on these settings.
_RANDOM_BITS = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset")
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter."""
    # A checkout need not be installed, so that no metadata are of ncjax itself.
    ours = {"python": platform.python_version(), "ncjax": ncjax.__version__}
    return ours | {package: metadata.version(package) for package in _PACKAGES}


def git_revision() -> str:
    """Returns the git revision of the source, or "unknown"."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def random_bits() -> dict[str, str]:
    """Returns JAX's settings that random numbers depend on; other settings make another run."""
    return {name: _setting(name) for name in _RANDOM_BITS}


def software() -> dict[str, str]:
    """Returns the versions, settings and flags that decide how XLA rounds."""
    rounding = {
        name: version
        for name, version in versions().items()
        if name not in ("python", "orbax-checkpoint")
    }
    settings = {name: _setting(name) for name in _SETTINGS}
    return rounding | settings | {name: os.environ.get(name, "") for name in _VARIABLES}


def _setting(name: str) -> str:
    """Returns JAX's value of a setting.

    JAX has attributes only for settings that a context may change.
    """
    return str(getattr(jax.config, name, jax.config.values.get(name)))


def arithmetic(mesh: Mesh, runs: int) -> dict[str, str]:
    """Returns what decides how a program rounds: `software`, devices, and the layout of `runs`."""
    first = jax.devices()[0]
    return software() | {
        "platform": " ".join(f"{first.platform} {first.client.platform_version}".split()),
        "device": processor() if first.platform == "cpu" else first.device_kind,
        "mesh": f"{mesh.shape[parallel.RUN]} x {mesh.shape[parallel.DATA]}",
        "runs at once": str(runs),
        "processes": str(jax.process_count()),
    }


def processor() -> str:
    """Returns the CPU's name and its vector instructions, as far as the system says."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    # All cores have the same entries, and those of the last one remain.
    known = {name.strip(): value.strip() for name, _, value in lines}
    features = known.get("flags", known.get("Features", "")).split()
    vectors = sorted(
        word for word in features if word.startswith(("avx", "fma", "amx", "sve", "asimd"))
    )
    return " ".join([platform.machine(), known.get("model name", ""), *vectors]).strip()


def differences(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Returns a line per difference, with both values.

    Entries that `theirs` does not have, because it is older, are not compared.
    """
    return [
        f"{name} is {mine[name]!r} here and {theirs[name]!r} there"
        for name in mine
        if name in theirs and mine[name] != theirs[name]
    ]
