"""Random views of training images, made inside the step: He et al. (2016), section 4.2, for CIFAR-10."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, Shaped

_BORDER = 4


def augment(name: str, key: Key[Array, ""], images: Shaped[Array, "B *image"]) -> Shaped[Array, "B *image"]:
    """`crop`: pad by 4 zeros on each side and cut at a random place; `crop_flip`: mirror every second one as well."""
    if name == "none":
        return images
    place_key, flip_key = jax.random.split(key)
    if name == "crop_flip":
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return _random_crop(place_key, images)


def _random_crop(key: Key[Array, ""], images: Shaped[Array, "B H W c"]) -> Shaped[Array, "B H W c"]:
    sides = [(_BORDER, _BORDER)] * 2
    padded = jnp.pad(images, [(0, 0), *sides, (0, 0)])
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * _BORDER + 1, jnp.int32)

    def cut(image: Array, corner: Array) -> Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], jnp.zeros_like(corner[0])), images.shape[1:])

    return jax.vmap(cut)(padded, corners)
