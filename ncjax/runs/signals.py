"""Handles Ctrl-C and SIGTERM: a training run stops when nothing can be lost, others at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Reports that a run stopped at a signal, with all that it had computed on disk."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Stopped(KeyboardInterrupt):
    """Ends a command at a signal, wherever it is.

    Files are replaced atomically, so each is the old one or the new one.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Requests:
    """Notes the first SIGINT or SIGTERM within its context, and exits at once at the second.

    Training goes on to the end of its chunk after the first signal. Files are replaced atomically,
    so the second one also leaves a WORKDIR that can be continued.
    """

    def __init__(self):
        self._noted = 0
        self._previous: dict = {}

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            # Python allows handlers to be set only in the main thread.
            self._previous = {signum: signal.signal(signum, self._note) for signum in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _) -> None:
        if self._noted:
            os._exit(128 + signum)
        self._noted = signum
        _say(
            f"{signal.Signals(signum).name}: stopping after this chunk and a checkpoint; again: "
            "at once"
        )

    @property
    def signum(self) -> int:
        """The number of the signal that was noted, or 0."""
        return self._noted


class Stops:
    """Makes SIGINT and SIGTERM raise Stopped from `begin` on, and exit with a code from `end` on.

    A signal ends the process itself if an exception might be lost: while a module is imported
    (libraries swallow the exception, turn it into ImportError, or abort), in a destructor, while a
    library in C++ does not return to Python, and at the second signal.
    """

    # The time that a library in C++ may take to return.
    _PATIENCE_SECONDS = 2.0

    def __init__(self):
        self._noted: Stopped | None = None

    @property
    def noted(self) -> Stopped | None:
        """The exception that was raised, even if it was lost on its way; None if there was none."""
        return self._noted

    def begin(self) -> None:
        for signum in _SIGNALS:
            signal.signal(signum, self._stop)
        sys.unraisablehook = self._unraisable
        arrivals, into = os.pipe()
        os.set_blocking(into, False)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(arrivals,), daemon=True).start()

    def end(self, code: int) -> None:
        """Makes a signal during the interpreter's shutdown exit at once with `code`."""
        for signum in _SIGNALS:
            signal.signal(signum, lambda *_: os._exit(code))

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        again, self._noted = self._noted is not None, Stopped(signum)
        if again or _is_importing(frame):
            self._exit(self._noted)
        raise self._noted

    def _unraisable(self, lost: Any) -> None:
        if isinstance(lost.exc_value, Stopped):
            self._exit(lost.exc_value)
        sys.__unraisablehook__(lost)

    def _watch(self, arrivals: int) -> None:
        """Ends the process if its main thread does not handle a signal; runs in its own thread."""
        came = 0
        while True:
            signum = os.read(arrivals, 1)[0]
            came += signum in _SIGNALS
            time.sleep(self._PATIENCE_SECONDS)
            is_waiting = self._noted is None and signal.getsignal(signum) == self._stop
            if came > 1 or is_waiting:
                self._exit(Stopped(signum))

    def _exit(self, why: Stopped) -> None:
        _say(f"stopped by {why}")
        with contextlib.suppress(Exception):  # the signal may have interrupted this very stream
            sys.stdout.flush()
        os._exit(why.exit_code)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _say(line: str) -> None:
    """Writes a line to standard error by the system call.

    The signal may have interrupted Python's own stream in the middle of a write.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
