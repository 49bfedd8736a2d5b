"""Does weight decay bring collapse on MNIST, in convolutional networks with and without batch
normalization?
"""

from functools import partial

from configs import fig2_mnist
from experiments import seed_figure

histories = partial(seed_figure.histories, name="fig2_mnist", get_config=fig2_mnist.get_config)
tables = seed_figure.tables

if __name__ == "__main__":
    seed_figure.main("fig2_mnist", fig2_mnist.get_config, __doc__)
