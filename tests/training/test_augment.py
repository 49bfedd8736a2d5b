"""augment: random views are shifts and mirror images of what they are views of, by the key
alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.errors import InputError
from ncjax.training.augment import augment

IMAGES = jnp.asarray(np.random.default_rng(0).integers(1, 256, (200, 6, 5, 2)), jnp.uint8)


def find_view(view, image, mirrored):
    """(row, column) of the corner of the view in the padded image; None: it is no view of it."""
    padded = np.pad(image[:, ::-1] if mirrored else image, [(4, 4), (4, 4), (0, 0)])
    places = [
        (i, j)
        for i in range(9)
        for j in range(9)
        if np.array_equal(padded[i : i + 6, j : j + 5], view)
    ]
    return places[0] if len(places) == 1 else None


def test_none_is_the_images_themselves():
    assert augment("none", jax.random.key(0), IMAGES) is IMAGES


def test_crops_are_shifts_by_up_to_4_pixels_each_as_likely():
    views = np.asarray(augment("crop", jax.random.key(0), IMAGES))
    assert views.dtype == np.uint8
    corners = [
        find_view(view, image, mirrored=False)
        for view, image in zip(views, np.asarray(IMAGES), strict=True)
    ]
    # A view whose every pixel is border (a corner at 0 or 8 both ways leaves some) would be
    # ambiguous: none is.
    assert None not in corners
    counts = np.zeros((2, 9))
    for corner in corners:
        for axis in (0, 1):
            counts[axis, corner[axis]] += 1
    # 200 draws in 9 bins: the mean is 22, the standard deviation 4.4.
    assert counts.min() > 5
    assert counts.max() < 45


def test_half_of_the_images_are_mirrored():
    views = np.asarray(augment("crop_flip", jax.random.key(3), IMAGES))
    mirrored = [
        find_view(view, image, True) is not None
        for view, image in zip(views, np.asarray(IMAGES), strict=True)
    ]
    straight = [
        find_view(view, image, False) is not None
        for view, image in zip(views, np.asarray(IMAGES), strict=True)
    ]
    assert all(a != b for a, b in zip(mirrored, straight, strict=True))
    assert 70 < sum(mirrored) < 130  # of 200: five standard deviations are 35


def test_the_key_decides():
    first, again, other = (augment("crop_flip", jax.random.key(k), IMAGES) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_augmentation_that_there_is_not_is_refused(without_type_checks):
    with pytest.raises(InputError, match=r"^augment: got 'flip'"):
        augment("flip", jax.random.key(0), IMAGES)
