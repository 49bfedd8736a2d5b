"""Gives fields of a config several values: every combination of them is a variant, a config.

Numbers of `sweep` and `decay` are axes of a grid, which trains in one compiled program. A choice or
a shape, such as the optimizer or the widths, takes a program for each of its values: a variant is
trained in a folder of its own, and its WORKDIR has one history of all.
"""

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ncjax import config as configuration
from ncjax.config import SCHEMA, Config
from ncjax.errors import InputError, near

Label = str | int | float

# Dimensions that are not named after the last word of their field: it is the name of a metric, or
# says little without its section.
_DIMENSIONS = {"loss": "loss_function", "data.name": "data_name"}

_LENGTH = "runs of one history are as long and are measured at the same epochs"
_MEASURED = "runs of one history are measured alike"
_PLACE = "it says where or how runs are computed or kept, not what is trained"
_AXIS = "its values are separated by commas and train in one program"
# Why a field, or a section, has one value alone.
_SINGLE = {
    "train.epochs": _LENGTH,
    "log.epochs": _LENGTH,
    "log.layers": _MEASURED,
    "data.dir": _PLACE,
    "mesh": _PLACE,
    "checkpoint": _PLACE,
    "profile": _PLACE,
    "report": _PLACE,
    "compile": _PLACE,
    "sweep.runs_per_program": _PLACE,
    "sweep": _AXIS,
    "decay": _AXIS,
}


class Variant(NamedTuple):
    """Holds one combination of the values of the fields that vary.

    Attributes:
      labels: of its values, by dimension of the history.
      config: the checked config.
    """

    labels: dict[str, Label]
    config: Config

    @property
    def words(self) -> str:
        """Returns its name in messages, as in "optimizer=sgd, widths=256-256"."""
        return words_of(self.labels)

    @property
    def folder(self) -> str:
        """Returns the name of its folder in the WORKDIR."""
        return folder_of(self.labels)


class Variation(NamedTuple):
    """Holds the fields that vary, in the order of the schema, and their values as they are given.

    Attributes:
      values: of every such field.
    """

    values: dict[str, tuple]

    @property
    def labels(self) -> dict[str, list[Label]]:
        """Returns the coordinates that the history has for them, by dimension."""
        return {
            dimension_of(name): [label_of(value) for value in values]
            for name, values in self.values.items()
        }

    def combinations(self) -> list[dict[str, Label]]:
        """Returns the labels of every variant, the last dimension fastest."""
        labels = self.labels
        return [dict(zip(labels, row, strict=True)) for row in itertools.product(*labels.values())]

    def find(self, coordinates: Mapping[str, Any]) -> dict[str, Label]:
        """Returns the labels of the one variant that coordinates name, by labels or by values.

        Raises:
          InputError: there is no such variant, or there are several.
        """
        chosen = {}
        for (name, values), (dimension, labels) in zip(
            self.values.items(), self.labels.items(), strict=True
        ):
            way_out = f"there are {shown(labels)}"
            if dimension in coordinates:
                chosen[dimension] = _same(dimension, labels, coordinates[dimension])
            elif len(values) == 1:
                chosen[dimension] = labels[0]
            else:
                way_out = f"{dimension} (config.{name}) is missing; {way_out}"
                raise InputError("run", dict(coordinates), way_out)
        return chosen


def _same(dimension: str, labels: Sequence[Label], asked: Any) -> Label:
    """Returns the label that a value or a label is equal to, as number or as text."""
    text = f"{asked:g}" if isinstance(asked, float) else str(label_of(asked))
    for label in labels:
        if label == asked or str(label) == text:
            return label
    raise InputError(dimension, asked, f"there are {shown(labels)}")


def shown(labels: Sequence[Label]) -> str:
    """Returns labels as a message lists them."""
    return ", ".join(map(str, labels))


def dimension_of(name: str) -> str:
    """Returns the name of the dimension that a field gives a history."""
    return _DIMENSIONS.get(name, name.rpartition(".")[2])


def label_of(value: Any) -> Label:
    """Returns the coordinate of a value: a number as it is, 256-256 of widths, else its text."""
    if isinstance(value, tuple | list):
        return "-".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) or "none"
    return value


def words_of(labels: Mapping[str, Label]) -> str:
    """Returns the name of a variant in messages."""
    return ", ".join(f"{name}={label}" for name, label in labels.items())


def folder_of(labels: Mapping[str, Label]) -> str:
    """Returns the name of a variant's folder, which every library takes for what it is."""
    return ",".join(f"{name}={path_word(str(label))}" for name, label in labels.items())


