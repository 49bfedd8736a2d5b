"""Ctrl-C and SIGTERM as requests that the host loop honours where nothing can be lost."""

import os
import signal
import sys
import threading


class Interrupted(Exception):
    """The run stopped because it was asked to, with all it had computed on disk."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Requests:
    """Within it, the first SIGINT or SIGTERM is noted and training goes on to the end of its chunk; a second one exits
    at once (files are replaced atomically, so that too leaves a WORKDIR that continues)."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self._noted = 0
        self._previous: dict = {}

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {signum: signal.signal(signum, self._note) for signum in self._SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _) -> None:
        if self._noted:
            os._exit(128 + signum)
        self._noted = signum
        word = signal.Signals(signum).name
        print(f"{word}: stopping after this chunk and a checkpoint; again: at once", file=sys.stderr, flush=True)

    @property
    def signum(self) -> int:
        """Of the signal noted; 0: none."""
        return self._noted

    def raise_if_any(self) -> None:
        if self._noted:
            raise Interrupted(self._noted)
