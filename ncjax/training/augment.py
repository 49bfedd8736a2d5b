"""Random views of training images, made inside the step: He et al. (2016), section 4.2, for
CIFAR-10.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key, Shaped

from ncjax.config import Augmentation
from ncjax.errors import unknown_choice

_BORDER = 4


def augment(
    name: Augmentation,
    key: Key[Array, ""],
    images: Shaped[Array, "b *image"],
    size: int | None = None,
    part: Callable[[Array], Array] = lambda drawn: drawn,
) -> Shaped[Array, "b *image"]:
    """`crop`: pad by 4 zeros on each side and cut at a random place; `crop_flip`: mirror every
    second one as well.

    Of a batch of `size` that is spread over devices, `images` are the `part` that is this device's:
    random numbers are drawn for the whole batch, so that they are the same wherever it is computed.
    """
    if name == "none":
        return images
    if name not in ("crop", "crop_flip"):
        raise unknown_choice("augment", name, Augmentation)
    size = len(images) if size is None else size
    place_key, flip_key = jax.random.split(key)
    if name == "crop_flip":
        mirrored = part(jax.random.bernoulli(flip_key, shape=(size, 1, 1, 1)))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    corners = part(jax.random.randint(place_key, (size, 2), 0, 2 * _BORDER + 1, jnp.int32))
    return _crop(images, corners)


def _crop(images: Shaped[Array, "b H W c"], corners: Int[Array, "b 2"]) -> Shaped[Array, "b H W c"]:
    sides = [(_BORDER, _BORDER)] * 2
    padded = jnp.pad(images, [(0, 0), *sides, (0, 0)])

    def cut(image: Array, corner: Array) -> Array:
        return lax.dynamic_slice(
            image, (corner[0], corner[1], jnp.zeros_like(corner[0])), images.shape[1:]
        )

    return jax.vmap(cut)(padded, corners)
