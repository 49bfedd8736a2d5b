"""Neural collapse and weight decay: sweeps trained and measured in one compiled JAX program."""

# Public names are listed in `__init__.pyi`, which type checkers read, and imported when they are
# first used: a command line must not wait for JAX.

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
