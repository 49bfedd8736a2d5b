"""tfds_folder: what a prepared TFDS folder may hold, and that damage of it is one line."""

import io
import json
import random
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from ncjax.cli import train
from ncjax.config import DataConfig
from ncjax.data import preparation, tfds
from ncjax.errors import InputError

NAME = "toy"
COUNTS = {"train": (7, 6), "test": (8,)}
FEATURES = "tensorflow_datasets.core.features."


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "png")
    return buffer.getvalue()


def record(image, label):
    """One example as TFDS stores it: bytes of an encoded image, and the label."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def write_shard(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for one in records:
        writer.write(one)
    writer.close()


def examples(seed, count, channels=1):
    """Images (count, 5, 4, channels) of noise; labels 0, 1, 2, 0, ..."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 5, 4, channels)).astype(np.uint8)
    return images, np.arange(count) % 3


def shard(folder, split, i):
    return folder / f"{NAME}-{split}.array_record-{i:05d}-of-{len(COUNTS[split]):05d}"


def make_set(root, channels=1):
    """A data set as TFDS prepares it: train in two shards, test in one, three classes; its
    images and labels.
    """
    folder = root / NAME / "1.0.0"
    folder.mkdir(parents=True)
    stored = {}
    for seed, (split, counts) in enumerate(COUNTS.items()):
        images, labels = stored[split] = examples(seed, sum(counts), channels)
        records = [
            record(encoded(image), label) for image, label in zip(images, labels, strict=True)
        ]
        for i, count in enumerate(counts):
            write_shard(shard(folder, split, i), records[sum(counts[:i]) :][:count])
    (folder / "features.json").write_text(json.dumps(features_of(channels), indent=4))
    (folder / "dataset_info.json").write_text(json.dumps(INFO, indent=2))
    (folder / "label.labels.txt").write_text("ant\nbee\ncow\n")
    return folder, stored


def features_of(channels):
    shape = {"dimensions": ["5", "4", str(channels)]}
    return {
        "pythonClassName": f"{FEATURES}features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{FEATURES}image_feature.Image",
                    "image": {"dtype": "uint8", "shape": shape, "encodingFormat": "png"},
                },
                "label": {
                    "pythonClassName": f"{FEATURES}class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": "3"},
                },
            }
        },
    }


