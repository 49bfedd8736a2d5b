"""Does weight decay bring collapse on CIFAR-10, in convolutional networks with and without batch
normalization?
"""

from functools import partial

from configs import fig1_cifar10
from experiments import seed_figure

histories = partial(seed_figure.histories, name="fig1_cifar10", get_config=fig1_cifar10.get_config)
tables = seed_figure.tables

if __name__ == "__main__":
    seed_figure.main("fig1_cifar10", fig1_cifar10.get_config, __doc__)
