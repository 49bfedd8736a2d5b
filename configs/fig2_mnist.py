"""Figure 2 of Rangamani & Banburski (ICASSP 2022): MNIST with and without weight decay, four
convolutions.

    TFDS_DATA_DIR=... ncjax train --config=fig2_mnist --workdir=runs/fig2
    TFDS_DATA_DIR=... ncjax train --config=fig2_mnist:batch_norm --workdir=runs/fig2_bn
    TFDS_DATA_DIR=... ncjax train --config=fig2_mnist:smoke --workdir=runs/fig2_smoke

32x32x1-32-64-128-256-10 on the balanced training split padded to 32x32, 350 epochs, batches of 128,
the learning rate x0.1 at 1/3 and 2/3, PyTorch's weight decay 0 to 2e-3 on all parameters, three
seeds. These 12 runs are 2.3e8 samples of 22 MFLOP, 4.9e15 FLOP: two to three minutes of one NVIDIA
H200, hours of a CPU. `batch_norm` is the paper's network as far as it is known, at learning rate
0.04: at 0.067, as on CIFAR-10, its head diverges. The homogeneous one takes 0.5 on inputs of mean
norm 8. Two CPU cores have a subset, 200 images a class: `python -m experiments.fig2_mnist
--train=subset`, whose README has the numbers of both. There `:smoke` (or `:batch_norm,smoke`) ends
within half a minute.
"""

from ncjax.config import Config, default_config

VARIANTS = ("", "batch_norm", "smoke", "batch_norm,smoke")


def get_config(variant: str = "") -> Config:
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/fig2_mnist.py has no variant {variant!r}; it has {'; '.join(VARIANTS[1:])}"
        )
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
