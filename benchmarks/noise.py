"""Noise of the right shape: timing needs no real images."""

import numpy as np

from ncjax.data.dataset import Split
from ncjax.data.preparation import PreparedDataset


def noise(
    image: tuple[int, ...], train_size: int, test_size: int, num_classes: int = 10
) -> PreparedDataset:
    """uint8 noise, normalized as `preparation.load` would: pixels centred, mean input norm 2."""
    rng = np.random.default_rng(0)

    def split(size: int) -> Split:
        labels = (np.arange(size) % num_classes).astype(np.int32)
        return Split(rng.integers(0, 256, (size, *image), dtype=np.uint8), labels)

    train, test = split(train_size), split(test_size)
    center = train.images.mean(0)
    scale = np.array(
        2 / np.linalg.norm((train.images - center).reshape(train_size, -1), axis=1).mean()
    )
    return PreparedDataset(train, test, center, scale, tuple(map(str, range(num_classes))))
