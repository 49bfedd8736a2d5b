"""Runs of a user's own arrays: trained from Python, continued, loaded and verified with the same
arrays alone.
"""

import json

import numpy as np
import pytest
import xarray as xr
from PIL import Image

import ncjax
from ncjax import plan
from ncjax.cli import show
from ncjax.data import preparation
from ncjax.storage import checkpoint
from tests.helpers import small_config

CLASSES = ("ant", "bee", "cow")
# The shapes of conftest's `trained`: its program is compiled once.
SETTINGS = {"data.num_classes": 0, "model.head_bias": "free", "sweep.weight_decay": (0.0, 1e-3)}


def vectors(seed=0):
    """20 training and test vectors of three Gaussian classes each, as arguments."""
    rng = np.random.default_rng(seed)
    labels = np.tile(range(3), 20)
    means = 3 * rng.standard_normal((3, 32))
    train, test = (means[labels] + rng.standard_normal((60, 32)) for _ in range(2))
    names = np.array(CLASSES)[labels]
    return {
        "train_images": train.astype(np.float32),
        "train_labels": names,
        "test_images": test.astype(np.float32),
        "test_labels": names,
    }


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """WORKDIR of a run of `vectors`."""
    workdir = tmp_path_factory.mktemp("arrays")
    dataset = ncjax.Dataset.from_arrays(**vectors(), name="insects")
    ncjax.train(small_config(**SETTINGS), workdir, dataset=dataset)
    return workdir


def continued(workdir, dataset=None, **changes):
    config = small_config(**SETTINGS | {"data.name": "arrays:insects"} | changes)
    return ncjax.train(config, workdir, dataset=dataset)


def test_a_run_records_the_name_the_classes_and_the_checksums_of_its_arrays(arrays):
    history = xr.load_dataset(arrays / "history.nc")
    assert history["label"].values.tolist() == list(CLASSES)
    config = json.loads((arrays / "config.json").read_text())
    assert config["data"]["name"] == "arrays:insects"
    given = ncjax.Dataset.from_arrays(**vectors())
    prepared = preparation.load(small_config(**SETTINGS).data, given)
    stored = checkpoint.read_metadata(arrays / "checkpoints", 6).data
    assert stored == preparation.checksums(prepared)


def test_it_is_read_again_with_the_same_arrays_alone(arrays, tmp_path):
    same = ncjax.Dataset.from_arrays(**vectors(), name="insects")
    assert continued(arrays, same).sizes["epoch"] == 7
    others = ncjax.Dataset.from_arrays(**vectors(1), name="insects")
    for dataset, why in ((None, "dataset="), (others, "train_images, test_images differ")):
        with pytest.raises(ncjax.InputError, match=rf"^config\.data\.name: .*{why}") as caught:
            continued(arrays, dataset)
        assert "\n" not in str(caught.value)


def test_load_run_takes_the_arrays(arrays):
    given = vectors()
    dataset = ncjax.Dataset.from_arrays(**given)
    run = ncjax.load_run(arrays, weight_decay=0, seed=0, dataset=dataset)
    x = given["train_images"].astype(np.float64)
    scale = 2 / np.linalg.norm(x - x.mean(0), axis=1).mean()
    np.testing.assert_allclose(run.normalize(x), (x - x.mean(0)) * scale, atol=1e-5)
    without = ncjax.load_run(arrays, weight_decay=0, seed=0)
    assert without.params["head"]["kernel"].shape == (8, 3)
    others = ncjax.Dataset.from_arrays(**vectors(1))
    for run in (without, ncjax.load_run(arrays, weight_decay=0, seed=0, dataset=others)):
        with pytest.raises(ncjax.InputError, match=r"^config\.data\.name: "):
            run.normalize(x)


@pytest.mark.slow
def test_verify_takes_them_as_a_npz(arrays, tmp_path, capsys):
    np.savez(tmp_path / "same.npz", **vectors())
    np.savez(tmp_path / "others.npz", **vectors(1))
    assert show.main([str(arrays), "--verify", "--data", str(tmp_path / "same.npz")]) == 0
    capsys.readouterr()
    for options in ([], ["--data", str(tmp_path / "others.npz")]):
        assert show.main([str(arrays), "--verify", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert show.main([str(arrays), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data_checksums"] == checkpoint.read_metadata(arrays / "checkpoints", 6).data


@pytest.mark.slow
def test_a_npz_trains_to_the_bits_of_its_arrays(arrays, tmp_path):
    np.savez(tmp_path / "insects.npz", **vectors())
    config = small_config(**SETTINGS | {"data.name": str(tmp_path / "insects.npz")})
    history = ncjax.train(config, tmp_path / "run")
    expected = xr.load_dataset(arrays / "history.nc")
    xr.testing.assert_equal(history, expected)
    assert ncjax.load_run(tmp_path / "run", weight_decay=0, seed=0).logits(
        vectors()["test_images"]
    ).shape == (60, 3)


@pytest.mark.slow
def test_cifar10_as_a_folder_of_png_and_as_a_npz_trains_to_the_bits_of_tfds(tfds_dir, tmp_path):
    config = ncjax.Config()
    config.data.name, config.data.dir, config.data.per_class = "cifar10", tfds_dir, 40
    config.model.widths, config.train.epochs, config.train.batch_size = (32, 32), 2, 50
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-3), (0, 1)
    expected = ncjax.train(config, tmp_path / "tfds")
    prepared = preparation.load(config.data)
    names = prepared.label_names
    np.savez(
        tmp_path / "cifar10.npz",
        train_images=prepared.train.images,
        train_labels=prepared.train.labels,
        test_images=prepared.test.images,
        test_labels=prepared.test.labels,
        label_names=names,
    )
    for split in ("train", "test"):
        for i, (image, label) in enumerate(zip(*getattr(prepared, split), strict=True)):
            folder = tmp_path / "folder" / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05d}.png")
    for name in ("cifar10.npz", "folder"):
        config.data.name, config.data.dir = str(tmp_path / name), ""
        found = preparation.load(config.data)
        assert preparation.checksums(found) == preparation.checksums(prepared)
        assert found.label_names == names
        history = ncjax.train(config, tmp_path / f"run_{name}")
        xr.testing.assert_equal(history, expected)


def test_a_config_is_not_changed_by_the_arrays_that_are_given_with_it():
    given = ncjax.Dataset.from_arrays(**vectors(), name="insects")
    config = small_config(**SETTINGS)
    examined = plan.examine(config, None, given)
    assert examined.config.data.name == "arrays:insects"
    assert config.data.name == "synthetic"
