"""MNIST with a four-layer perceptron, 784-512-512-512-10: does weight decay bring collapse on real
images at scale?

    TFDS_DATA_DIR=... ncjax train --config=mnist --workdir=runs/mnist
    TFDS_DATA_DIR=... ncjax train --config=mnist --config.data.per_class=1000 \
        --config.train.epochs=60 --workdir=runs/mnist
    TFDS_DATA_DIR=... ncjax train --config=mnist:smoke --workdir=runs/mnist_smoke

The whole balanced training split, 54,210 images, takes two CPU cores hours (experiments/mnist_mlp
has 25 epochs of it, n = 5). For minutes, take per_class=1000 and 60 epochs as above: the 12 runs
take three (50,000 samples/s together). nc3 is 0.121 +- 0.006 at lambda = 2.5e-3 against 1.06 +-
0.03 at 0, nc1 0.0166 +- 0.0003 at 5e-4 against 0.082 +- 0.008 at 0 (mean +- sd over three seeds).
Any other TFDS image-classification set takes MNIST's place by --config.data.name.
"""

from ncjax.config import Config, default_config


def get_config(variant: str = "") -> Config:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/mnist.py has no variant {variant!r}; it has smoke")
    config = default_config()
    config.data.name = "mnist"
    config.model.widths = (512, 512, 512)
    config.train.epochs = 100
    config.train.batch_size = 128
    config.sweep.weight_decay = (0.0, 1e-4, 5e-4, 2.5e-3)
    config.sweep.seed = (0, 1, 2)
    config.checkpoint.every = 20
    if variant == "smoke":
        config.data.per_class = 100
        config.train.epochs = 10
        config.sweep.weight_decay = (0.0, 2.5e-3)
        config.sweep.seed = (0,)
    return config
