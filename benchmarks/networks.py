"""The networks that benchmarks train, on noise of the right shape."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from ncjax.training import models

CLASSES = 10
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-3


class Layer(NamedTuple):
    """Counts a layer's weights, its outputs for one example, and where its kernel is applied."""

    weights: int
    outputs: int
    positions: int


class Network(NamedTuple):
    """Without biases; of images (H, W, channels) a convolutional one.

    `samples`: how many a timed call trains on, over all runs; a second or two of work.
    """

    image: tuple[int, ...]
    widths: tuple[int, ...]
    batch: int
    examples: int
    samples: int
    batch_norm: bool = False

    def epochs(self, runs: int) -> int:
        return max(1, round(self.samples / (runs * self.samples_per_epoch)))

    @property
    def samples_per_epoch(self) -> int:
        return self.examples // self.batch * self.batch

    @property
    def flops(self) -> int:
        """Executed per sample: forward and both gradients, except that the input needs no
        gradient.
        """
        products = [layer.weights * layer.positions for layer in self.layers()]
        return 6 * sum(products) - 2 * products[0]

    @property
    def convolves(self) -> bool:
        return len(self.image) == 3

    @property
    def model(self) -> models.Network:
        normalization = "batch" if self.batch_norm else "none"
        network = models.ConvNet if self.convolves else models.MLP
        return network(self.widths, CLASSES, normalization=normalization)

    @property
    def features(self) -> int:
        """Returns p, the dimension of what the head takes."""
        *_, head = self.layers()
        return head.weights // CLASSES

    def layers(self) -> Iterator[Layer]:
        *sides, width = self.image
        for next_width in self.widths:
            sides = [-(-side // 2) for side in sides]
            positions, places = math.prod(sides), 9 if self.convolves else 1
            yield Layer(places * width * next_width, next_width * positions, positions)
            width = next_width
        yield Layer(width * math.prod(sides) * CLASSES, CLASSES, 1)


NETWORKS = {
    "64-128-128-128-10": Network((64,), (128, 128, 128), 64, 1450, 600_000),
    "784-512-512-512-10": Network((784,), (512, 512, 512), 128, 1024, 65_536),
    "784-2048-2048-10": Network((784,), (2048, 2048), 128, 1024, 16_384),
    "32x32x3-32-64-128-256-10": Network((32, 32, 3), (32, 64, 128, 256), 128, 1024, 16_384),
}
# A measurement is compared with an epoch of this many (runs, training, test examples): digits'
# default sweep, MNIST, a fifth of MNIST, a tenth of CIFAR-10.
MEASURED = {
    "64-128-128-128-10": (18, 1450, 347),
    "784-512-512-512-10": (4, 60_000, 10_000),
    "784-2048-2048-10": (2, 12_000, 2_000),
    "32x32x3-32-64-128-256-10": (4, 5_000, 1_000),
}