def path_word(text: str) -> str:
    """Returns a text as a part of the name of a file or folder; other texts give other ones."""
    safe = re.sub(r"[^\w.+=-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= 60:
        return text
    return f"{safe[:50]}-{zlib.crc32(text.encode(errors='surrogateescape')):08x}"


def check_varied(name: str, value: object) -> None:
    """Raises InputError for a field that does not exist, or that has one value alone."""
    if name not in SCHEMA:
        way_out = f"no such field{near(name, SCHEMA)}; --help lists them"
        raise InputError(f"config.{name}", value, way_out)
    reason = _SINGLE.get(name) or _SINGLE.get(name.partition(".")[0])
    if reason == _AXIS:
        raise InputError(f"config.{name}", value, reason)
    if reason:
        way_out = f"it takes one value: {reason}; give another WORKDIR another one"
        raise InputError(f"config.{name}", value, way_out)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Splits a command line into the fields that have one value and those that have several.

    Args:
      arguments: the program and its `--config.FIELD=VALUE`; of a field that stands twice the last
        counts.

    Returns:
      The command line without the second kind; the alternatives of each of those, as texts.

    Raises:
      InputError: a field has several values and may have one alone.
    """
    rest, single, varied = [], {}, {}
    for argument in _joined(arguments):
        name, _, text = argument.partition("=")
        name = name.lstrip("-").removeprefix("config.")
        if not argument.lstrip("-").startswith("config.") or name not in SCHEMA:
            rest.append(argument)
            continue
        single.pop(name, None)
        varied.pop(name, None)
        alternatives = _alternatives(name, text)
        if len(alternatives) == 1:
            # ml_collections would join the values of a tuple that stands twice.
            single[name] = argument
        else:
            check_varied(name, text)
            varied[name] = alternatives
    return [*rest, *single.values()], varied


def _joined(arguments: Sequence[str]) -> list[str]:
    """Returns a command line with `--config.FIELD VALUE` as `--config.FIELD=VALUE`."""
    joined: list[str] = []
    for argument in arguments:
        last = joined[-1] if joined else ""
        name = last.lstrip("-").removeprefix("config.")
        takes_value = name in SCHEMA and not isinstance(SCHEMA[name].default, bool)
        if takes_value and last.startswith("-") and "config." in last:
            joined[-1] = f"{last}={argument}"
        else:
            joined.append(argument)
    return joined


def _alternatives(name: str, text: str) -> list[str]:
    """Returns the values that a text gives a field: a comma in the name of a file is part of it."""
    default = SCHEMA[name].default
    if isinstance(default, tuple):
        return text.split(";")
    is_path = name in ("data.dir", "profile.dir") or (name == "data.name" and _exists(text))
    return [text] if is_path else text.split(",")


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        return False


def make(vary: Mapping[str, Sequence]) -> Variation:
    """Returns the variation of fields and their values, checked one by one.

    Raises:
      InputError: a field cannot vary; a value is none that it may have, or stands twice.
    """
    values = {}
    for name in sorted(vary, key=lambda name: list(SCHEMA).index(name) if name in SCHEMA else 0):
        given = vary[name]
        check_varied(name, given)
        if not isinstance(given, tuple | list) or not given:
            raise InputError(f"config.{name}", given, "give a tuple of one or more values")
        is_tuple = isinstance(SCHEMA[name].default, tuple)
        if is_tuple and not all(isinstance(value, tuple | list) for value in given):
            raise InputError(f"config.{name}", given, "every value is itself a tuple")
        values[name] = tuple(configuration.checked_value(name, value) for value in given)
        for i, value in enumerate(values[name]):
            if value in values[name][:i]:
                raise InputError(f"config.{name}", value, "it stands there twice; remove one")
    return Variation(values)


def make_variants(config: Config, variation: Variation) -> list[Variant]:
    """Returns every variant of a config, each validated, in the order of `combinations`.

    Raises:
      InputError: a variant is no valid config, or is the same as another.
    """
    variants: list[Variant] = []
    rows = itertools.product(*variation.values.values())
    for labels, row in zip(variation.combinations(), rows, strict=True):
        one = configuration.from_mapping(configuration.to_mapping(config))
        one.update(dict(zip(variation.values, row, strict=True)))
        variant = Variant(labels, one)
        try:
            variant = Variant(labels, configuration.validate(one))
        except InputError as error:
            raise of_variant(error, variant.words) from error
        for other in variants:
            if other.config == variant.config:
                way_out = f"it trains the same as {other.words}; leave one of their values out"
                raise InputError("variant", variant.words, way_out)
        variants.append(variant)
    return variants


def of_variant(error: InputError, words: str) -> InputError:
    """Returns an error that says which variant it is about."""
    error.args = (f"{error} (variant {words})",)
    return error


def to_stored(config: Config, variation: Variation) -> dict[str, Any]:
    """Returns the content of the config.json of all variants: the first's config, and `vary`."""
    return configuration.to_mapping(config) | {"vary": dict(variation.values)}


def from_stored(stored: Any) -> Variation | None:
    """Returns the variation of a parsed config.json; None where nothing varies.

    Raises:
      InputError: it is damaged.
    """
    if not isinstance(stored, Mapping) or "vary" not in stored:
        return None
    vary = stored["vary"]
    if not isinstance(vary, Mapping) or not vary:
        raise InputError("config.json", vary, "its `vary` is damaged")
    return make(vary)


def check_grows(mine: Variation, theirs: Variation | None, workdir: Path) -> None:
    """Raises InputError if a WORKDIR holds variants that a variation lacks, or none at all."""
    if theirs is None:
        way_out = "it holds runs of one config, without variants; choose another WORKDIR"
        raise InputError("--workdir", str(workdir), way_out)
    if mine.values.keys() != theirs.values.keys():
        fields = ", ".join(f"config.{name}" for name in theirs.values)
        way_out = f"it holds variants of {fields}; vary the same, or choose another WORKDIR"
        raise InputError("--workdir", str(workdir), way_out)
    for name, values in theirs.values.items():
        lost = [label_of(value) for value in values if value not in mine.values[name]]
        if lost:
            way_out = (
                f"it also holds {shown(lost)} of config.{name}; name those as well, or choose "
                "another WORKDIR"
            )
            raise InputError("--workdir", str(workdir), way_out)
