"""Compiled programs: kept between runs, and watched at work."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


def use_cache(where: str) -> None:
    """`user`: keeps compiled programs in $XDG_CACHE_HOME/ncjax/jax, unless JAX has been told of a place already.

    By host, for homes that machines of several kinds share: a program is compiled for the processor it runs on.
    """
    if where == "off" or jax.config.jax_compilation_cache_dir is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "ncjax" / "jax" / socket.gethostname()))


@contextlib.contextmanager
def traced(folder: str, say: Callable[[str], None]) -> Iterator[None]:
    """Writes a profile of what happens within it into a folder; empty: none. docs/scaling.md says how to read it."""
    if not folder:
        yield
        return
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield
    say(f"a trace of the last epoch is in {folder}")
