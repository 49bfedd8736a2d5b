"""Locks a WORKDIR, so that one process at a time trains in it."""

import contextlib
import fcntl
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ncjax.errors import InputError


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds WORKDIR/.lock, or raises InputError naming the process that does.

    It yields a function that raises OSError once the file has been removed or replaced, because the
    lock then keeps no one out.

    The kernel releases the lock however its process dies, so there are no stale locks. The file is
    left, because removing it would let two processes lock two files of the same name.
    """
    path = workdir / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            way_out = f"{_owner(path)} is training in it; wait for it, or choose another WORKDIR"
            raise InputError("--workdir", str(workdir), way_out) from error
        except OSError as error:  # a network file system without locks
            way_out = f"cannot be locked ({error.strerror}); choose another"
            raise InputError("--workdir", str(workdir), way_out) from error
        file.truncate(0)
        file.write(
            json.dumps(
                {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            )
        )
        file.flush()
        os.fsync(file.fileno())  # other hosts read it
        yield functools.partial(_check_held, path, os.fstat(file.fileno()))


def _check_held(path: Path, held: os.stat_result) -> None:
    try:
        is_held = os.path.samestat(path.stat(), held)
    except FileNotFoundError:
        is_held = False
    if not is_held:
        raise OSError(
            f"{path} was removed while this process trained there; another may have begun, so "
            "this one stopped"
        )


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']},"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
