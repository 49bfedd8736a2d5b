"""Figure 1 of Rangamani & Banburski (ICASSP 2022): CIFAR-10 with and without weight decay, four
convolutions.

    TFDS_DATA_DIR=... ncjax train --config=fig1_cifar10 --workdir=runs/fig1
    TFDS_DATA_DIR=... ncjax train --config=fig1_cifar10:batch_norm --workdir=runs/fig1_bn
    TFDS_DATA_DIR=... ncjax train --config=fig1_cifar10:smoke --workdir=runs/fig1_smoke

32x32x3-32-64-128-256-10 on the whole training split, 350 epochs, batches of 128, the learning rate
x0.1 at 1/3 and 2/3, PyTorch's weight decay 0 to 2e-3 on all parameters, three seeds. These 12 runs
are 2.1e8 samples of 22 MFLOP, 4.7e15 FLOP: with batch normalization three minutes of one NVIDIA
H200, hours of a CPU. `batch_norm` is the paper's network as far as it is known, at learning rate
0.067; the homogeneous one takes 0.5 on inputs of mean norm 8. Two CPU cores have a subset, 200
images a class: `python -m experiments.fig1_cifar10 --train=subset`, whose README has the numbers of
both. There `:smoke` (or `:batch_norm,smoke`) ends within half a minute.
"""

from ncjax.config import Config, default_config

VARIANTS = ("", "batch_norm", "smoke", "batch_norm,smoke")


def get_config(variant: str = "") -> Config:
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/fig1_cifar10.py has no variant {variant!r}; it has {'; '.join(VARIANTS[1:])}"
        )
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
