"""A user's own network: a `flax.linen.Module` class, found by its import path.

It has `features(x, train)`, the features (B, p) of normalized inputs (B, *image), and `logits(h)`,
which is one dense layer, `self.head = nn.Dense(self.num_classes)`. Those of its attributes that are
named as in `FIELDS` are set: `num_classes` always, the others as the config says.
"""

import contextlib
import importlib
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn

from ncjax import config
from ncjax.errors import InputError, last_line
from ncjax.paths import check_importable

# Attribute of a network -> the field of the config's `model` section that decides it.
FIELDS = {
    "widths": "widths",
    "activation": "activation",
    "normalization": "normalization",
    "feature_normalization": "feature_normalization",
    "linear_head_depth": "linear_head_depth",
    "linear_input_depth": "linear_input_depth",
    "use_head_bias": "head_bias",
}


def make(path: str, asked: Mapping[str, Any]) -> nn.Module:
    """Returns the network of an import path, `package.module:Class`.

    Args:
      path: it is looked for in the current folder first, then where Python looks.
      asked: values of the attributes in `FIELDS`, of `num_classes` and of `dtype`.

    Raises:
      InputError: there is no such class, it is no network, or a setting is asked for that it does
        not have.
    """
    network = load(path)
    attributes = network.__dataclass_fields__
    if "num_classes" not in attributes:
        raise _wrong(path, "it needs an attribute num_classes: int, the width of its head")
    for name in sorted(asked.keys() & FIELDS.keys() - attributes.keys()):
        # A head's bias is seen in its parameters (`layers.find`).
        default = config.SCHEMA[f"model.{FIELDS[name]}"].default
        if name not in ("widths", "use_head_bias") and asked[name] != default:
            way_out = f"{path} has no attribute {name}; add one, or leave this field alone"
            raise InputError(f"config.model.{FIELDS[name]}", asked[name], way_out)
    try:
        return network(**{name: value for name, value in asked.items() if name in attributes})
    except TypeError as error:
        raise _wrong(path, f"{last_line(error)}; give its other attributes defaults") from error


def load(path: str) -> Any:
    """Returns the class of an import path, or raises InputError."""
    check_importable(path)
    module_name, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in names.split("."):
            found = getattr(found, name)
    except AttributeError as error:
        raise _wrong(path, f"{module_name} has no {names}; correct the name") from error
    except Exception as error:  # the module is the user's: anything may be wrong in it
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise _wrong(path, f"importing it failed ({reason}); correct it") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise _wrong(path, "it is no flax.linen.Module; name a class that is")
    for method in ("features", "logits"):
        if not callable(getattr(found, method, None)):
            raise _wrong(path, f"it has no method {method}; it needs features(x, train), logits(h)")
    return found


@contextlib.contextmanager
def restored(path: str) -> Iterator[None]:
    """Raises InputError where a network is applied to weights of a checkpoint that are not its."""
    try:
        yield
    except flax.errors.FlaxError as error:
        if not path:
            raise
        way_out = (
            f"it is not the network that the checkpoint is of ({last_line(error)}); restore its "
            "file"
        )
        raise _wrong(path, way_out) from error


def source(path: str) -> dict[str, str]:
    """Returns a checksum of the file that a network of the user's is in, by what it is of; empty
    without such a network, or where its module has no file.
    """
    module = sys.modules.get(path.partition(":")[0])
    file = getattr(module, "__file__", None)
    if not path or file is None:
        return {}
    return {f"source of {path}": f"{zlib.crc32(Path(file).read_bytes()):08x}"}


def _wrong(path: str, way_out: str) -> InputError:
    return InputError("config.model.network", path, way_out)
