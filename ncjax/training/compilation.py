"""Says how programs are compiled, keeps them between runs, and traces them."""

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from ncjax.paths import cache_folder

# A sweep's programs take less than 1 MB on a CPU.
_MOST_CACHED = 2**30
# JAX keeps what took a second to compile, which the smaller of a sweep's programs do not take.
_LEAST_SECONDS = 0.1


def use_cache(where: str) -> None:
    """Keeps compiled programs in $XDG_CACHE_HOME/ncjax/jax, unless JAX already has a cache.

    Each host has a folder of its own, because a program is compiled for its processor and different
    machines may share a home. A user without a home has no cache. Programs beyond 1 GiB are
    removed, those first that were used the longest ago.

    Args:
      where: `user`, or `off` for no cache.
    """
    if where == "off" or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    if folder := cache_folder():
        programs = folder / "jax" / socket.gethostname()
        _remove_oldest(programs, _MOST_CACHED)
        jax.config.update("jax_compilation_cache_dir", str(programs))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _remove_oldest(folder: Path, most: int) -> None:
    """Removes files that were used the longest ago until at most so many bytes are left.

    JAX's own bound, jax_compilation_cache_max_size, stops caching for good once a process is killed
    between the two files that it writes of a program, or where programs were kept without it.
    """
    with contextlib.suppress(OSError):  # no such folder yet
        # XLA has a folder of its own there on GPUs.
        used = [(file.stat(), file) for file in folder.iterdir() if file.is_file()]
        used.sort(key=lambda one: max(one[0].st_atime, one[0].st_mtime), reverse=True)
        total = 0
        for status, file in used:
            total += status.st_size
            if total > most:
                file.unlink(missing_ok=True)  # another process may remove it, too


@functools.cache
def fast_compile_options(platform: str) -> dict[str, bool]:
    """Returns compiler options with which XLA compiles faster what runs as fast or a little slower.

    XLA has had two generators of code for a CPU's fusions, of which a measurement has hundreds.
    The older one compiles them in two thirds of the time, and may add up in another order
    (docs/performance.md). Later versions of XLA have the newer one alone.
    """
    if platform != "cpu":
        return {}
    older = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=older).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return {}
    return older


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
