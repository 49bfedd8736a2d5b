"""Several processes, one run: JAX's own distributed runtime, and what the host loops must agree on.

Every process runs the same host loop on its own devices; process 0 alone writes history, figures
and what is printed. When one is lost, JAX's runtime ends the others: by an error of the collective
they wait in, or by abort from C++, as when heartbeats fail to come or process 0 is gone.
"""

import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ncjax import config as configuration
from ncjax.data import preparation
from ncjax.errors import InputError, last_line
from ncjax.plan import Plan, Processes
from ncjax.runs import provenance
from ncjax.runs.signals import Interrupted

# A process whose heartbeats have not come for so long is lost.
_HEARTBEAT_SECONDS = 40
# Until all processes have come.
_PATIENCE_SECONDS = 300
# Until process 0 has drawn its figures and saved its last checkpoint.
_PARTING_SECONDS = 3600


def is_leader() -> bool:
    """Returns whether this process writes what there is one of."""
    return jax.process_index() == 0


def agree(signum: int, epochs: int) -> tuple[int, int]:
    """(the signal that some process was sent, or 0; the epochs that process 0 would train next),
    in every process.
    """
    if jax.process_count() == 1:
        return signum, epochs
    from jax.experimental import multihost_utils  # of several processes alone

    signums, epochs_of = multihost_utils.process_allgather(np.array([signum, epochs], np.int32)).T
    return int(signums.max()), int(epochs_of[0])


def check_same(plan: Plan) -> None:
    """Raises InputError where processes were given different configs, data, PRNGs or software.

    They would wait for each other, or train what none of them was given.
    """
    if jax.process_count() == 1:
        return
    content = {
        "config": configuration.to_json(plan.config),
        "data": preparation.checksums(plan.dataset),
        "PRNG": provenance.random_bits(),
        "version of a package, setting of JAX or XLA_FLAGS": provenance.software(),
    }
    if found := _first_difference(content):
        process, what = found
        raise InputError(
            "--process", process, f"it has another {what} than process 0; start all by one command"
        )


def check_shared(workdir: Path) -> None:
    """Raises InputError where a process does not see the WORKDIR that process 0 has locked.

    It could read no checkpoint, and its part of each would be written elsewhere.
    """
    _wait_for_all("locked")
    path = workdir / ".lock"
    if found := _first_difference(
        {"lock": path.read_text(errors="replace") if path.exists() else ""}
    ):
        way_out = (
            f"process {found[0]} does not see the same folder; give all one --workdir, on a file "
            "system they share"
        )
        raise InputError("--workdir", str(workdir), way_out)


def _wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def check_read(workdir: Path, epoch: int | None) -> None:
    """Returns once every process has read the checkpoint of `epoch`, or found none; or raises
    InputError.
    """
    if found := _first_difference({"epoch": epoch}):
        way_out = (
            f"process {found[0]} cannot read the checkpoint that process 0 can, or the other way "
            "round; look there"
        )
        raise InputError("--workdir", str(workdir), way_out)


def _first_difference(content: Mapping[str, Any]) -> tuple[int, str] | None:
    """Returns the first process that has not what process 0 has (as JSON), and the name of it;
    None: all have.
    """
    if jax.process_count() == 1:
        return None
    from jax.experimental import multihost_utils

    mine = [zlib.crc32(json.dumps(part, sort_keys=True).encode()) for part in content.values()]
    found = multihost_utils.process_allgather(np.array(mine, np.uint32))
    for process, crcs in enumerate(found):
        for name, crc, expected in zip(content, crcs, found[0], strict=True):
            if crc != expected:
                return process, name
    return None


@contextlib.contextmanager
def joined(where: Processes | None) -> Iterator[None]:
    """Makes this process one of several (`where`) while the context lasts; None: it is alone.

    Raises:
      InputError: the environment does not say where the others are.
    """
    if where is None:
        yield
        return
    # Its handler would take SIGTERM from `interrupts`.
    jax.config.update("jax_enable_preemption_service", False)
    if where.coordinator:
        others = (
            f"process {where.process} of {where.processes} waits for the others at "
            f"{where.coordinator}; should one be lost, all others end: started again, all continue"
        )
        print(others, file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            *where,
            initialization_timeout=_PATIENCE_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_PARTING_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        way_out = f"the processes did not come together ({last_line(error)})"
        raise InputError("--coordinator", where.coordinator or "auto", way_out) from error
    try:
        yield
    except Interrupted:  # all of them, at one epoch
        jax.distributed.shutdown()
        raise
    except Exception as error:
        if not _is_of_runtime(error):
            raise
        print(f"error: {last_line(error)}", file=sys.stderr, flush=True)
        os._exit(1)
    jax.distributed.shutdown()  # together: process 0 has figures to draw


def leave(code: int) -> None:
    """Ends this process at once: JAX would first wait for the others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1)  # where all have the same to say: the others are aborted once process 0 is gone
    os._exit(code)


def _is_of_runtime(error: Exception) -> bool:
    """Returns whether JAX's runtime raised an error, as of a collective whose other end is gone; on
    CPUs that is a ValueError.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
