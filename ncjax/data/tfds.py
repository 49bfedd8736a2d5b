"""Reads prepared TFDS folders: two JSON files, which are not trusted, and array_record shards.

TFDS's own `builder_from_directory` imports whatever class these files name, and follows whatever
paths they spell. Here they are parsed as the protocol buffers that they are, one image and one
label are made of them and nothing else, and shards lie in the folder. array_record hashes all it
stores: a flipped bit raises. What hashes cannot see (a shard that is missing, a wrong count, a
label out of range) is checked against dataset_info.json and features.json.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ncjax.data.images import check_memory, fitted
from ncjax.errors import InputError, last_line, near, warn

_FORMAT = "array_record"
_FEATURES = {
    "image": "tensorflow_datasets.core.features.image_feature.Image",
    "class_label": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
}
_DTYPES = ("uint8", "uint16", "float32")
_CHUNK = 1024


class Examples(NamedTuple):
    """Holds one split, in the order of its shards.

    images are (M, height, width, channels), labels (M,) int32, -1 for none.
    """

    images: np.ndarray
    labels: np.ndarray


class Contents(NamedTuple):
    """Holds the splits of a set; `held_out` is test, or else validation, or else None."""

    train: Examples
    held_out: Examples | None
    class_name: Callable[[int], str]


def find(name: str, root: Path) -> Path:
    """Returns the newest prepared version of a data set, or raises the one line that says how to
    prepare it.
    """
    path, _, version = name.partition(":")
    pattern = f"{version or '*'}/dataset_info.json"
    homes = [info.parent for info in (root / path).glob(pattern)] if _is_plain(path) else []
    by_version = {
        home: tuple(int(part) for part in home.name.split(".") if part.isdigit()) for home in homes
    }
    if not homes:
        prepared = [folder.name for folder in root.glob("[!.]*") if folder.is_dir()]
        known = ["digits", "synthetic", "identity", *prepared]
        raise InputError(
            "config.data.name",
            name,
            "it is none of digits, synthetic, identity, no .npz, no folder that holds train/CLASS, "
            "and no prepared TFDS set is at "
            f"{root / path / pattern} (config.data.dir or TFDS_DATA_DIR say where to look)"
            f"{near(name, known)}; where there is a network, "
            f"prepare it with: {_preparation(name, root)}",
        )
    return max(homes, key=by_version.__getitem__)


def read(name: str, root: Path, home: Path, size: int = 0) -> Contents:
    """Decodes a prepared set; images are resized to `size`, unless it is 0.

    Raises:
      InputError: it is damaged, or no image-classification set.
    """
    try:
        return _read(name, home, size)
    except (InputError, ImportError):
        raise
    except MemoryError as error:
        raise InputError("config.data.name", name, f"{home} does not fit into memory") from error
    except Exception as error:  # protobuf, TFDS, array_record and Pillow raise whatever they like
        way_out = f"remove that folder and prepare it anew with: {_preparation(name, root)}"
        raise InputError(
            "config.data.name", name, f"{home} is damaged ({last_line(error)}); {way_out}"
        ) from error


def _is_plain(path: str) -> bool:
    return all(
        part.isidentifier() or part.replace("-", "_").replace(".", "_").isalnum()
        for part in path.split("/")
    )


def _preparation(name: str, root: Path) -> str:
    python = (
        f"import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={str(root)!r}, "
        f"file_format={_FORMAT!r}).download_and_prepare()"
    )
    return f'pip install -e ".[prepare]" && python -c "{python}"'


def _read(name: str, home: Path, size: int) -> Contents:
    from google.protobuf import json_format
    from tensorflow_datasets.core import proto

    messages: Any = proto  # whose classes are made at run time
    info = json_format.Parse(
        (home / "dataset_info.json").read_bytes(), messages.dataset_info_pb2.DatasetInfo()
    )
    declared = json_format.Parse(
        (home / "features.json").read_bytes(), messages.feature_pb2.Feature()
    )
    if info.file_format != _FORMAT:
        way_out = (
            f"{home} is {info.file_format or 'of no known format'}; prepare it with "
            f"file_format={_FORMAT}"
        )
        raise InputError("config.data.name", name, way_out)
    keys = [item.feature_key for item in info.supervised_keys.tuple.items]
    features = _pair(name, {key: declared.features_dict.features[key] for key in keys})
    label = features[keys[1]]
    label.load_metadata(home, keys[1].replace("/", "."))

    shards = {split.name: _shards(info.name, split, home) for split in info.splits}
    known = {path for split in shards.values() for path in split}
    if surplus := sorted(path.name for path in home.rglob(f"*{_FORMAT}*") if path not in known):
        raise ValueError(f"no split of dataset_info.json has the shard {surplus[0]}")
    if "train" not in shards:
        raise ValueError("dataset_info.json has no split train")
    held_out = next((shards[split] for split in ("test", "validation") if split in shards), None)
    train = _examples(name, shards["train"], features, size)
    if train.images.shape[-1] > 1 and all(
        (image == image[..., :1]).all() for image in train.images
    ):
        warn(
            f"all images of {home} are gray, and features.json has them in "
            f"{train.images.shape[-1]} equal channels"
        )
    tested = _examples(name, held_out, features, size) if held_out else None
    return Contents(train, tested, label.int2str)


def _pair(name: str, declared: dict[str, Any]) -> dict[str, Any]:
    """Returns the image feature and the label feature, in this order, by their keys; anything
    else is refused.
    """
    import tensorflow_datasets as tfds

    kinds = [
        (feature.WhichOneof("content"), feature.python_class_name) for feature in declared.values()
    ]
    if kinds != list(_FEATURES.items()):
        found = ", ".join(
            f"{key} is {feature.python_class_name or 'no feature'}"
            for key, feature in declared.items()
        )
        way_out = (
            "it is no image-classification set, a TFDS Image and a ClassLabel "
            f"({found or 'it has no such pair'}); "
            "choose another, or prepare this one anew if it is damaged"
        )
        raise InputError("config.data.name", name, way_out)
    (image_key, image), (label_key, label) = declared.items()
    if image.image.dtype not in _DTYPES:  # TFDS would ask TensorFlow
        raise ValueError(f"features.json has images of dtype {image.image.dtype!r}")
    return {
        image_key: tfds.features.Image.from_json_content(image.image),
        label_key: tfds.features.ClassLabel.from_json_content(label.class_label),
    }


def _shards(dataset: str, split: Any, home: Path) -> dict[Path, int]:
    """Returns how many examples dataset_info.json has of each shard of a split."""
    import tensorflow_datasets as tfds

    # The template goes through str.format: it may name fields, but no attributes of them and no
    # width of gigabytes.
    if not re.fullmatch(r"([\w./-]|\{[A-Z_]+\})*", split.filepath_template):
        raise ValueError(f"dataset_info.json has the template {split.filepath_template!r}")
    template = tfds.core.ShardedFileTemplate(
        tfds.core.Path(), split.filepath_template, dataset, split.name, _FORMAT
    )
    counts = list(split.shard_lengths)
    names = [
        template.relative_filepath(shard_index=i, num_shards=len(counts))
        for i in range(len(counts))
    ]
    for shard in map(PurePosixPath, names):
        if shard.is_absolute() or ".." in shard.parts:
            raise ValueError(
                f"dataset_info.json has the shard {shard}, which is not in this folder"
            )
    return {home / shard: count for shard, count in zip(names, counts, strict=True)}


def _examples(name: str, shards: dict[Path, int], pair: dict[str, Any], size: int) -> Examples:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(pair)
    (image_key, image), (label_key, label) = pair.items()
    total = sum(_count(path, declared) for path, declared in shards.items())
    images, labels = np.empty((0, 0)), np.empty(total, np.int32)
    if size:
        bytes_per_pixel = (image.shape[2] or 1) * np.dtype(image.np_dtype).itemsize
        check_memory("config.data.size", size, total * bytes_per_pixel)
    for i, record in enumerate(record for path in shards for record in _records(path)):
        example: Any = features.deserialize_example_np(record)
        one = fitted(example[image_key], size) if size else example[image_key]
        if i == 0:
            images = np.empty((total, *one.shape), one.dtype)
        if one.shape != images.shape[1:]:
            way_out = f"images of {name} differ in shape ({images.shape[1:]}, {one.shape})"
            raise InputError("config.data.size", size, f"{way_out}; set the size that all get")
        images[i], labels[i] = one, example[label_key]
    shape = images.shape[1:]
    declared = (size or image.shape[0], size or image.shape[1], image.shape[2])
    if shape != tuple(side or found for side, found in zip(declared, shape, strict=False)):
        raise ValueError(
            f"{total} images are of shape {shape}, and features.json has {image.shape}"
        )
    if labels.min() < -1 or labels.max() >= label.num_classes:
        found = f"labels go from {labels.min()} to {labels.max()}"
        raise ValueError(f"{found}, and features.json has {label.num_classes} classes")
    return Examples(images, labels)


def _count(path: Path, declared: int) -> int:
    """Returns how many examples a shard holds, which must be as many as dataset_info.json has of
    it.
    """
    if not path.is_file():
        raise ValueError(f"the shard {path.name} is missing")
    with _opened(path) as reader:
        count = reader.num_records()
    if count != declared:
        raise ValueError(
            f"the shard {path.name} holds {count} examples, and dataset_info.json has {declared}"
        )
    return count


def _records(path: Path) -> Iterator[bytes]:
    with _opened(path) as reader:
        for start in range(0, count := reader.num_records(), _CHUNK):
            yield from reader.read(start, min(start + _CHUNK, count))


def _opened(path: Path) -> contextlib.closing:
    """Returns a reader; one of a damaged file says so when it reads or closes."""
    from array_record.python.array_record_module import ArrayRecordReader

    return contextlib.closing(ArrayRecordReader(str(path)))
