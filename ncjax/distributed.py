"""Several processes, one run: JAX's own distributed runtime, and what the host loops must agree on.

Every process runs the same host loop on its own devices; process 0 alone writes history, figures and what is printed.
A process that dies leaves the others waiting in a collective: each watches for signs of life of all, and ends.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ncjax import config as configuration
from ncjax.errors import InputError
from ncjax.interrupts import Interrupted
from ncjax.preflight import Plan, Processes

# A process that has given no sign of life for so long is lost.
_SILENCE_SECONDS = 20.0
_BEAT_SECONDS = 1.0
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
        _state().client.wait_at_barrier(f"ncjax/{name}", 1000 * _PATIENCE_SECONDS)


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
      InputError: the others did not come.
    """
    if where is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM from `interrupts`
    try:
        jax.distributed.initialize(*where, initialization_timeout=_PATIENCE_SECONDS)
    except (RuntimeError, ValueError) as error:
        way_out = f"the processes did not come together ({_last_line(error)})"
        raise InputError("--coordinator", where.coordinator, way_out) from error
    last_word = _LastWord(command)
    watch = _Watch(command, last_word)
    try:
        yield
    except Interrupted:  # all of them, at one epoch
        watch.part()
        raise
    except BaseException as error:
        watch.explain(error)
        raise
    else:
        watch.part()
    finally:
        last_word.spare()


class _LastWord:
    """A process beside this one that says how to go on, should this one end without a word.

    It will when process 0 is lost: JAX's client of the store then aborts from C++, before any Python can run.
    """

    _SCRIPT = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"

    def __init__(self, command: str):
        text = _farewell("process 0, or this one, was lost", command)
        arguments = [sys.executable, "-c", self._SCRIPT, text]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, start_new_session=True)

    def spare(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(b"spoken", timeout=5)


def _farewell(reason: str, command: str) -> str:
    return f"error: {reason}, and so this process ends; started again in all processes, this continues:\n    {command}"


class _Watch:
    """A thread that gives signs of life, and ends this process once another gives none or has said that it failed.

    Signs are numbers in the store of the process that coordinates, process 0; they count on, so that no clocks are
    compared.
    """

    def __init__(self, command: str, last_word: _LastWord):
        self._command, self._last_word, self._done = command, last_word, threading.Event()
        self._me, self._count = _state().process_id, _state().num_processes  # JAX has not started yet
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def part(self) -> None:
        """Takes leave together with the others, of which process 0 has figures to draw."""
        _state().client.wait_at_barrier("ncjax/end", 1000 * _PARTING_SECONDS)
        self._stop()
        jax.distributed.shutdown()

    def _stop(self) -> None:
        self._done.set()
        self._thread.join()

    def explain(self, error: BaseException) -> None:
        """This process fails. If that is because another one did, never returns; else lets the others know.

        A collective fails within a moment where another process has died, before its silence can be told from work.
        """
        if not isinstance(error, (InputError, KeyboardInterrupt)):
            self._thread.join(_SILENCE_SECONDS + 10 * _BEAT_SECONDS)
        self._stop()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state().client.key_value_set(f"ncjax/failed/{self._me}", _last_line(error), allow_overwrite=True)
        if self._me == 0:
            time.sleep(3 * _BEAT_SECONDS)  # the store is gone with this process; the others are to read why
        if not isinstance(error, (InputError, OSError, KeyboardInterrupt)):  # of which `main` makes a line
            traceback.print_exception(error)
            self._last_word.spare()
            os._exit(1)  # JAX would first wait for the others

    def _watch(self) -> None:
        beats, seen = 0, {other: ("", time.monotonic()) for other in range(self._count) if other != self._me}
        while not self._done.wait(_BEAT_SECONDS):
            beats += 1
            signs = failed = {}
            try:
                _state().client.key_value_set(f"ncjax/alive/{self._me}", str(beats), allow_overwrite=True)
                signs = dict(_state().client.key_value_dir_get("ncjax/alive/"))
                failed = dict(_state().client.key_value_dir_get("ncjax/failed/"))
            except jax.errors.JaxRuntimeError:
                self._leave("process 0 was lost")
            for name, reason in failed.items():
                self._leave(f"process {name.rpartition('/')[2]} failed: {reason}")
            for other, (last, since) in seen.items():
                sign = signs.get(f"ncjax/alive/{other}", "")
                if sign != last:
                    seen[other] = sign, time.monotonic()
                elif time.monotonic() - since > _SILENCE_SECONDS:
                    self._leave(f"process {other} was lost")

    def _leave(self, reason: str) -> None:
        """At once: the main thread may wait for the lost process, and so would JAX's own leave-taking."""
        if not self._done.is_set():
            print(_farewell(reason, self._command), file=sys.stderr, flush=True)
            self._last_word.spare()
            os._exit(1)


def _state() -> Any:
    from jax._src import distributed  # the store has no public name

    return distributed.global_state


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