INFO = {
    "name": NAME,
    "version": "1.0.0",
    "fileFormat": "array_record",
    "moduleName": "no.such.module",
    "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
    "splits": [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(count) for count in counts],
            "numBytes": "1000",
        }
        for split, counts in COUNTS.items()
    ],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy of the set that may be damaged."""
    return shutil.copytree(prepared[0], tmp_path / NAME / "1.0.0")


@pytest.fixture
def stored(prepared):
    return prepared[1]


def read(folder):
    return tfds.read(NAME, folder.parents[1], folder)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_is(contents, stored):
    for got, split in ((contents.train, "train"), (contents.held_out, "test")):
        for array, expected in zip(got, stored[split], strict=True):
            np.testing.assert_array_equal(array, expected)


def refusal(folder, name=NAME):
    with pytest.raises(InputError) as caught:
        tfds.read(name, folder.parents[1], folder)
    message = str(caught.value)
    assert message.startswith(f"config.data.name: got {name!r}; ")
    assert "\n" not in message
    return message


def test_a_set_is_read_shard_after_shard_with_the_names_of_its_classes(folder, stored):
    contents = read(folder)
    assert_is(contents, stored)
    assert contents.train.images.dtype == np.uint8
    assert contents.train.labels.dtype == np.int32
    assert [contents.class_name(label) for label in range(3)] == ["ant", "bee", "cow"]


def test_color_images_and_a_set_without_names_and_held_out_split(tmp_path):
    folder, stored = make_set(tmp_path, channels=3)
    (folder / "label.labels.txt").unlink()
    shard(folder, "test", 0).unlink()
    edit(folder / "dataset_info.json", lambda info: info["splits"].pop())
    contents = read(folder)
    np.testing.assert_array_equal(contents.train.images, stored["train"][0])
    assert contents.held_out is None
    assert contents.class_name(2) == "2"


def test_a_validation_split_stands_in_for_a_missing_test_split(folder, stored):
    for path in folder.glob("*-test*"):
        path.rename(folder / path.name.replace("test", "validation"))
    edit(folder / "dataset_info.json", lambda info: info["splits"][1].update(name="validation"))
    assert_is(read(folder), stored)


@pytest.mark.parametrize("name", ["no_such_set", "mnist:9.9.9", "emnist/letters", "a/../mnist"])
def test_a_set_that_is_not_prepared_names_field_place_and_command(name, tmp_path):
    with pytest.raises(InputError) as caught:
        preparation.load(DataConfig(name=name, dir=str(tmp_path)))
    message = str(caught.value)
    assert message.startswith(f"config.data.name: got {name!r}; ")
    assert str(tmp_path) in message
    assert 'pip install -e ".[prepare]"' in message
    assert f"tfds.builder({name!r}, data_dir={str(tmp_path)!r}" in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "version"), [("toy", "10.0.0"), ("toy:9.1.0", "9.1.0")])
def test_the_newest_prepared_version_is_taken_unless_one_is_named(name, version, tmp_path):
    for folder in ("9.1.0", "10.0.0", "2.0.0"):
        (tmp_path / "toy" / folder).mkdir(parents=True)
        (tmp_path / "toy" / folder / "dataset_info.json").write_text("{}")
    assert tfds.find(name, tmp_path).name == version


# Code and paths from data


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The name of a class in a module whose import leaves a trace."""
    (tmp_path / "hostile.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Image: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "hostile.Image"
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name"])
@pytest.mark.parametrize("feature", ["image", "label"])
def test_a_foreign_class_of_the_image_or_the_label_is_refused_and_not_imported(
    folder, trap, feature, key
):
    def change(features):
        one = features["featuresDict"]["features"][feature]
        del one["pythonClassName"]
        one[key] = trap

    edit(folder / "features.json", change)
    assert f"{feature} is {trap}" in refusal(folder)


def nested_json(trap):
    inner = {"x": {"type": trap, "content": {}}}
    return {
        "pythonClassName": f"{FEATURES}features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps(inner)},
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda trap: {"pythonClassName": trap, "tensor": {"dtype": "int64"}},
        lambda trap: {
            "pythonClassName": f"{FEATURES}sequence_feature.Sequence",
            "sequence": {"feature": {"pythonClassName": trap, "text": {}}},
        },
        nested_json,
    ],
    ids=["itself", "inside a sequence", "inside JSON in JSON"],
)
def test_foreign_classes_of_further_features_are_never_made(folder, stored, trap, make):
    edit(
        folder / "features.json",
        lambda features: features["featuresDict"]["features"].update(extra=make(trap)),
    )
    assert_is(read(folder), stored)


def test_a_foreign_class_in_json_of_the_whole_is_refused(folder, trap):
    (folder / "features.json").write_text(json.dumps(nested_json(trap)))
    refusal(folder)
    (folder / "features.json").write_text(
        json.dumps({"type": trap, "content": {}, "proto_cls": ""})
    )
    refusal(folder)


def test_features_and_a_module_in_dataset_info_are_not_imported(folder, stored, trap):
    features = {"pythonClassName": trap, "tensor": {"dtype": "int64"}}
    edit(
        folder / "dataset_info.json",
        lambda info: info.update(features=features, moduleName="hostile"),
    )
    assert_is(read(folder), stored)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("filepathTemplate", "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"),
        ("filepathTemplate", "/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"),
        ("filepathTemplate", "{DATASET.__class__}-{SHARD_X_OF_Y}"),
        ("filepathTemplate", "{SPLIT:>99999999999}-{SHARD_X_OF_Y}"),
        ("filepathTemplate", "{NOTHING}-{SHARD_X_OF_Y}"),
        ("name", "../train"),
        ("name", "/train"),
    ],
)
def test_paths_and_templates_out_of_the_folder_are_refused(folder, field, value):
    edit(folder / "dataset_info.json", lambda info: info["splits"][0].update({field: value}))
    assert "dataset_info.json" in refusal(folder) or "template" in refusal(folder)


