"""Writes files that appear whole or not at all."""

import os
from pathlib import Path


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a killed process has left."""
    for scratch in folder.glob(".*.tmp"):
        scratch.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`; a reader, or a crash, sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)  # left over only where writing failed
