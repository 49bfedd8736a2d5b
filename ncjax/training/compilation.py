"""Keeps compiled programs between runs, and traces them."""

import contextlib
import socket
from collections.abc import Callable, Iterator

import jax

from ncjax.paths import cache_folder


def use_cache(where: str) -> None:
    """Keeps compiled programs in $XDG_CACHE_HOME/ncjax/jax, unless JAX already has a cache.

    Each host has a folder of its own, because a program is compiled for its processor and different
    machines may share a home. A user without a home has no cache.

    Args:
      where: `user`, or `off` for no cache.
    """
    if where == "off" or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    if folder := cache_folder():
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax" / socket.gethostname()))


class Profile:
    """Writes one trace to a folder, or none if its name is empty; see docs/scaling.md."""

    def __init__(self, folder: str, say: Callable[[str], None]):
        self._folder, self._say, self.is_wanted = folder, say, bool(folder)

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Traces what JAX does within this context."""
        self.is_wanted = False
        with jax.profiler.trace(self._folder, create_perfetto_trace=True):
            yield
        self._say(f"a trace of one epoch is in {self._folder}")
