"""Neural collapse and weight decay: sweeps trained and measured in one compiled JAX program."""

__version__ = "0.1.0"
