"""Does weight decay bring collapse on MNIST, in convolutional networks with and without batch normalization?"""

from configs import fig2_mnist
from experiments import seed_figure

if __name__ == "__main__":
    seed_figure.main("fig2_mnist", fig2_mnist.get_config, __doc__)
