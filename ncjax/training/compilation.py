"""Compiled programs: kept between runs, and watched at work."""

import contextlib
import socket
from collections.abc import Callable, Iterator

import jax

from ncjax.paths import cache_folder


def use_cache(where: str) -> None:
    """`user`: keeps compiled programs in $XDG_CACHE_HOME/ncjax/jax, unless JAX has been told of a
    place already.

    By host, for homes that machines of several kinds share: a program is compiled for the processor
    it runs on. A user who has no home has no cache.
    """
    if where == "off" or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    if folder := cache_folder():
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax" / socket.gethostname()))


class Profile:
    """One trace in a folder, or none where that is empty. docs/scaling.md says how to read it."""

    def __init__(self, folder: str, say: Callable[[str], None]):
        self._folder, self._say, self.is_wanted = folder, say, bool(folder)

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Writes what JAX does within it."""
        self.is_wanted = False
        with jax.profiler.trace(self._folder, create_perfetto_trace=True):
            yield
        self._say(f"a trace of one epoch is in {self._folder}")
