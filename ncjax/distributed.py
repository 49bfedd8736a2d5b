"""Several processes, one run: JAX's own distributed runtime, and what the host loops must agree on.

Every process runs the same host loop on its own devices; process 0 alone writes history, figures and what is printed.
When one is lost, JAX's runtime ends the others: by an error of the collective they wait in, or by abort from C++, as
when heartbeats fail to come or process 0 is gone.
"""

import contextlib
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from ncjax import config as configuration
from ncjax.errors import InputError, last_line
from ncjax.interrupts import Interrupted
from ncjax.preflight import Plan, Processes

# A process whose heartbeats have not come for so long is lost.
_HEARTBEAT_SECONDS = 40
# Until all processes have come.
_PATIENCE_SECONDS = 300
# Until process 0 has drawn its figures and saved its last checkpoint.
_PARTING_SECONDS = 3600


def is_leader() -> bool:
    """Whether this process writes what there is one of."""
    return jax.process_index() == 0


def agree(signum: int, epochs: int) -> tuple[int, int]:
    """(the signal that some process was sent, or 0; the epochs that process 0 would train next), in every process."""
    if jax.process_count() == 1:
        return signum, epochs
    from jax.experimental import multihost_utils  # of several processes alone

    signums, epochs_of = multihost_utils.process_allgather(np.array([signum, epochs], np.int32)).T
    return int(signums.max()), int(epochs_of[0])


def wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def check_same(plan: Plan) -> None:
    """Raises InputError where processes were given different configs or data: they would wait for each other."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    splits = [part for split in (plan.dataset.train, plan.dataset.test) for part in split]
    content = [configuration.to_json(plan.config).encode(), *(np.ascontiguousarray(a).data for a in splits)]
    found = multihost_utils.process_allgather(np.array([zlib.crc32(part) for part in content], np.uint32))
    for process, crcs in enumerate(found):
        if (crcs != found[0]).any():
            what = "config" if crcs[0] != found[0][0] else "data"
            raise InputError("--process", process, f"it has another {what} than process 0; start all by one command")


@contextlib.contextmanager
def joined(where: Processes | None, command: str) -> Iterator[None]:
    """Within it, this process is one of several (`where`), or alone (None). `command` continues what is lost.

    Raises:
      InputError: the environment does not say where the others are.
    """
    if where is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM from `interrupts`
    if where.coordinator:
        others = f"process {where.process} of {where.processes} waits for the others at {where.coordinator}"
        print(others, file=sys.stderr, flush=True)
    with _last_word(command):
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


@contextlib.contextmanager
def _last_word(command: str) -> Iterator[None]:
    """Within it, a process beside this one waits to say how to go on, should this one be killed or aborted."""
    text = "this or another process was lost or never came; started again in all processes, this continues:"
    script = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
    beside = subprocess.Popen(
        [sys.executable, "-c", script, f"{text}\n    {command}"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        beside.communicate(b"spoken")


def leave(code: int) -> None:
    """Ends this process at once: JAX would first wait for the others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1)  # where all have the same to say: the others are aborted once process 0 is gone
    os._exit(code)


def _is_of_runtime(error: Exception) -> bool:
    """Whether JAX's runtime raised it, as of a collective whose other end is gone; on CPUs that is a ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
