"""Sources: arrays, .npz files and folders of images give the same data, and bad ones a line."""

import contextlib
import shutil

import numpy as np
import pytest
from PIL import Image

import ncjax
from ncjax.config import DataConfig
from ncjax.data import images as image_files
from ncjax.data import preparation, sources
from ncjax.errors import InputError

CLASSES = ("ant", "bee", "cow")


def load(name, given=None, **fields):
    return preparation.load(DataConfig(name=str(name), **fields), given)


def examples(seed, counts, channels=3, side=6):
    """Images (M, side, side, channels) of noise, and labels, classes interleaved."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return rng.integers(0, 256, (len(labels), side, side, channels)).astype(np.uint8), labels


def write_folder(root, splits, names=CLASSES):
    for split, (images, labels) in splits.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(folder / f"{i:05d}.png")
    return root


def by_part(splits):
    return {
        f"{split}_{part}": array
        for split, pair in splits.items()
        for part, array in zip(("images", "labels"), pair, strict=True)
    }


@pytest.fixture(scope="module")
def splits():
    return {"train": examples(0, (9, 7, 8)), "test": examples(1, (4, 3, 5))}


@pytest.fixture
def folder(splits, tmp_path):
    return write_folder(tmp_path / "insects", splits)


@pytest.fixture
def npz(splits, tmp_path):
    np.savez(tmp_path / "insects.npz", **by_part(splits), label_names=np.array(CLASSES))
    return tmp_path / "insects.npz"


def assert_same(a, b):
    assert preparation.checksums(a) == preparation.checksums(b)
    np.testing.assert_array_equal(a.center, b.center)
    np.testing.assert_array_equal(a.scale, b.scale)
    assert a.label_names == b.label_names


@pytest.mark.parametrize(
    "fields", [{}, {"per_class": 5, "pad": 8}, {"size": 4, "color": "gray"}, {"standardize": True}]
)
def test_a_folder_a_npz_and_arrays_of_the_same_images_are_the_same_data(
    fields, folder, npz, splits
):
    given = ncjax.Dataset.from_arrays(**by_part(splits), label_names=CLASSES)
    one = load(folder, **fields)
    assert_same(load(npz, **fields), one)
    assert_same(load(given.name, given, **fields), one)
    assert one.label_names == CLASSES


def test_images_and_labels_are_those_that_were_given(folder, splits):
    found = load(folder)
    for split, most in (("train", 7), ("test", 3)):
        images, labels = splits[split]
        expected = np.concatenate([images[labels == c][:most] for c in range(3)])
        np.testing.assert_array_equal(getattr(found, split).images, expected)
        np.testing.assert_array_equal(getattr(found, split).labels, np.repeat(range(3), most))


def test_a_folder_is_decoded_once_and_anew_where_a_file_has_changed(folder, capsys, monkeypatch):
    before = load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(sources.folder, "read", None)
        assert_same(load(folder), before)
    path = next((folder / "train" / "ant").iterdir())
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(path)
    changed = load(folder)
    assert preparation.checksums(changed) != preparation.checksums(before)
    assert "files" in capsys.readouterr().err


def test_gray_files_have_one_channel_and_three_beside_colour(tmp_path):
    gray, colour = examples(0, (2, 2), channels=1), examples(1, (2, 2))
    root = write_folder(tmp_path / "mixed", {"train": gray, "test": gray}, "ab")
    assert load(root).train.images.shape[1:] == (6, 6, 1)
    shutil.rmtree(root / "test")
    write_folder(root, {"test": colour}, "ab")
    mixed = load(root)
    assert mixed.train.images.shape[1:] == mixed.test.images.shape[1:] == (6, 6, 3)
    assert (mixed.train.images == mixed.train.images[..., :1]).all()


def test_transparent_pixels_lie_over_black_and_palettes_are_colours(tmp_path):
    pixels = np.full((4, 4, 4), (200, 100, 50, 255), np.uint8)
    pixels[0, :, 3] = 0
    for label in "ab":
        for i in range(2):
            (tmp_path / "train" / label).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels)
            if label == "b":
                image = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
            image.save(tmp_path / "train" / label / f"{i}.png")
    found = load(tmp_path, test_fraction=0.5).train.images
    assert found[0, 0].max() == 0
    np.testing.assert_array_equal(found[0, 1:], np.full((3, 4, 3), (200, 100, 50)))
    np.testing.assert_array_equal(found[1, 1:], np.full((3, 4, 3), (200, 100, 50)))


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows of the file are columns from the right
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(2):
            image = Image.fromarray(pixels if label == "a" else pixels // 2)
            image.save(tmp_path / "train" / label / f"{i}.jpg", exif=exif, quality=95)
    found = load(tmp_path, test_fraction=0.5).train.images
    assert found.shape == (2, 16, 8, 3)
    assert found[0, :8].min() > 250 > 5 > found[0, 8:].max()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resizing_takes_the_centred_square_and_keeps_a_constant(dtype):
    images = np.zeros((2, 8, 12, 2), dtype)
    images[:, :, 2:10] = 100
    found = preparation.images.resized(images, 4)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.full((2, 4, 4, 2), 100, dtype))


def test_halving_a_smooth_image_averages_pixels():
    ramp = np.broadcast_to(np.arange(0, 160, 10, np.float32)[None, :, None], (1, 16, 16, 1))
    found = preparation.images.resized(ramp, 8)[0, 4, 1:-1, 0]
    np.testing.assert_allclose(found, np.arange(5, 160, 20)[1:-1], rtol=1e-5)


def test_luma_and_opacity_of_numbers_are_those_of_the_definition():
    images = np.random.default_rng(0).random((3, 2, 2, 4)).astype(np.float32)
    over_black = images[..., :3].astype(np.float64) * images[..., 3:]
    luma = over_black @ [0.299, 0.587, 0.114]
    gray = preparation.images.in_color(images, "gray")
    np.testing.assert_allclose(gray[..., 0], luma, rtol=1e-6)
    np.testing.assert_allclose(preparation.images.in_color(images, "rgb"), over_black, rtol=1e-6)
    bytes_of = (images * 255).astype(np.uint8)
    expected = (bytes_of[..., :3] * (bytes_of[..., 3:] / 255)) @ [0.299, 0.587, 0.114]
    found = preparation.images.in_color(bytes_of, "gray")[..., 0]
    assert np.abs(found - expected).max() <= 1.5


def test_three_times_gray_is_rgb():
    images = examples(0, (2, 1), channels=1)[0]
    expected = np.repeat(images, 3, axis=-1)
    np.testing.assert_array_equal(preparation.images.in_color(images, "rgb"), expected)
    np.testing.assert_array_equal(preparation.images.in_color(expected, "gray"), images)


def test_numbers_that_name_classes_are_sorted_as_numbers(tmp_path):
    names = ("2", "10", "1")
    images, labels = examples(0, (2, 2, 2))
    root = write_folder(tmp_path, {"train": (images, labels), "test": (images, labels)}, names)
    assert load(root).label_names == ("1", "2", "10")


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
        (np.array([b"x", b"y", b"x", b"y"]), ("x", "y"), [0, 1, 0, 1]),
        (np.array(["q", "p"] * 2, object), ("p", "q"), [1, 0, 1, 0]),
        (np.array([7, -3, 7, -3], np.int8), ("-3", "7"), [1, 0, 1, 0]),
        (np.array([True, False] * 2), ("0", "1"), [1, 0, 1, 0]),
        (np.eye(3)[[2, 0, 2, 0]], ("0", "2"), [1, 0, 1, 0]),
        (np.array([["b"], ["a"], ["b"], ["a"]]), ("a", "b"), [1, 0, 1, 0]),
        (np.array([2**63, 5] * 2, np.uint64), ("5", str(2**63)), [1, 0, 1, 0]),
    ],
)
def test_labels_of_any_kind_are_numbered_in_order_and_keep_their_names(labels, names, numbers):
    dataset = ncjax.Dataset.from_arrays(np.eye(4), labels)
    assert dataset.label_names == names
    assert dataset.train.labels.tolist() == numbers
    assert dataset.train.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.arange(8).reshape(4, 2), np.uint8),
        (np.arange(8).reshape(4, 2) * 100, np.uint16),
        (np.arange(8).reshape(4, 2) - 1, np.float32),
        (np.arange(8.0).reshape(4, 2), np.float32),
        (np.ones((4, 2), np.float16), np.float32),
        (np.ones((4, 2), bool), np.uint8),
        ([[0, 1]] * 4, np.uint8),
    ],
)
def test_examples_become_a_type_that_is_trained_on(given, dtype):
    images = ncjax.Dataset.from_arrays(given, [0, 1, 0, 1]).train.images
    assert images.dtype == dtype
    np.testing.assert_array_equal(images, given)


def test_gray_images_without_a_channel_get_one():
    dataset = ncjax.Dataset.from_arrays(np.zeros((4, 5, 6), np.uint8), [0, 1, 0, 1])
    assert dataset.train.images.shape == (4, 5, 6, 1)


def test_whatever_has_array_or_dlpack_is_taken():
    values = np.arange(8, dtype=np.float32).reshape(4, 2)

    class Tensor:
        def __array__(self, dtype=None, copy=None):
            return values

    class Capsule:
        def __dlpack__(self, **options):
            return values.__dlpack__(**options)

        def __dlpack_device__(self):
            return values.__dlpack_device__()

    for given in (Tensor(), Capsule()):
        images = ncjax.Dataset.from_arrays(given, [0, 1, 0, 1]).train.images
        np.testing.assert_array_equal(images, values)


def test_jax_and_torch_arrays_are_taken():
    import jax.numpy as jnp

    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    kinds = [jnp.asarray(values), jnp.asarray(values, jnp.bfloat16)]
    with contextlib.suppress(ImportError):
        import torch

        kinds.append(torch.from_numpy(values))
    for given in kinds:
        found = ncjax.Dataset.from_arrays(given, jnp.array([0, 1, 0, 1]))
        np.testing.assert_array_equal(found.train.images, values)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_the_fraction_held_out_of_each_class_is_the_one_asked_for(fraction):
    sizes = (60, 120, 30)
    images, labels = np.arange(210.0)[:, None], np.repeat([0, 1, 2], sizes)
    held = preparation._hold_out(preparation.Split(images, labels), fraction)[1]
    for c, size in enumerate(sizes):
        assert abs((held.labels == c).sum() - fraction * size) < 1
        # Evenly: no stretch of the class is without.
        places = held.images[held.labels == c].ravel() - sum(sizes[:c])
        assert np.diff(places).max(initial=0) <= np.ceil(1 / fraction)


GOOD = {"train_images": np.eye(6), "train_labels": [0, 1, 2] * 2}
TESTED = GOOD | {"test_images": np.eye(6), "test_labels": [0, 1, 2] * 2}
NOT_A_NUMBER = np.where(np.eye(6) * np.arange(6) == 4, np.nan, 1.0)
BAD_ARRAYS = {
    "lengths": (GOOD | {"train_labels": [0, 1]}, "train_labels"),
    "NaN": (GOOD | {"train_images": NOT_A_NUMBER}, "train_images"),
    "infinite": (TESTED | {"test_images": np.full((6, 6), np.inf)}, "test_images"),
    "two of one-hot": (GOOD | {"train_labels": np.tri(6)}, "train_labels"),
    "missing labels": (GOOD | {"train_labels": [0, 1, 2, 0, 1, None]}, "train_labels"),
    "real labels": (GOOD | {"train_labels": [0.0, 1.5, 2, 0, 1, 2]}, "train_labels"),
    "complex": (GOOD | {"train_images": np.eye(6) * 1j}, "train_images"),
    "words": (GOOD | {"train_images": [["a"]] * 6}, "train_images"),
    "ragged": (GOOD | {"train_images": [[1, 2], [1]]}, "train_images"),
    "scalars": (GOOD | {"train_images": np.arange(6)}, "train_images"),
    "empty": (GOOD | {"train_images": np.zeros((0, 6))}, "train_images"),
    "channels first": (GOOD | {"train_images": np.zeros((6, 3, 8, 8))}, "train_images"),
    "shapes": (TESTED | {"test_images": np.eye(6)[:, :5]}, "test_images"),
    "types": (TESTED | {"test_images": np.eye(6, dtype=np.uint8)}, "test_images"),
    "no test labels": (GOOD | {"test_images": np.eye(6)}, "test_labels"),
    "foreign label": (TESTED | {"test_labels": [0, 1, 2, 0, 1, 3]}, "test_labels"),
    "words and numbers": (TESTED | {"test_labels": ["0"] * 6}, "test_labels"),
    "too few names": (GOOD | {"label_names": ["a", "b"]}, "train_labels"),
    "words by number": (GOOD | {"train_labels": list("abcabc"), "label_names": list("abc")}, ""),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bad_arrays_are_one_line_that_names_the_argument(what, tmp_path):
    arrays, part = BAD_ARRAYS[what]
    with pytest.raises(InputError, match=rf"^{part}") as caught:
        ncjax.Dataset.from_arrays(**arrays)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "field"),
    [
        (GOOD | {"train_labels": [0] * 6}, "name"),
        (TESTED | {"train_labels": [0, 1] * 3, "test_labels": [0] * 6}, "name"),
        (GOOD | {"label_names": list("abcd")}, "name"),
        (GOOD, "name"),  # of two examples none is a sixth
        (TESTED, "test_fraction"),
        (GOOD, "num_classes"),
    ],
)
def test_data_that_cannot_be_trained_on_are_one_line(arrays, field):
    given = ncjax.Dataset.from_arrays(**arrays)
    settings = DataConfig(name=given.name)
    if field != "name":
        setattr(settings, field, 0.5 if field == "test_fraction" else 3)
    with pytest.raises(InputError, match=rf"^config\.data\.{field}: ") as caught:
        preparation.load(settings, given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"junk",
        lambda content: content[: len(content) // 2],
        lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    ],
)
def test_a_damaged_npz_is_one_line(npz, change):
    npz.write_bytes(change(npz.read_bytes()))
    with pytest.raises(InputError, match=r"^config\.data\.name: got '.*insects\.npz'; it is dam"):
        load(npz)


def test_a_npz_that_is_missing_or_holds_other_arrays_is_one_line(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match=r"^config\.data\.name: .*No such file"):
        load(path)
    for arrays in ({}, {"x": 1}, {"train_images": np.eye(3)}, GOOD | {"train_labels": [0]}):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=r"^config\.data\.name: .*a\.npz'; "):
            load(path)
    np.savez(path, train_images=np.array([{}], object), train_labels=[1])
    with pytest.raises(InputError, match=r"^config\.data\.name: .*objects"):
        load(path)


def damaged(folder):
    path = next((folder / "train" / "bee").iterdir())
    path.write_bytes(path.read_bytes()[:60])
    return path.name


def empty_class(folder):
    (folder / "train" / "dog").mkdir()
    return "dog"


def class_without_test(folder):
    shutil.rmtree(folder / "test" / "cow")
    return "cow"


def foreign_file(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("")
    return "notes.txt"


def stray_file(folder):
    (folder / "train" / "list.csv").write_text("")
    return "list.csv"


def other_size(folder):
    Image.new("RGB", (5, 6)).save(folder / "test" / "ant" / "99999.png")
    return "size"


def deep(folder):
    pixels = np.arange(36, dtype=np.uint16).reshape(6, 6)
    Image.fromarray(pixels).save(folder / "train" / "ant" / "deep.png")
    return "deep.png"


@pytest.mark.parametrize(
    "spoil", [damaged, empty_class, class_without_test, foreign_file, stray_file, other_size, deep]
)
def test_a_folder_that_cannot_be_used_is_one_line_that_names_what_is_wrong(folder, spoil):
    named = spoil(folder)
    with pytest.raises(InputError, match=r"^config\.data\.") as caught:
        load(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../mnist", "/etc", ".", "~", "./no/such", "/\0", "." * 5000])
def test_a_path_that_is_no_folder_of_images_is_one_line(name):
    with pytest.raises(InputError, match=r"^config\.data\.name: .*train/CLASS") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_are_resized(folder):
    other_size(folder)
    found = load(folder, size=4)
    assert found.train.images.shape[1:] == found.test.images.shape[1:] == (4, 4, 3)


@pytest.mark.parametrize("fields", [{"size": 4}, {"color": "gray"}, {"pad": 40}])
def test_vectors_are_no_images(fields):
    with pytest.raises(InputError, match=rf"^config\.data\.{next(iter(fields))}: "):
        load("synthetic", **fields)


@pytest.mark.parametrize("field", ["size", "pad"])
def test_images_beyond_the_memory_are_refused_before_they_are_made(field, folder, monkeypatch):
    def resize(*_):
        pytest.fail("an image is resized")

    monkeypatch.setattr(image_files, "fitted", resize)
    for name in ("digits", str(folder)):
        with pytest.raises(InputError, match=rf"^config\.data\.{field}: got 800000; ") as caught:
            load(name, **{field: 800_000})
        assert "\n" not in str(caught.value)


def test_a_set_beyond_the_memory_is_refused_before_it_is_decoded(monkeypatch):
    """24 images of 64x64x3: 295 kB."""
    monkeypatch.setattr(image_files.environment, "physical_memory", lambda: 294_911)
    with pytest.raises(InputError, match=r"^config\.data\.size: "):
        image_files.check_memory("config.data.size", 64, 24 * 3)
    image_files.check_memory("config.data.size", 64, 23 * 3)


def test_arrays_from_python_are_asked_for():
    with pytest.raises(InputError, match=r"^config\.data\.name: got 'arrays:toy'; .*dataset="):
        load("arrays:toy")


def test_a_column_that_is_no_array_but_a_sequence_of_images_is_taken():
    images, labels = examples(0, (3, 3))

    class Column:
        """As Hugging Face's datasets have them."""

        def __init__(self, values):
            self._values = values

        def __len__(self):
            return len(self._values)

        def __getitem__(self, key):
            return self._values[key]

    pictures = Column([Image.fromarray(image) for image in images])
    for column in (Column(list(images)), pictures):
        found = ncjax.Dataset.from_arrays(column, Column(labels.tolist())).train
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, labels)
