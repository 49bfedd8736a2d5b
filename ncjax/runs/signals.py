"""Ctrl-C and SIGTERM: a request that a training run honours where nothing can be lost; the end
of anything else.
"""

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
    """The run stopped because it was asked to, with all it had computed on disk."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Stopped(KeyboardInterrupt):
    """A signal came, and the command ends where it was. Files are replaced atomically: they are
    the old ones or new.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Requests:
    """Within it, the first SIGINT or SIGTERM is noted and training goes on to the end of its chunk;
    a second one exits at once (files are replaced atomically, so that too leaves a WORKDIR that
    continues)."""

    def __init__(self):
        self._noted = 0
        self._previous: dict = {}

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            # Python allows handlers nowhere else.
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
        """Returns the number of the signal noted; 0: none."""
        return self._noted


class Stops:
    """From `begin` on, SIGINT and SIGTERM raise Stopped; `end` has the process end with a code that
    is decided.

    Where no exception gets through, they end the process themselves: while a module is imported,
    since libraries swallow what is raised then, turn it into ImportError, or abort; in a
    destructor; where a library in C++ does not return to Python; and the second time.
    """

    # What a library in C++ may take to return.
    _PATIENCE_SECONDS = 2.0

    def __init__(self):
        self._noted: Stopped | None = None

    @property
    def noted(self) -> Stopped | None:
        """Returns what was raised, whether or not it got through."""
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
        """Lets a signal that comes while the interpreter shuts down do no more than hurry it."""
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
        """Ends the process where its main thread does not come to handle a signal; runs in a
        thread of its own.
        """
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
        with contextlib.suppress(Exception):  # it may be what was interrupted
            sys.stdout.flush()
        os._exit(why.exit_code)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _say(line: str) -> None:
    """Says it on standard error by the system call: of Python's stream this may be an
    interruption.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
