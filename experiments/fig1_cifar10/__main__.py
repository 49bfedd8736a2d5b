"""Does weight decay bring collapse on CIFAR-10, in convolutional networks with and without batch normalization?"""

from configs import fig1_cifar10
from experiments import seed_figure

if __name__ == "__main__":
    seed_figure.main("fig1_cifar10", fig1_cifar10.get_config, __doc__)
