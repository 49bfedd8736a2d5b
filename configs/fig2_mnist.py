"""Figure 2 of Rangamani & Banburski (ICASSP 2022): collapse on MNIST with and without weight decay, four convolutions.

TFDS_DATA_DIR=... python -m ncjax.main --config=configs/fig2_mnist.py --workdir=runs/fig2
TFDS_DATA_DIR=... python -m ncjax.main --config=configs/fig2_mnist.py:batch_norm --workdir=runs/fig2_bn
TFDS_DATA_DIR=... python -m ncjax.main --config=configs/fig2_mnist.py:smoke --workdir=runs/fig2_smoke
"""

from ncjax.config import Config, default_config

VARIANTS = ("", "batch_norm", "smoke", "batch_norm,smoke")


def get_config(variant: str = "") -> Config:
    if variant not in VARIANTS:
        raise ValueError(f"configs/fig2_mnist.py has no variant {variant!r}; it has {'; '.join(VARIANTS[1:])}")
    config = default_config()
    config.data.name = "mnist"
    config.data.pad = 32
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
        config.sweep.learning_rate = (0.04,)
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
