"""data: balance, statistics, determinism, caching and, where prepared, real TFDS sets."""

import pwd
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ncjax.config import DataConfig
from ncjax.data import cache, preparation, sources
from ncjax.data.dataset import Dataset, Split
from ncjax.errors import InputError
from ncjax.training import compilation


def load(name, **fields):
    return preparation.load(DataConfig(name=name, **fields))


def raw_of(train, test, names):
    return Dataset(train, test, names, "toy")


def split_of(counts, start=0):
    """counts[c] examples of class c, classes interleaved; each image holds its own number."""
    labels = np.concatenate([np.full(n, c) for c, n in enumerate(counts)]).astype(np.int32)
    labels = np.random.default_rng(0).permutation(labels)
    return Split(np.arange(start, start + len(labels), dtype=np.float32)[:, None], labels)


def rows(split):
    return {image.tobytes() for image in split.images}


def test_digits_has_145_training_and_29_test_scans_of_each_class():
    digits = load("digits")
    assert digits.train.images.shape == (1450, 8, 8, 1)
    assert digits.test.images.shape == (290, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    np.testing.assert_array_equal(digits.train.labels, np.repeat(np.arange(10), 145))
    np.testing.assert_array_equal(digits.test.labels, np.repeat(np.arange(10), 29))
    assert digits.label_names == tuple("0123456789")
    assert digits.num_classes == 10


def test_digits_splits_are_disjoint_and_hold_the_scans_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    all_scans = {
        (image.astype(np.uint8).tobytes(), label)
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    digits = load("digits")
    train, test = (
        {(image.tobytes(), label) for image, label in zip(s.images, s.labels, strict=True)}
        for s in (digits.train, digits.test)
    )
    assert len(all_scans) == 1797  # no scan occurs twice, so that sets tell them apart
    assert train <= all_scans
    assert test <= all_scans
    assert not train & test


def test_checksums_are_those_of_the_bytes_behind_a_header_of_dtype_and_shape():
    drawn = load("digits", per_class=20, pad=10)
    arrays = {
        "train_images": drawn.train.images,
        "train_labels": drawn.train.labels,
        "test_images": drawn.test.images,
        "test_labels": drawn.test.labels,
    }
    expected = {
        k: zlib.crc32(f"{a.dtype.str}{a.shape}".encode() + a.tobytes()) for k, a in arrays.items()
    }
    assert preparation.checksums(drawn) == expected
    assert (
        expected["train_images"]
        == preparation.checksums(load("digits", per_class=20, pad=10))["train_images"]
    )


def test_one_flipped_bit_another_dtype_or_shape_change_one_checksum():
    drawn = load("synthetic", num_classes=3, per_class=4)
    before, images = preparation.checksums(drawn), drawn.test.images.copy()
    images.view(np.uint8)[5, 3] ^= 1
    changed = {"test_images": images, "test_labels": drawn.test.labels.astype(np.int64)}
    changed_shape = drawn.test.images.reshape(-1, 2, 16)
    for part, array in (*changed.items(), ("test_images", changed_shape)):
        after = preparation.checksums(
            drawn._replace(test=drawn.test._replace(**{part.removeprefix("test_"): array}))
        )
        assert {name for name in before if after[name] != before[name]} == {part}


@pytest.mark.parametrize("name", ["digits", "synthetic", "identity"])
def test_loading_twice_gives_the_same_bits(name):
    first, second = load(name), load(name)
    for a, b in zip(
        (*first.train, *first.test, first.center),
        (*second.train, *second.test, second.center),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_smaller_per_class_is_a_subset_and_shrinks_the_test_split_alike():
    whole, part = load("digits"), load("digits", per_class=50)
    assert np.bincount(part.train.labels).tolist() == [50] * 10
    assert np.bincount(part.test.labels).tolist() == [10] * 10  # 29 * 50/145
    first_50 = whole.train.images.reshape(10, 145, 8, 8, 1)[:, :50].reshape(500, 8, 8, 1)
    np.testing.assert_array_equal(part.train.images, first_50)


def test_every_class_shrinks_to_the_smallest_keeping_the_order_of_the_set():
    train, test = split_of([7, 4, 9]), split_of([6, 3, 5], start=100)
    balanced, balanced_test = preparation._choose(
        raw_of(train, test, ("a", "b", "c")), DataConfig()
    )
    np.testing.assert_array_equal(balanced.labels, np.repeat([0, 1, 2], 4))
    np.testing.assert_array_equal(balanced_test.labels, np.repeat([0, 1, 2], 3))
    for c in range(3):
        np.testing.assert_array_equal(
            balanced.images[balanced.labels == c], train.images[train.labels == c][:4]
        )


@pytest.mark.parametrize("per_class", [146, 10**6])
def test_too_large_per_class_names_field_value_and_most(per_class):
    with pytest.raises(InputError, match=rf"^config\.data\.per_class: got {per_class};.* 145 "):
        load("digits", per_class=per_class)


def test_a_test_split_without_some_class_is_refused():
    with pytest.raises(InputError, match=r"^config\.data\.name: "):
        preparation._choose(raw_of(split_of([3, 3]), split_of([3]), ("a", "b")), DataConfig())


def test_num_classes_of_a_set_that_decides_itself_is_refused():
    with pytest.raises(InputError, match=r"^config\.data\.num_classes: got 3; .*digits"):
        load("digits", num_classes=3)


def normalized(dataset):
    return (dataset.train.images.astype(np.float64) - dataset.center) * dataset.scale


@pytest.mark.parametrize("input_scale", [2.0, 0.5])
def test_centred_training_inputs_have_the_mean_norm_asked_for(input_scale):
    x = normalized(load("digits", input_scale=input_scale)).reshape(1450, 64)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-13)
    assert np.mean([np.sqrt(row @ row) for row in x]) == pytest.approx(input_scale, rel=1e-12)


def test_standardized_channels_have_mean_0_and_variance_1_over_images_and_pixels():
    rng = np.random.default_rng(0)
    # More than one chunk of the statistics.
    images = rng.integers(0, 256, (5000, 3, 4, 2)).astype(np.uint8)
    images[..., 1] //= 3
    center, scale = preparation._statistics(images, 2.0, True)
    x = (images - center) * scale
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((x**2).mean((0, 1, 2)), 1, rtol=1e-12)
    assert np.ptp(center, axis=(0, 1)).max() == 0  # one mean per channel, not per pixel


def test_standardized_vectors_have_mean_0_and_variance_1_per_coordinate():
    x = normalized(load("synthetic", num_classes=3, per_class=20, standardize=True))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x.var(0), 1, rtol=1e-12)


def test_a_constant_channel_is_centred_and_left():
    center, scale = preparation._statistics(np.full((4, 2, 2, 1), 7, np.uint8), 2.0, True)
    np.testing.assert_array_equal((np.full((2, 2, 1), 7) - center) * scale, np.zeros((2, 2, 1)))


@pytest.mark.parametrize("standardize", [False, True])
def test_undefined_pixels_are_refused(standardize):
    images = np.zeros((4, 2, 2, 1), np.float32)
    images[2, 1] = np.nan
    with pytest.raises(InputError, match=r"^config\.data\.name: .*undefined"):
        preparation._statistics(images, 2.0, standardize)


def test_equal_images_have_no_mean_norm_and_are_refused():
    with pytest.raises(InputError, match=r"^config\.data\.name: .*equal images"):
        preparation._statistics(np.full((4, 2, 2, 1), 7, np.uint8), 2.0, False)


def test_a_set_of_one_class_is_refused():
    with pytest.raises(InputError, match=r"^config\.data\.name: .*one class"):
        preparation._choose(raw_of(split_of([3]), split_of([3]), ("a",)), DataConfig())


def test_synthetic_classes_scatter_with_variance_1_about_means_common_to_both_splits():
    drawn = load("synthetic", num_classes=4, per_class=500)
    assert (
        np.bincount(drawn.train.labels).tolist()
        == np.bincount(drawn.test.labels).tolist()
        == [500] * 4
    )
    for c in range(4):
        train, test = (
            s.images[s.labels == c].astype(np.float64) for s in (drawn.train, drawn.test)
        )
        # Means of 500 standard normals: standard deviation 0.045, of their difference 0.063.
        np.testing.assert_allclose(train.mean(0), test.mean(0), atol=0.35)
        assert train.var(0).mean() == pytest.approx(1, abs=0.05)
    assert (
        np.std(
            [drawn.train.images[drawn.train.labels == c].mean(0) for c in range(4)], axis=0
        ).mean()
        > 0.3
    )
    assert not rows(drawn.train) & rows(drawn.test)


def test_identity_gives_one_coordinate_to_each_example_and_does_not_center_it():
    unit = load("identity", num_classes=3, per_class=2)
    np.testing.assert_array_equal(normalized(unit), np.eye(6))
    np.testing.assert_array_equal(unit.train.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(unit.test.images, unit.train.images)


def test_every_sixth_example_of_each_class_is_held_out():
    whole = split_of([13, 6, 5])
    train, test = preparation._hold_out(whole, 1 / 6)
    assert np.bincount(test.labels, minlength=3).tolist() == [2, 1, 0]
    assert len(train.labels) + len(test.labels) == 24
    assert not rows(train) & rows(test)
    np.testing.assert_array_equal(
        test.images[test.labels == 0], whole.images[whole.labels == 0][[5, 11]]
    )


def test_examples_without_a_label_are_dropped():
    unlabelled = Split(np.arange(4.0)[:, None], np.array([-1, 1, -1, 0], np.int32))
    raw = sources._only_present_classes(unlabelled, unlabelled, "ab".__getitem__, "toy")
    assert raw.label_names == ("a", "b")
    assert (raw.train.labels.tolist(), raw.train.images.ravel().tolist()) == ([1, 0], [1.0, 3.0])


def test_declared_classes_without_a_training_example_are_dropped_and_the_others_renumbered():
    train = Split(np.arange(4.0)[:, None], np.array([3, 1, 3, 1], np.int32))
    test = Split(np.arange(3.0)[:, None], np.array([0, 1, 3], np.int32))
    raw = sources._only_present_classes(train, test, "abcd".__getitem__, "toy")
    assert raw.label_names == ("b", "d")
    assert raw.train.labels.tolist() == [1, 0, 1, 0]
    assert (raw.test.labels.tolist(), raw.test.images.ravel().tolist()) == ([0, 1], [1.0, 2.0])


class Maker:
    """A decoder that counts how often it is asked."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return raw_of(split_of([4, 3]), split_of([2, 2]), ("a", "b"))


def assert_is_made(raw):
    for got, expected in zip(
        (*raw.train, *raw.test), (*split_of([4, 3]), *split_of([2, 2])), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert raw.label_names == ("a", "b")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the decoded set `toy` is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ncjax" / "datasets" / "toy"


def cached(make, sources=None):
    return cache.cached("toy", make, sources)


def replace(path, content):
    """New bytes by rename: arrays that are mapped into memory must not shrink under their
    reader.
    """
    path.with_name("new").write_bytes(content)
    path.with_name("new").rename(path)


def test_a_set_is_decoded_once_and_its_cache_appears_whole(folder, capsys):
    make = Maker()
    assert_is_made(cached(make))
    assert_is_made(cached(make))
    assert make.calls == 1
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]
    assert capsys.readouterr().err == ""


CACHE = [
    *("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"),
    *("label_names.json", "checksums.json"),
]
DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-3],
    "extended": lambda content: content + b"0",
    "not numpy": lambda content: b"junk",
    "not a dict": lambda content: b"[]",
    "deep": lambda content: b"[" * 100_000,
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "middle bit": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 4])
        + content[len(content) // 2 + 1 :]
    ),
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
@pytest.mark.parametrize("part", CACHE)
def test_a_damaged_cache_is_decoded_again_and_replaced_and_that_is_said(
    damage, part, folder, capsys
):
    make = Maker()
    cached(make)
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(sound) == sorted(CACHE)
    if damage == "missing":
        (folder / part).unlink()
    else:
        replace(folder / part, DAMAGE[damage](sound[part]))
    assert_is_made(cached(make))
    assert make.calls == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"warning: the decoded data in {folder} ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound
    assert_is_made(cached(make))
    assert (make.calls, capsys.readouterr().err) == (2, "")


def test_labels_cut_short_are_not_trained_on(folder):
    make = Maker()
    cached(make)
    np.save(folder / "short.npy", np.load(folder / "train_labels.npy")[:-1])
    (folder / "short.npy").rename(folder / "train_labels.npy")
    assert_is_made(cached(make))
    assert make.calls == 2


def test_one_flipped_bit_in_the_cached_digits_gives_the_same_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = preparation.checksums(load("digits"))
    (path,) = tmp_path.glob("ncjax/datasets/digits-*/train_images.npy")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert preparation.checksums(load("digits")) == before
    assert "train_images.npy" in capsys.readouterr().err


def test_a_set_whose_source_has_changed_is_decoded_again_and_that_is_said(folder, capsys):
    make = Maker()
    for states, calls in (
        ({"a": [1, 2]}, 1),
        ({"a": [1, 2]}, 1),
        ({"a": [1, 3]}, 2),
        ({"b": [1, 3]}, 3),
    ):
        assert_is_made(cached(make, states))
        assert make.calls == calls
    said = capsys.readouterr().err.splitlines()
    assert [line.split("changed: ")[1].split(")")[0] for line in said] == ["a", "a, b"]


def test_a_decoder_that_fails_leaves_no_cache(folder):
    def fail():
        raise RuntimeError("decoder")

    with pytest.raises(RuntimeError, match="decoder"):
        cached(fail)
    assert not folder.parent.exists()


def test_where_no_cache_can_be_written_each_run_decodes_anew(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make = Maker()
    for _ in range(2):
        assert_is_made(cached(make))
    assert make.calls == 2


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the machine does not know, and no HOME."""

    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_cache_that_must_not_be_read_is_passed_over(folder, monkeypatch, capsys):
    make = Maker()
    cached(make)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert_is_made(cached(make))
    assert capsys.readouterr().err.count("Permission denied") == 1


def test_a_user_without_a_home_decodes_each_time(homeless):
    make = Maker()
    for _ in range(2):
        assert_is_made(cached(make))
    assert make.calls == 2


def test_a_user_without_a_home_compiles_each_time(homeless, monkeypatch):
    changes = []
    config = SimpleNamespace(update=lambda *change: changes.append(change))
    monkeypatch.setattr(compilation.jax, "config", config)
    compilation.use_cache("user")
    assert changes == []


def test_a_user_without_a_home_is_asked_for_the_folder_of_data(homeless):
    with pytest.raises(
        InputError, match=r"^config\.data\.dir: got '~/tensorflow_datasets'; .* HOME"
    ):
        load("mnist")


TFDS = {
    "mnist": {
        "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        "train_mean": [0.13066],
        "test_mean": [0.13252],
        "shape": (28, 28, 1),
        "test": 10000,
    },
    "cifar10": {
        "train": [5000] * 10,
        "train_mean": [0.49140, 0.48216, 0.44653],
        "test_mean": [0.49421, 0.48513, 0.45041],
        "shape": (32, 32, 3),
        "test": 10000,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_prepared_tfds_set_is_read_in_full_balanced_and_cached(name, tfds_dir, cache_home):
    known, raw = TFDS[name], sources.read(DataConfig(name=name, dir=tfds_dir))
    assert np.bincount(raw.train.labels).tolist() == known["train"]
    assert len(raw.test.labels) == known["test"]
    for split, mean in ((raw.train, known["train_mean"]), (raw.test, known["test_mean"])):
        assert split.images.shape[1:] == known["shape"]
        assert split.images.dtype == np.uint8
        pixels = sum(
            chunk.sum((0, 1, 2), dtype=np.int64) for chunk in np.array_split(split.images, 8)
        )
        got = pixels / (split.images.size / known["shape"][-1]) / 255
        np.testing.assert_allclose(got, mean, atol=6e-6)
    assert any(
        folder.name.startswith(f"{name}-")
        for folder in (cache_home / "ncjax" / "datasets").iterdir()
    )

    part = load(name, dir=tfds_dir, per_class=30)
    assert np.bincount(part.train.labels).tolist() == [30] * 10
    assert len(set(np.bincount(part.test.labels))) == 1
    for c in range(10):
        np.testing.assert_array_equal(
            part.train.images[part.train.labels == c], raw.train.images[raw.train.labels == c][:30]
        )


@pytest.mark.slow
def test_mnist_may_have_at_most_the_size_of_its_smallest_class(tfds_dir):
    with pytest.raises(InputError, match=r"^config\.data\.per_class: got 5422;.* 5421 "):
        load("mnist", dir=tfds_dir, per_class=5422)
