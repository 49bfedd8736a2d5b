"""Digits, the default: 1,450 real 8x8 scans embedded in scikit-learn, a four-layer perceptron 64-128-128-128-10.

    python -m ncjax.main --config=configs/digits.py --workdir=runs/digits
    python -m ncjax.main --config=configs/digits.py:smoke --workdir=runs/digits_smoke

Six weight decays x three seeds for 300 epochs. On two CPU cores: MEASURED.
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
