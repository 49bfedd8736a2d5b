"""data.classes: how many training examples each class gets, and what is refused."""

import numpy as np
import pytest

import ncjax
from ncjax import plan
from ncjax.config import DataConfig, parse_classes
from ncjax.data import preparation
from ncjax.errors import InputError
from tests.helpers import small_config

AVAILABLE = (50, 90, 60, 120)


def made(classes, **fields):
    """Examples that hold their place in the set; 30 test examples of every class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(range(4), AVAILABLE))
    places = np.arange(len(labels), dtype=np.float32)
    given = ncjax.Dataset.from_arrays(
        np.stack([places, places % 7], axis=1), labels, np.eye(120, 2), np.repeat(range(4), 30)
    )
    return given, preparation.load(DataConfig(name=given.name, classes=classes, **fields), given)


@pytest.mark.parametrize(
    ("classes", "fields", "sizes", "test"),
    [
        ("balanced", {}, [50] * 4, 30),
        ("balanced", {"per_class": 20}, [20] * 4, 12),
        ("natural", {}, list(AVAILABLE), 30),
        ("natural", {"per_class": 55}, [50, 55, 55, 55], 30),
        # 50, of which 10^(-1/3) and its powers are left: 23.2, 10.8, 5
        ("exponential:10", {}, [50, 23, 10, 5], 30),
        ("exponential:8", {"per_class": 40}, [40, 20, 10, 5], 24),
        ("exponential:1", {}, [50] * 4, 30),
        ("step:10", {}, [50, 50, 5, 5], 30),
        ("step:10:1", {}, [50, 50, 50, 5], 30),
        ("step:2.5:3", {"per_class": 25}, [25, 10, 10, 10], 15),
    ],
)
def test_classes_have_the_sizes_of_the_profile(classes, fields, sizes, test):
    given, data = made(classes, **fields)
    assert list(data.class_sizes) == sizes
    assert data.is_balanced == (len(set(sizes)) == 1)
    assert np.bincount(data.test.labels).tolist() == [test] * 4
    for c, size in enumerate(sizes):  # the first of the class, in the order of the set
        expected = given.train.images[given.train.labels == c][:size]
        np.testing.assert_array_equal(data.train.images[data.train.labels == c], expected)


def test_an_exponential_profile_takes_as_many_as_a_small_class_allows():
    labels = np.repeat(range(3), (1000, 1000, 7))
    given = ncjax.Dataset.from_arrays(np.arange(2007.0)[:, None], labels, np.eye(3, 1), [0, 1, 2])
    data = preparation.load(DataConfig(name=given.name, classes="exponential:100"), given)
    assert data.class_sizes == (700, 70, 7)


@pytest.mark.parametrize(
    ("classes", "fields", "field"),
    [
        ("step:10:4", {}, "classes"),
        ("step:100", {}, "classes"),  # half an example
        ("exponential:100", {"per_class": 50}, "classes"),
        ("step:2", {"per_class": 91}, "per_class"),
        ("balanced", {"per_class": 51}, "per_class"),
    ],
)
def test_sizes_that_cannot_be_had_are_one_line(classes, fields, field):
    with pytest.raises(InputError, match=rf"^config\.data\.{field}: ") as caught:
        made(classes, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "uneven", "balanced:2", "natural:1", "exponential", "exponential:", "step"),
        *("exponential:0.5", "exponential:nan", "exponential:inf", "exponential:2:3"),
        *("step:10:0", "step:10:1.5", "step:x", "step:10:2:1", "step:-3", "STEP:3"),
    ],
)
def test_a_profile_that_does_not_exist_is_refused(text):
    assert parse_classes(text) is None
    with pytest.raises(InputError, match=r"^config\.data\.classes: got .* must be balanced"):
        plan.examine(small_config(**{"data.classes": text}), None)
