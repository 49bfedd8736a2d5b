"""Checks JAX's environment: refuses variables that would make it crash or train something else.

It also finds the memory of the machine.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping

from ncjax.errors import InputError, last_line

# The most devices that JAX can simulate within seconds.
_MOST_DEVICES = 4096

_OFF = ("0", "false", "no", "off", "n", "f")
_DIVERGED = "a run that diverges is recorded as NaN, and its neighbours go on"
_COMPILED = "a sweep is one compiled program"
_MOVED = "data are moved to the devices, measurements from them"
# Variables of JAX that would make the programs fail or train something else: the values that do no
# harm, and the reason.
_REFUSED = {
    "JAX_DEBUG_NANS": (_OFF, _DIVERGED),
    "JAX_DEBUG_INFS": (_OFF, _DIVERGED),
    "JAX_DISABLE_JIT": (_OFF, _COMPILED),
    "JAX_NO_TRACING": (_OFF, _COMPILED),
    "JAX_NO_EXECUTION": (_OFF, _COMPILED),
    "JAX_DEFAULT_DEVICE": (
        (),
        "config.mesh places the runs; JAX_PLATFORMS chooses among kinds of devices",
    ),
    "JAX_NUMPY_DTYPE_PROMOTION": (("standard",), "the programs rely on standard"),
    "JAX_RANDOM_SEED_OFFSET": (("0",), "config.sweep.seed alone decides"),
    "JAX_TRANSFER_GUARD": (("allow", "log"), _MOVED),
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": (("allow", "log"), _MOVED),
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": (("allow", "log"), _MOVED),
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": (("allow", "log"), _MOVED),
}


def check(environment: Mapping[str, str]) -> None:
    """Raises InputError for the first variable with a refused value, without importing JAX."""
    for name, (harmless, reason) in _REFUSED.items():
        if name in environment and environment[name].lower() not in harmless:
            raise InputError(name, environment[name], f"{reason}; unset it")
    number = environment.get("JAX_NUM_CPU_DEVICES", "1")
    if not (number.isdecimal() and len(number) < 10 and 1 <= int(number) <= _MOST_DEVICES):
        must = f"must be an integer from 1 to {_MOST_DEVICES}, of devices to simulate"
        raise InputError("JAX_NUM_CPU_DEVICES", number, must)
    if "XLA_FLAGS" in environment:
        _check_xla_flags(environment)


def _check_xla_flags(environment: Mapping[str, str]) -> None:
    """Raises InputError for flags that XLA refuses.

    XLA ends the process if a flag is wrong, so another process tries them.
    """
    script = "from jaxlib import xla_client; xla_client.CompileOptions()"
    tried = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    if tried.returncode:
        first = tried.stderr.partition("\n")[0].rpartition("] ")[
            2
        ]  # after the place in XLA's source
        raise InputError(
            "XLA_FLAGS",
            environment["XLA_FLAGS"],
            f"XLA refuses it ({first}); correct it, or unset it",
        )


def import_jax() -> None:
    """Imports JAX; raises InputError, before the slow import if possible, for refused variables."""
    check(os.environ)
    try:
        import jax  # noqa: F401
    except ValueError as error:
        named = re.search(r"jax_\w+", str(error), re.IGNORECASE)
        name = named.group().upper() if named else "JAX_*"
        way_out = f"JAX does not start ({last_line(error)}); correct it, or unset it"
        raise InputError(name, os.environ.get(name), way_out) from error


def physical_memory() -> int:
    """Returns the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