@pytest.mark.parametrize("name", ["../toy", "/toy"])
def test_a_name_of_a_data_set_does_not_lead_out_of_its_folder(folder, name):
    edit(folder / "dataset_info.json", lambda info: info.update(name=name))
    assert "not in this folder" in refusal(folder)


# Damage


def test_damage_says_which_folder_and_how_to_prepare_it_anew(folder):
    shard(folder, "train", 1).unlink()
    message = refusal(folder)
    assert f"{folder} is damaged (the shard {shard(folder, 'train', 1).name} is missing)" in message
    assert f"tfds.builder('toy', data_dir={str(folder.parents[1])!r}" in message


@pytest.mark.parametrize(
    "counts", [["6", "6"], ["8", "6"], ["7"], ["7", "6", "0"], ["7", "-6"], ["7", "0"], []]
)
def test_a_wrong_count_of_examples_or_shards_is_refused(folder, counts):
    edit(folder / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=counts))
    assert "is damaged (" in refusal(folder)


@pytest.mark.parametrize("split", [0, 1])
def test_a_split_of_another_name_or_none_is_refused(folder, split):
    edit(folder / "dataset_info.json", lambda info: info["splits"][split].update(name="tesu"))
    assert "is damaged (" in refusal(folder)
    edit(folder / "dataset_info.json", lambda info: info["splits"].pop(split))
    assert f"has the shard {shard(folder, list(COUNTS)[split], 0).name}" in refusal(folder)


@pytest.mark.parametrize("label", [3, -2, 2**40])
def test_a_label_that_is_no_class_is_refused(folder, label):
    images, labels = examples(5, 8)
    labels[3] = label
    records = [record(encoded(image), one) for image, one in zip(images, labels, strict=True)]
    write_shard(shard(folder, "test", 0), records)
    assert "is damaged (" in refusal(folder)


@pytest.mark.parametrize("image", [b"", b"no image", encoded(np.zeros((5, 4, 1), np.uint8))[:-30]])
def test_an_image_that_does_not_decode_is_refused(folder, image):
    write_shard(shard(folder, "test", 0), [record(image, 0)] * 8)
    assert "is damaged (" in refusal(folder)


def test_a_record_that_is_no_example_or_lacks_its_label_is_refused(folder):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(
        encoded(np.zeros((5, 4, 1), np.uint8))
    )
    for one in (b"\xff\xff", example.SerializeToString()):
        write_shard(shard(folder, "test", 0), [one] * 8)
        assert "is damaged (" in refusal(folder)


@pytest.mark.parametrize("dimensions", [["5", "5", "1"], ["6", "4", "1"], ["5", "4", "2"], ["4"]])
def test_images_of_another_shape_than_declared_are_refused(folder, dimensions):
    def change(features):
        features["featuresDict"]["features"]["image"]["image"]["shape"]["dimensions"] = dimensions

    edit(folder / "features.json", change)
    if dimensions != [
        "5",
        "4",
        "2",
    ]:  # TFDS repeats gray images in as many channels as are declared
        assert "is damaged (" in refusal(folder)


def test_gray_images_in_three_channels_are_said(folder, capsys):
    def change(features):
        features["featuresDict"]["features"]["image"]["image"]["shape"]["dimensions"] = [
            "5",
            "4",
            "3",
        ]

    edit(folder / "features.json", change)
    assert read(folder).train.images.shape == (13, 5, 4, 3)
    assert capsys.readouterr().err.count("warning: all images of") == 1


