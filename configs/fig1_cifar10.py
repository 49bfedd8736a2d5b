"""Figure 1 of Rangamani & Banburski (ICASSP 2022): CIFAR-10 with and without weight decay, four convolutions.

TFDS_DATA_DIR=... python -m ncjax.main --config=configs/fig1_cifar10.py --workdir=runs/fig1
TFDS_DATA_DIR=... python -m ncjax.main --config=configs/fig1_cifar10.py:batch_norm --workdir=runs/fig1_bn
TFDS_DATA_DIR=... python -m ncjax.main --config=configs/fig1_cifar10.py:smoke --workdir=runs/fig1_smoke
"""

from ncjax.config import Config, default_config

VARIANTS = ("", "batch_norm", "smoke", "batch_norm,smoke")


def get_config(variant: str = "") -> Config:
    if variant not in VARIANTS:
        raise ValueError(f"configs/fig1_cifar10.py has no variant {variant!r}; it has {'; '.join(VARIANTS[1:])}")
    config = default_config()
    config.data.name = "cifar10"
    config.model.kind = "conv"
    config.model.widths = (32, 64, 128, 256)
    config.train.epochs = 350
    config.train.batch_size = 128
    config.train.schedule = "step"
    config.units = "torch"
    config.sweep.weight_decay = (0.0, 1e-4, 5e-4, 2e-3)
    config.sweep.seed = (0, 1, 2)
    config.checkpoint.every = 50
    if "batch_norm" in variant:
        config.model.normalization = "batch"
        config.data.standardize = True
        config.sweep.learning_rate = (0.067,)
    else:
        config.data.input_scale = 8.0
        config.sweep.learning_rate = (0.5,)
    if "smoke" in variant:
        config.data.per_class = 50
        config.train.epochs = 12
        config.train.batch_size = 32
        config.sweep.weight_decay = (0.0, 5e-4)
        config.sweep.seed = (0,)
    return config
