"""A data set of three classes as TFDS prepares one, made without TensorFlow."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

_CLASSES, _PER_CLASS, _TEST_PER_CLASS = 3, 10, 4
TEST_SHARD = "tiny-test.array_record-00000-of-00001"
_MODULE = "tensorflow_datasets.core.features"

_FEATURES = {
    "pythonClassName": f"{_MODULE}.features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": {
                "pythonClassName": f"{_MODULE}.image_feature.Image",
                "image": {
                    "shape": {"dimensions": ["8", "8", "1"]},
                    "dtype": "uint8",
                    "encodingFormat": "png",
                },
            },
            "label": {
                "pythonClassName": f"{_MODULE}.class_label_feature.ClassLabel",
                "classLabel": {"numClasses": str(_CLASSES)},
            },
        }
    },
}


def _split(name: str, lengths: list[int]) -> dict[str, Any]:
    return {
        "name": name,
        "shardLengths": [str(length) for length in lengths],
        "numBytes": "3000",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }


_INFO = {
    "name": "tiny",
    "version": "1.0.0",
    "fileFormat": "array_record",
    "moduleName": "tensorflow_datasets.image_classification.mnist",
    "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
    "splits": [_split("train", [15, 15]), _split("test", [12])],
}


def _example(image: np.ndarray, label: int) -> bytes:
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_generated_pb2 as examples

    png = io.BytesIO()
    Image.fromarray(image[..., 0]).save(png, "png")
    example = examples.Example()
    example.features.feature["image"].bytes_list.value.append(png.getvalue())
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def prepare(root: Path) -> None:
    """Writes the set `tiny` below `root`."""
    from array_record.python import array_record_module

    home = root / "tiny" / "1.0.0"
    home.mkdir(parents=True)
    (home / "dataset_info.json").write_text(json.dumps(_INFO))
    (home / "features.json").write_text(json.dumps(_FEATURES))
    rng = np.random.default_rng(0)
    means = rng.integers(60, 190, (_CLASSES, 8, 8, 1))
    for split, per_class, shards in (("train", _PER_CLASS, 2), ("test", _TEST_PER_CLASS, 1)):
        labels = np.arange(_CLASSES * per_class) % _CLASSES
        images = (means[labels] + rng.integers(-50, 50, (len(labels), 8, 8, 1))).astype(np.uint8)
        for shard, chosen in enumerate(np.array_split(np.arange(len(labels)), shards)):
            path = home / f"tiny-{split}.array_record-{shard:05}-of-{shards:05}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for i in chosen:
                writer.write(_example(images[i], int(labels[i])))
            writer.close()
