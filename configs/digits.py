"""Digits, the default: 1,450 real 8x8 scans embedded in scikit-learn, a four-layer perceptron
64-128-128-128-10.

    ncjax train --config=digits --workdir=runs/digits
    ncjax train --config=digits:smoke --workdir=runs/digits_smoke

Six weight decays x three seeds for 300 epochs. On two CPU cores: 26 s with figures, 9 s of it
training (18 runs at about 820,000 samples/s together). Collapse comes with weight decay: nc3 is
0.108 at lambda = 1e-3 against 0.886 at 0, nc1 is 0.0044 at 3e-4 against 0.028 at 0 (means over
three seeds; docs/results.md has ten).
"""

from ncjax.config import Config, default_config


def get_config(variant: str = "") -> Config:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/digits.py has no variant {variant!r}; it has smoke")
    config = default_config()
    config.sweep.weight_decay = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    config.sweep.seed = (0, 1, 2)
    if variant == "smoke":
        config.train.epochs = 10
        config.sweep.weight_decay = (0.0, 1e-3)
        config.sweep.seed = (0, 1)
    return config
