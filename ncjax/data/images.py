"""Decodes image files, resizes images and converts their channels, all by Pillow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ncjax import environment
from ncjax.config import Color
from ncjax.errors import InputError, last_line

if TYPE_CHECKING:
    from PIL import Image

_GRAY = ("1", "L", "LA", "La")
# Pillow has more than 8 bits of gray alone.
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# ITU-R 601, as Pillow weighs red, green and blue.
_LUMA = np.array([0.299, 0.587, 0.114])


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Returns images (M, height, width, channels) as (M, size, size, channels).

    The largest square in the middle of an image is resized, bilinearly and without aliasing.
    """
    if images.ndim != 4:
        way_out = f"its examples have shape {images.shape[1:]}; resize images alone"
        raise InputError("config.data.size", size, way_out)
    if images.shape[1:3] == (size, size):
        return images
    result = np.empty((len(images), size, size, images.shape[3]), images.dtype)
    for i, image in enumerate(images):
        result[i] = fitted(image, size)
    return result


def check_memory(field: str, side: int, bytes_per_pixel: int) -> None:
    """Raises InputError where images of a side, all together, exceed this machine's memory."""
    needed, memory = side**2 * bytes_per_pixel, environment.physical_memory()
    if needed > memory:
        way_out = (
            f"images of {side}x{side} take {needed / 1e9:.3g} GB in all, and there are "
            f"{memory / 1e9:.3g}; take smaller or fewer ones"
        )
        raise InputError(field, side, way_out)


def fitted(image: np.ndarray, size: int) -> np.ndarray:
    """Returns one image (height, width, channels) as `resized` does."""
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    # Channels one by one: Pillow resizes two, or five, or such of floats in no other way.
    parts = []
    for channel in np.moveaxis(image[top : top + side, left : left + side], -1, 0):
        plain = channel if channel.dtype == np.uint8 else channel.astype(np.float32)
        part = Image.fromarray(plain).resize((size, size), Image.Resampling.BILINEAR)
        parts.append(np.asarray(part))
    stacked = np.stack(parts, axis=-1)
    return stacked.round() if image.dtype.kind == "u" else stacked


def in_color(images: np.ndarray, color: Color) -> np.ndarray:
    """Returns images (M, height, width, channels) with the channels asked for.

    `own` leaves them. Of four channels the last is opacity: `gray` and `rgb` lay the image over
    black. `gray` of a colour is its luma (ITU-R 601), `rgb` of a gray is three times that.
    """
    if color == "own":
        return images
    channels = images.shape[-1]
    if images.ndim != 4 or channels not in (1, 3, 4):
        way_out = f"its examples have shape {images.shape[1:]}; leave it own"
        raise InputError("config.data.color", color, way_out)
    wanted = 1 if color == "gray" else 3
    result = np.empty((*images.shape[:3], wanted), images.dtype)
    for i, image in enumerate(images):
        result[i] = _converted(image, color)
    return result


def _converted(image: np.ndarray, color: Color) -> np.ndarray:
    from PIL import Image

    if image.dtype == np.uint8:
        return _pixels(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), color)
    # Pillow has no colours of more than 8 bits.
    most = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1.0
    if image.shape[-1] == 4:
        image = image[..., :3] * (image[..., 3:].astype(np.float64) / most)
    if color == "gray" and image.shape[-1] == 3:
        image = (image @ _LUMA)[..., None]
    if color == "rgb" and image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return image.round() if most > 1 else image


def decode(paths: list[Path], size: int) -> np.ndarray:
    """Returns image files as uint8 (M, height, width, 1 or 3), turned as their EXIF says.

    They are gray where every file is, else RGB; transparent images lie over black. `size` resizes
    them, unless it is 0.

    Raises:
      InputError: a file is damaged or has more than 8 bits a channel; or sizes differ, and `size`
        is 0.
    """
    from PIL import ImageOps

    modes, shapes = set(), {}
    for path in paths:
        with _opened(path) as image:
            modes.add(image.mode)
            shapes.setdefault(_turned_size(image), path)
        if image.mode in _DEEP:
            way_out = "it has more than 8 bits a channel; save it with 8"
            raise InputError("config.data.name", str(path), way_out)
    if len(shapes) > 1 and not size:
        (one, first), (other, second) = list(shapes.items())[:2]
        sizes = f"{first} is {one[0]}x{one[1]} and {second.name} {other[0]}x{other[1]}"
        raise InputError("config.data.size", 0, f"{sizes}; set the size that all images get")
    color = "gray" if modes <= set(_GRAY) else "rgb"
    if size:
        check_memory("config.data.size", size, len(paths) * (1 if color == "gray" else 3))
    width, height = (size, size) if size else next(iter(shapes))
    images = np.empty((len(paths), height, width, 1 if color == "gray" else 3), np.uint8)
    for i, path in enumerate(paths):
        with _opened(path) as image:
            pixels = _pixels(ImageOps.exif_transpose(image), color)
        images[i] = fitted(pixels, size) if size and pixels.shape[:2] != (size, size) else pixels
    return images


@contextlib.contextmanager
def _opened(path: Path) -> "Iterator[Image.Image]":
    """Opens an image file; what is wrong with it, then or while it is read, is an InputError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises whatever it likes
        way_out = f"it is damaged, or no image ({last_line(error)}); remove or restore it"
        raise InputError("config.data.name", str(path), way_out) from error


def _turned_size(image: "Image.Image") -> tuple[int, int]:
    from PIL import ExifTags

    width, height = image.size
    lies = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if lies else (width, height)


def _pixels(image: "Image.Image", color: Color) -> np.ndarray:
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if color == "gray" else "RGB")
    return np.asarray(image).reshape(image.height, image.width, -1)