def test_images_of_several_shapes_ask_for_a_size_and_are_resized(folder):
    images = [encoded(np.zeros((5, 4 + i // 7, 1), np.uint8)) for i in range(8)]
    write_shard(shard(folder, "test", 0), [record(image, 0) for image in images])
    with pytest.raises(InputError, match=r"^config\.data\.size: got 0; .*differ in shape"):
        read(folder)
    resized = tfds.read(NAME, folder.parents[1], folder, 4).held_out
    assert resized is not None
    np.testing.assert_array_equal(resized.images, np.zeros((8, 4, 4, 1)))


@pytest.mark.parametrize(
    "names", ["ant\nbee\n", "ant\nbee\ncow\ndog\n", "ant\nbee\nbee\n", b"\xff\xfe\xff"]
)
def test_names_that_are_not_one_for_each_class_are_refused(folder, names):
    (folder / "label.labels.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    assert "is damaged (" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"name": 3}', b'{"a": 1}']
)
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_json_that_is_no_description_is_refused(folder, file, content):
    (folder / file).write_bytes(content)
    refusal(folder)


@pytest.mark.parametrize("dtype", ["uint9", "int8", "string", ""])
def test_images_of_no_dtype_of_images_are_refused_without_tensorflow(folder, capfd, dtype):
    edit(
        folder / "features.json",
        lambda f: f["featuresDict"]["features"]["image"]["image"].update(dtype=dtype),
    )
    assert "is damaged (" in refusal(folder)
    assert capfd.readouterr().out == ""


def test_another_format_is_refused_by_name(folder):
    edit(folder / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    assert "file_format=array_record" in refusal(folder)


def damaged(rng, content):
    """One flipped bit, one other byte, or a piece lost, at the front (headers) as often as
    anywhere.
    """
    at = rng.randrange(rng.choice((len(content), min(len(content), 4000))))
    match rng.randrange(8):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[at + rng.randint(1, 80) :]
        case 2:
            return content[:at] + rng.randbytes(1) + content[at + 1 :]
        case _:
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def fuzz(folder, stored, cases, seed, capsys):
    """Damages one file after another: each is refused in one line, or makes no difference, or is
    said.
    """
    rng = random.Random(seed)
    files = sorted(path for path in folder.iterdir() if path.name != "label.labels.txt")
    refusals = []
    for _ in range(cases):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(damaged(rng, content))
        try:
            contents = read(folder)
            if "warning: all images" not in capsys.readouterr().err:
                assert_is(contents, stored)
        except InputError as error:
            refusals.append(str(error))
        path.write_bytes(content)
    assert all(re.fullmatch(r"config\.data\.name: got 'toy'; .+", line) for line in refusals)
    assert len(refusals) > cases / 2


def test_random_damage_is_refused_or_makes_no_difference(folder, stored, capsys):
    fuzz(folder, stored, 150, 0, capsys)


@pytest.mark.slow
def test_much_random_damage_is_refused_or_makes_no_difference(folder, stored, capsys):
    fuzz(folder, stored, 2000, 1, capsys)


def test_a_damaged_set_ends_a_command_with_one_line_and_code_2(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = shard(folder, "train", 0)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    arguments = ["main", "--config=configs/digits.py", "--config.data.name=toy", "--dry-run"]
    code = train.main([*arguments, f"--config.data.dir={folder.parents[1]}"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: config.data.name: got 'toy'; ")
    assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_a_set_is_balanced_and_loses_unlabelled_examples(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, labels = examples(7, 8)
    labels[0] = -1
    write_shard(
        shard(folder, "test", 0),
        [record(encoded(image), label) for image, label in zip(images, labels, strict=True)],
    )
    dataset = preparation.load(DataConfig(name=NAME, dir=str(folder.parents[1])))
    assert np.bincount(dataset.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(dataset.test.labels).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(dataset.test.images[0], images[3])
    assert dataset.label_names == ("ant", "bee", "cow")


def test_a_set_that_was_prepared_again_is_decoded_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = preparation.load(DataConfig(name=NAME, dir=str(folder.parents[1])))
    images, labels = examples(1, 8)
    others = [
        record(encoded(image), 2 - label) for image, label in zip(images, labels, strict=True)
    ]
    write_shard(shard(folder, "test", 0), others)  # other labels: neither a count nor a size tells
    capsys.readouterr()
    after = preparation.load(DataConfig(name=NAME, dir=str(folder.parents[1])))
    np.testing.assert_array_equal(after.test.images[-2:], before.test.images[:2])
    assert shard(folder, "test", 0).name in capsys.readouterr().err
    assert len(list((tmp_path / "cache" / "ncjax" / "datasets").iterdir())) == 1
