"""The typed config of a run, and the grid of runs that it describes.

`Config` is the one table of fields: each stands there with its type, default, meaning and
constraint. `--help`, the overrides of the command line and `validate` read that table.
"""

# ruff: noqa: RUF009 -- the calls in the dataclasses below return `dataclasses.field`

import itertools
import json
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from ncjax.errors import InputError, listed, near, unknown_choice

ModelKind = Literal["mlp", "conv", "residual", "resnet18"]
Normalization = Literal["none", "batch", "layer"]
NormDecay = Literal["decayed", "free"]
Activation = Literal["relu", "linear"]
HeadBias = Literal["none", "free", "decayed"]
Loss = Literal["square", "cross_entropy"]
Targets = Literal["one_hot", "centered"]
Augmentation = Literal["none", "crop", "crop_flip"]
Optimizer = Literal["sgd", "adam", "adamw"]
Decay = Literal["coupled", "decoupled"]
Schedule = Literal["cosine", "constant", "step"]
Precision = Literal["float32", "float64"]
Units = Literal["ours", "torch"]
CompilationCache = Literal["user", "off"]
Color = Literal["own", "gray", "rgb"]


class OptimizerTraits(NamedTuple):
    """Says what theory, units and checks need to know of an optimizer.

    Attributes:
      decays: the ways in which it may decay weights.
      follows_flow: whether small steps follow gradient flow, so that it has a clock.
      scales_with_loss: whether its step grows with the loss; Adam's does not.
      seeks_critical_points: whether it stands still at critical points of the regularized loss.
    """

    decays: tuple[Decay, ...]
    follows_flow: bool
    scales_with_loss: bool
    seeks_critical_points: bool


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "sgd": OptimizerTraits(("coupled", "decoupled"), True, True, True),
    "adam": OptimizerTraits(("coupled",), False, False, True),
    "adamw": OptimizerTraits(("decoupled",), False, False, False),
}


class Field(NamedTuple):
    """Describes one field; `must` is its constraint in words, `holds` the same as a predicate."""

    default: object
    meaning: str
    must: str
    holds: Callable[[Any], bool]


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer beyond every float
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# The functions that describe a field return Any, as `dataclasses.field` does for type checkers:
# the annotation alone says what type a field has.
def _described(default: object, meaning: str, must: str, holds: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"field": Field(default, meaning, must, holds)})


def _integer(default: int, meaning: str, least: int) -> Any:
    must = f"must be an integer >= {least} (and < 2**31)"
    return _described(default, meaning, must, lambda v: _is_integer(v) and least <= v <= _MOST)


def _choice(literal: Any, meaning: str) -> Any:
    """Describes a field that takes the values of a Literal, by default the first."""
    choices = get_args(literal)
    must = f"must be one of {', '.join(choices)}"
    return _described(choices[0], meaning, must, lambda v: _is_text(v) and v in choices)


def _path(meaning: str) -> Any:
    return _described("", meaning, "must be a path", _is_text)


def _each(
    default: tuple, meaning: str, must: str, holds: Callable[[Any], bool], empty: bool = False
) -> Any:
    """Describes a tuple whose elements are checked one by one."""
    least = "zero or more" if empty else "one or more"
    return _described(
        default,
        meaning,
        f"must be {least} {must}",
        lambda v: (empty or len(v) > 0) and all(holds(x) for x in v),
    )


_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_MOST = 2**31 - 1  # the largest integer that a device counts to
_POSITIVE = ("finite numbers > 0", lambda v: _is_finite(v) and v > 0)
_NON_NEGATIVE = ("finite numbers >= 0", lambda v: _is_finite(v) and v >= 0)
_EPOCHS = ("integers >= 0 (and < 2**31)", lambda v: _is_integer(v) and 0 <= v <= _MOST)
_WIDTHS = ("integers >= 1 (and < 2**31)", lambda v: _is_integer(v) and 1 <= v <= _MOST)
_SEEDS = ("integers in [0, 2**31)", lambda v: _is_integer(v) and 0 <= v < 2**31)
_MOMENTA = ("numbers in [0, 1)", lambda v: _is_finite(v) and 0 <= v < 1)


class ClassProfile(NamedTuple):
    """Says how many training examples each class has.

    Attributes:
      kind: of the profile.
      ratio: R, the size of the largest class over that of the smallest.
      minority: K, the number of small classes of a step; 0: half of all.
    """

    kind: Literal["balanced", "natural", "exponential", "step"]
    ratio: float = 1.0
    minority: int = 0


def parse_classes(text: str) -> ClassProfile | None:
    """Returns the profile that `data.classes` names, or None where it names none."""
    kind, *numbers = text.split(":")
    try:
        ratio = float(numbers[0]) if numbers else 1.0
        minority = int(numbers[1]) if len(numbers) > 1 else 0
    except ValueError:
        return None
    is_in_range = 1 <= ratio <= _MOST and (len(numbers) < 2 or 1 <= minority <= _MOST)
    match kind, len(numbers):
        case (("balanced" | "natural"), 0):
            return ClassProfile(kind)
        case "exponential", 1:
            return ClassProfile(kind, ratio) if is_in_range else None
        case "step", (1 | 2):
            return ClassProfile(kind, ratio, minority) if is_in_range else None
    return None


class _Section:
    """Refuses fields that do not exist; a type checker sees them without being run."""

    if not TYPE_CHECKING:  # with a __setattr__ in sight it would accept every name

        def __setattr__(self, name, value):
            if name not in self.__dataclass_fields__:
                hint = near(name, self.__dataclass_fields__)
                raise AttributeError(f"{type(self).__name__} has no field {name}{hint}")
            super().__setattr__(name, value)


@dataclass
class DataConfig(_Section):
    name: str = _described(
        "digits",
        "digits (embedded), synthetic, identity, a .npz, a folder of images (train/CLASS/*.png or "
        "*.jpg), or any prepared TFDS image-classification set",
        "must be the name of a data set",
        lambda v: _is_text(v) and v != "",
    )
    dir: str = _path(
        "where TFDS data sets lie (default: $TFDS_DATA_DIR, then ~/tensorflow_datasets)"
    )
    per_class: int = _integer(
        0, "training examples per class, of the largest one (0: the most that there are)", 0
    )
    num_classes: int = _described(
        0,
        "classes of synthetic and identity (0: 10); of other sets the set decides",
        "must be 0 or an integer >= 2",
        lambda v: _is_integer(v) and (v == 0 or 2 <= v <= _MOST),
    )
    classes: str = _described(
        "balanced",
        "examples of each training class: balanced; natural, all there are; exponential:R, from "
        "per_class down to 1/R of it; step:R or step:R:K, the last K classes (by default half) "
        "have 1/R of it",
        "must be balanced, natural, exponential:R, step:R or step:R:K, with R >= 1 and K >= 1",
        lambda v: _is_text(v) and parse_classes(v) is not None,
    )
    test_fraction: float = _described(
        0.0,
        "share of each class that is held out, of a set without a test split (0: a sixth)",
        "must be a number in [0, 1)",
        lambda v: _is_finite(v) and 0 <= v < 1,
    )
    size: int = _integer(
        0, "sides that images are resized to, their largest centred squares (0: as they are)", 0
    )
    color: Color = _choice(
        Color, "channels of images: their own, or gray (luma), or rgb; transparency lies over black"
    )
    input_scale: float = _described(
        2.0, "mean norm of a centred training input", "must be a finite number > 0", _POSITIVE[1]
    )
    standardize: bool = _described(
        False,
        "instead: every channel to mean 0 and variance 1",
        "must be True or False",
        lambda v: isinstance(v, bool),
    )
    pad: int = _integer(0, "sides of images, filled up with a border of zeros (0: as they are)", 0)


@dataclass
class ModelConfig(_Section):
    network: str = _described(
        "",
        "your own flax module, as package.module:Class, in place of `kind` (empty: `kind`)",
        "must be package.module:Class, or the class",
        lambda v: _is_text(v) and (v == "" or _IMPORT_PATH.fullmatch(v) is not None),
    )
    kind: ModelKind = _choice(
        ModelKind,
        "dense layers; conv: 3x3 convolutions of stride 2 below a dense head; residual: dense "
        "layers, each added to its input; resnet18: of four stages, for images of 32x32",
    )
    widths: tuple[int, ...] = _each(
        (128, 128, 128), "width (channels) of each hidden layer, or stage of resnet18", *_WIDTHS
    )
    normalization: Normalization = _choice(
        Normalization,
        "before every activation, by batch (measured in eval mode) or by layer",
    )
    feature_normalization: Normalization = _choice(
        Normalization, "of the features, straight before the head"
    )
    norms: NormDecay = _choice(
        NormDecay,
        "scales and shifts of normalization, and biases below the head; free: trained but not "
        "decayed",
    )
    activation: Activation = _choice(Activation, "nonlinearity of the hidden layers")
    linear_head_depth: int = _integer(1, "layers after the last activation, the head among them", 1)
    linear_input_depth: int = _integer(1, "layers before the first activation", 1)
    head_bias: HeadBias = _choice(HeadBias, "bias of the head; free: trained but not decayed")


@dataclass
class DecayConfig(_Section):
    hidden: tuple[float, ...] = _each(
        (1.0,), "factor on lambda of all that is decayed below the head", *_NON_NEGATIVE
    )
    head: tuple[float, ...] = _each(
        (1.0,), "factor on lambda of the head's weights", *_NON_NEGATIVE
    )
    bias: tuple[float, ...] = _each(
        (1.0,), "factor on lambda of the head's bias, where it is decayed", *_NON_NEGATIVE
    )


@dataclass
class TrainConfig(_Section):
    epochs: int = _integer(300, "passes over the training split", 1)
    schedule_epochs: int = _integer(
        0, "length of the schedule (0: train.epochs); set it to train on later", 0
    )
    batch_size: int = _integer(
        64, "examples per step (0: full batch); a partial last batch is dropped", 0
    )
    augment: Augmentation = _choice(
        Augmentation, "random 4-pixel crops of training images, and mirroring"
    )
    optimizer: Optimizer = _choice(Optimizer, "adamw is adam with decoupled decay")
    decay: Decay = _choice(
        Decay, "lambda w joins the gradient, or (decoupled) the step after momentum"
    )
    schedule: Schedule = _choice(Schedule, "learning rate over the run; step: x0.1 at 1/3 and 2/3")
    precision: Precision = _choice(Precision, "arithmetic of training and measurement")


@dataclass
class SweepConfig(_Section):
    weight_decay: tuple[float, ...] = _each(
        (1e-3,), "lambda, in the units of `units`", *_NON_NEGATIVE
    )
    learning_rate: tuple[float, ...] = _each(
        (0.1,), "initial learning rate, in the units of `units`", *_POSITIVE
    )
    momentum: tuple[float, ...] = _each((0.9,), "momentum of SGD, beta_1 of Adam", *_MOMENTA)
    init_scale: tuple[float, ...] = _each(
        (1.0,), "factor on the He initialization of every weight", *_POSITIVE
    )
    seed: tuple[int, ...] = _each((0,), "initialization and order of batches", *_SEEDS)
    runs_per_program: int = _integer(
        0, "most runs at once, the rest after them (0: as many as memory holds)", 0
    )


@dataclass
class MeshConfig(_Section):
    run: int = _integer(0, "devices over which runs are spread (0: all that are of use)", 0)
    data: int = _integer(1, "devices over which the batch of each run is spread", 1)


@dataclass
class LogConfig(_Section):
    epochs: tuple[int, ...] = _each(
        (), "epochs to measure at (empty: at most 12, log-spaced)", *_EPOCHS, empty=True
    )
    layers: bool = _described(
        False,
        "measure collapse after every layer, and the ranks and balance of all weights",
        "must be True or False",
        lambda v: isinstance(v, bool),
    )


@dataclass
class CheckpointConfig(_Section):
    every: int = _integer(100, "epochs between checkpoints (0: only at the end)", 0)
    keep: int = _integer(2, "newest checkpoints kept", 1)
    marked: tuple[int, ...] = _each(
        (), "epochs whose checkpoint is made and kept", *_EPOCHS, empty=True
    )


@dataclass
class ProfileConfig(_Section):
    dir: str = _path("where a jax.profiler trace of one epoch goes (empty: none)")


@dataclass
class CompileConfig(_Section):
    cache: CompilationCache = _choice(
        CompilationCache,
        "keep compiled programs in the user's cache folder; $JAX_COMPILATION_CACHE_DIR moves them",
    )


@dataclass
class ReportConfig(_Section):
    enabled: bool = _described(
        True,
        "write WORKDIR/report.html at the end, see `ncjax report`",
        "must be True or False",
        lambda v: isinstance(v, bool),
    )


@dataclass
class Config(_Section):
    """Holds every field of a sweep, in sections: `config.train.epochs = 100`.

    A field that does not exist is refused when it is set; values are checked when training begins.

    Attributes:
      data: which data set, how many examples per class, how inputs are scaled.
      model: the network: its kind, or a flax module of yours, widths, activation, normalization
        and biases.
      decay: factors on weight decay below the head, of the head and of its bias.
      loss: `square` or `cross_entropy`.
      targets: of the square loss: `one_hot` or `centered`.
      train: epochs, batches, optimizer, schedule and precision.
      sweep: the grid: every value of weight decay, learning rate, momentum, initialization scale
        and seed.
      mesh: how runs and batches are spread over devices.
      units: `ours`, or `torch` for the numbers that PyTorch's optimizers take.
      log: the epochs to measure at, and whether every layer is measured.
      checkpoint: how often checkpoints are made, and how many are kept.
      profile: where a profiler trace goes.
      compile: whether compiled programs are kept.
      report: whether a report is written at the end.

    Examples:
      >>> import ncjax
      >>> config = ncjax.Config()
      >>> config.train.optimizer, config.sweep.weight_decay = "adamw", (0.0, 1e-3)
      >>> config.train.epoch = 10
      Traceback (most recent call last):
      AttributeError: TrainConfig has no field epoch; did you mean epochs?
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    decay: DecayConfig = field(default_factory=DecayConfig)
    loss: Loss = _choice(Loss, "square: 1/2 ||y - f||^2, theory's; cross_entropy: for contrast")
    targets: Targets = _choice(Targets, "of the square loss; centered: one-hot less 1/C")
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    units: Units = _choice(
        Units, "torch: numbers as for PyTorch's optimizer and MSELoss or CrossEntropyLoss"
    )
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets fields by their dotted names.

        Examples:
          >>> config = Config()
          >>> config.update({"train.epochs": 100, "loss": "cross_entropy"})
          >>> config.train.epochs
          100
        """
        for name, value in values.items():
            section, _, leaf = name.rpartition(".")
            setattr(getattr(self, section) if section else self, leaf, value)


def _described_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    for one in fields(section):
        if "field" in one.metadata:
            yield f"{prefix}{one.name}", one.metadata["field"]
        else:
            yield from _described_fields(one.default_factory, f"{prefix}{one.name}.")


# Every field by its dotted name.
SCHEMA: dict[str, Field] = dict(_described_fields(Config))

# Fields that say where and how a run is computed, not what: a WORKDIR goes on whatever they are.
MACHINE = (
    "sweep.runs_per_program",
    "mesh.run",
    "mesh.data",
    "profile.dir",
    "compile.cache",
    "report.enabled",
)

# The axes of a grid, in their order in every output; seed is last, so that statistics over seeds
# reduce the trailing axis.
SWEPT = ("weight_decay", "learning_rate", "momentum", "init_scale", "seed")

# Axes of a grid where a factor of the `decay` section is not 1.
DECAY_FACTORS = ("decay_hidden", "decay_head", "decay_bias")

# Every axis that a grid may have, in order.
AXES = (*SWEPT[:-1], *DECAY_FACTORS, SWEPT[-1])


def default_config() -> Config:
    """Returns a config with every field at its default, to be edited."""
    return Config()


def describe_fields() -> str:
    """Returns a line and a meaning per field, for `--help`."""
    return "\n".join(
        f"  --config.{name}={_shown(described.default)}\n      {described.meaning} "
        f"({described.must.removeprefix('must be ')})"
        for name, described in SCHEMA.items()
    )


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_mapping(config: Any) -> dict[str, Any]:
    """Returns a config as nested dicts; a class stands there as its import path."""

    def plain(value: Any) -> Any:
        if isinstance(value, type):
            return _import_path(value)
        return to_mapping(value) if is_dataclass(value) else value

    return {one.name: plain(getattr(config, one.name)) for one in fields(config)}


def from_mapping(nested: Mapping[str, Any]) -> Config:
    """Returns the config of nested dicts that have every field, or raises InputError.

    The values are not checked: `validate` does that.
    """
    flat = flatten(nested)
    for name in sorted(flat.keys() - SCHEMA.keys()):
        raise InputError(
            f"config.{name}", flat[name], "no such field; `python -m ncjax.main --help` lists them"
        )
    for name in SCHEMA:
        if name not in flat:
            raise InputError(
                f"config.{name}", "nothing", "start from ncjax.config.default_config()"
            )
    config = Config()
    config.update(flat)
    return config


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns every field of nested dicts by its dotted name."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def validate(config: Config) -> Config:
    """Returns a checked copy in which every value has the type of its field.

    Scalars of sweeps become tuples, epochs are sorted, and AdamW's decay is said to be decoupled.

    Raises:
      InputError: a field has a value that it may not have; the first such field is named.
    """
    valid = from_mapping(to_mapping(config))
    for name, value in flatten(to_mapping(valid)).items():
        valid.update({name: checked_value(name, value)})
    _check_sweep(valid)
    check_held("config.data.input_scale", (valid.data.input_scale,), valid.train.precision)
    _check_combinations(valid)
    decays = OPTIMIZERS[valid.train.optimizer].decays
    if decays == ("decoupled",):  # the default is coupled
        valid.train.decay = "decoupled"
    valid.log.epochs = _checked_epochs("log.epochs", valid.log.epochs, valid.train.epochs)
    valid.checkpoint.marked = _checked_epochs(
        "checkpoint.marked", valid.checkpoint.marked, valid.train.epochs
    )
    return valid


def checked_value(name: str, value: Any) -> Any:
    """Returns a value as its field holds it, or raises InputError; a class as its import path."""
    described = SCHEMA[name]
    if isinstance(value, type):
        value = _import_path(value)
    if isinstance(described.default, tuple):
        value = tuple(value) if isinstance(value, tuple | list) else (value,)
    elif isinstance(value, tuple | list):
        way_out = "it has one value here; `vary`, and a command line, give it several"
        raise InputError(f"config.{name}", value, way_out)
    if not described.holds(value):
        raise InputError(f"config.{name}", value, described.must)
    return _plain(value, described.default)


def _import_path(network: type) -> str:
    """Returns where a class is imported from, or raises InputError where it cannot be."""
    path = f"{network.__module__}:{network.__qualname__}"
    if "<locals>" in path:
        way_out = "it stands inside a function; define it at the top of a module"
        raise InputError("config.model.network", path, way_out)
    return path


def _plain(value: Any, default: object) -> Any:
    """Returns a valid value in Python's own types: NumPy numbers and integers for floats go."""
    if isinstance(default, tuple):
        # Every tuple whose default is empty or integral holds integers.
        is_float = bool(default) and isinstance(default[0], float)
        return tuple(float(v) if is_float else int(v) for v in value)
    python_type: Any = type(default)
    return python_type(value)


def _check_sweep(config: Config) -> None:
    """Raises InputError for a value that stands twice, or that training would take for another."""
    precision = config.train.precision
    swept = {f"config.sweep.{name}": getattr(config.sweep, name) for name in SWEPT}
    factors = {
        f"config.decay.{one.name}": getattr(config.decay, one.name) for one in fields(DecayConfig)
    }
    for name, values in (swept | factors).items():
        repeated = [v for i, v in enumerate(values) if v in values[:i]]
        if repeated:
            raise InputError(name, values, f"{repeated[0]!r} stands twice; remove the repetition")
        if name != "config.sweep.seed":
            check_held(name, values, precision)
    for momentum in config.sweep.momentum:
        # Steps add up to 1/(1 - momentum) gradients: what it lacks of 1 must be held as well.
        lacks = 1 - float(np.asarray(momentum, precision))
        if not math.isclose(lacks, 1 - momentum, rel_tol=1e-2):
            way_out = f"{precision} takes it for {1 - lacks:.10g}; choose a smaller one"
            raise InputError("config.sweep.momentum", momentum, way_out + _or_more(precision))


def _or_more(precision: Precision) -> str:
    return ", or set config.train.precision=float64" if precision == "float32" else ""


def _checked_epochs(name: str, epochs: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Returns epochs in order and each once, or raises InputError where training ends earlier."""
    for epoch in sorted(epochs):
        if epoch > last:
            raise InputError(
                f"config.{name}", epoch, f"must be at most config.train.epochs = {last}"
            )
    return tuple(sorted(set(epochs)))


def check_held(
    field: str, values: Sequence[float], precision: Precision, factor: float = 1
) -> None:
    """Raises InputError for a number that training, which computes with `factor` times it, would
    take for another.

    A subnormal number is one of them: devices may take it for 0.
    """
    limits = np.finfo(precision)
    with np.errstate(over="ignore", under="ignore"):
        held = np.multiply(values, factor).astype(precision).tolist()
    more = _or_more(precision)
    for i, (value, number) in enumerate(zip(values, held, strict=True)):
        if value and not limits.tiny <= number <= limits.max:
            here = f" (training would use {value * factor:.3g})" if factor != 1 else ""
            bounds = f"{precision} holds numbers from {limits.tiny:.3g} to {limits.max:.3g}{here}"
            raise InputError(field, value, f"{bounds}; choose one of them{more}")
        if number in held[:i]:
            other = values[held.index(number)]
            raise InputError(
                field, value, f"{precision} takes it and {other!r} for one number; remove one{more}"
            )


def _check_combinations(config: Config) -> None:
    """Raises InputError for choices that exclude each other."""
    decays = OPTIMIZERS[config.train.optimizer].decays
    if config.train.decay not in decays and decays == ("coupled",):
        raise InputError(
            "config.train.decay", "decoupled", "Adam so decayed is config.train.optimizer=adamw"
        )
    if config.loss == "cross_entropy" and config.targets == "centered":
        raise InputError("config.targets", "centered", "cross-entropy needs one_hot")
    if config.decay.bias != (1.0,) and config.model.head_bias != "decayed":
        way_out = "no bias of the head is decayed; set config.model.head_bias=decayed"
        raise InputError("config.decay.bias", config.decay.bias, way_out)
    if not config.model.network:
        _check_kind(config.model)


def _check_kind(model: ModelConfig) -> None:
    """Raises InputError for a network that there is not; what a user's own takes it says itself."""
    hidden = len(model.widths)
    if model.kind == "conv" and model.normalization == "layer":
        raise InputError(
            "config.model.normalization", "layer", "of dense layers alone; take batch or none"
        )
    if model.kind == "resnet18":
        _check_resnet(model)
    if model.kind == "residual" and len(set(model.widths)) > 1:
        way_out = "a layer is added to its input; make all widths equal"
        raise InputError("config.model.widths", model.widths, way_out)
    before, after = model.linear_input_depth, model.linear_head_depth
    for name, depth in (("linear_input_depth", before), ("linear_head_depth", after)):
        if model.kind == "residual" and depth > 1:
            way_out = "every residual layer has its activation; leave it 1"
            raise InputError(f"config.model.{name}", depth, way_out)
        if depth > 1 and model.activation == "linear":
            way_out = "every layer is linear already; leave it 1"
            raise InputError(f"config.model.{name}", depth, way_out)
    if before + after > hidden + 1:
        name, depth = max(
            (("linear_input_depth", before), ("linear_head_depth", after)), key=lambda one: one[1]
        )
        way_out = (
            f"config.model.widths has {hidden} hidden layers, of which one must keep its activation"
        )
        raise InputError(f"config.model.{name}", depth, way_out)


def _check_resnet(model: ModelConfig) -> None:
    """Raises InputError for settings that are not ResNet18's."""
    if len(model.widths) != 4:
        way_out = "resnet18 has four stages; the paper's are 64,128,256,512"
        raise InputError("config.model.widths", model.widths, way_out)
    for name, only in (
        ("normalization", "batch"),
        ("feature_normalization", "none"),
        ("activation", "relu"),
        ("linear_head_depth", 1),
        ("linear_input_depth", 1),
    ):
        if getattr(model, name) != only:
            raise InputError(
                f"config.model.{name}", getattr(model, name), f"resnet18 has {only}; set it"
            )


def to_json(config: Config) -> str:
    """Returns the text of config.json."""
    return json.dumps(to_mapping(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """Returns the config that config.json holds; see `from_stored`."""
    return from_stored(json.loads(text))


def from_stored(stored: Mapping[str, Any]) -> Config:
    """Returns the config of a parsed config.json; fields that are no more are left out.

    A field younger than the file has its default, which is what was done before there was one.

    Raises:
      TypeError: `stored` does not have the sections of a config.
    """
    values = _stored_fields(stored)
    config = Config()
    config.update({name: values[name] for name in SCHEMA})
    return config


def _stored_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    sections = [name.partition(".")[0] for name in SCHEMA if "." in name]
    if not all(isinstance(part, Mapping) for part in (stored, *map(stored.get, sections)) if part):
        raise TypeError("a config is a mapping of mappings")
    defaults = {name: described.default for name, described in SCHEMA.items()}
    # JSON has lists for tuples.
    found = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flatten(stored).items()
    }
    return defaults | found


def is_sound(stored: Mapping[str, Any]) -> bool:
    """Returns whether every field of a parsed config.json has a value that it may have."""
    values = _stored_fields(stored)
    return all(
        isinstance(values[name], tuple) == isinstance(described.default, tuple)
        and described.holds(values[name])
        for name, described in SCHEMA.items()
    )


def differences(config: Config | Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Returns what keeps a config from continuing a stored run; a line per field, with both values.

    More epochs are no hindrance where the learning rate of those behind does not depend on them;
    nor is another mesh.

    Args:
      config: of the run that would continue; a parsed config.json will do.
      stored: the parsed config.json of the run that would be continued.
    """
    mine = _stored_fields(to_mapping(config) if isinstance(config, Config) else config)
    theirs = _stored_fields(stored)
    return [_difference(name, mine, theirs) for name in _different(mine, theirs)]


def differences_beside_axes(stored: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns `differences` of two parsed config.json but for values of the axes of their grids."""
    mine, theirs = _stored_fields(stored), _stored_fields(other)
    names = [name for name in _different(mine, theirs) if name not in axis_fields()]
    return [_difference(name, mine, theirs) for name in names]


def _difference(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return f"config.{name} is {mine.get(name)!r} here and {theirs.get(name)!r} there"


def _different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the names of fields that differ and decide what is trained."""
    names = sorted((mine.keys() | theirs.keys()) - set(MACHINE))
    is_constant = mine["train.schedule"] == "constant"
    lengths = [one["train.schedule_epochs"] or one["train.epochs"] for one in (mine, theirs)]
    if is_constant or lengths[0] == lengths[1]:  # the schedule is the same function
        names.remove("train.schedule_epochs")
        if theirs["train.epochs"] < mine["train.epochs"]:
            names.remove("train.epochs")
    return [name for name in names if mine.get(name) != theirs.get(name)]


def axis_fields() -> list[str]:
    """Returns the names of the fields whose values are axes of the grid, in its order."""
    factors = [f"decay.{one.name}" for one in fields(DecayConfig)]
    return [*(f"sweep.{name}" for name in SWEPT[:-1]), *factors, f"sweep.{SWEPT[-1]}"]


def grows(config: Config, stored: Mapping[str, Any]) -> bool:
    """Returns whether a config is that of a stored run but for more values on axes of its grid."""
    mine, theirs = _stored_fields(to_mapping(config)), _stored_fields(stored)
    different = _different(mine, theirs)
    return bool(different) and all(
        name in axis_fields() and set(mine[name]) >= set(theirs[name]) for name in different
    )


def missing_blocks(config: Config, old: Config) -> list[Config]:
    """Returns configs whose grids together are the runs of a config that an older one lacks.

    The block of an axis has its new values, the old values of the axes before it, and all values of
    those after it.
    """
    mine, theirs = (_stored_fields(to_mapping(one)) for one in (config, old))
    blocks, before = [], {}
    for name in axis_fields():
        fresh = tuple(value for value in mine[name] if value not in theirs[name])
        if fresh:
            block = from_stored(to_mapping(config))
            block.update(before | {name: fresh})
            blocks.append(block)
        before[name] = theirs[name]
    return blocks


def log_spaced_epochs(epochs: int, most: int = 12) -> tuple[int, ...]:
    """Returns at most `most` epochs from 0 to `epochs`, log-spaced between 1 and `epochs`."""
    points = {round(epochs ** (i / (most - 2))) for i in range(most - 1)}
    return tuple(sorted({0, epochs} | points))


@dataclass(frozen=True)
class Place:
    """Names a run of a grid by its index and by its value on every axis."""

    index: int
    coordinates: dict[str, float | int]


@dataclass(frozen=True)
class Grid:
    """Orders the runs of a sweep: the product of all swept axes, the last axis (seed) fastest.

    Attributes:
      axes: values by name, in the project's units and in the order of `SWEPT`.
    """

    axes: Mapping[str, Sequence]

    @property
    def dims(self) -> tuple[str, ...]:
        """The axes that are dimensions of every output: weight_decay, seed, and whatever else has
        several values.
        """
        return tuple(
            name
            for name, values in self.axes.items()
            if name in ("weight_decay", "seed") or len(values) > 1
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of values along each of `dims`."""
        return tuple(len(self.axes[name]) for name in self.dims)

    @property
    def size(self) -> int:
        """R, the number of runs."""
        return math.prod(self.shape)

    @property
    def dim_values(self) -> dict[str, list]:
        """Values along each of `dims`."""
        return {name: list(self.axes[name]) for name in self.dims}

    def columns(self) -> dict[str, list]:
        """Returns the value of every run, (R,) each, on every axis."""
        rows = list(itertools.product(*self.axes.values()))
        return {name: [row[i] for row in rows] for i, name in enumerate(self.axes)}

    def unflatten(self, by_run: np.ndarray) -> np.ndarray:
        """Returns values of all runs, (R, ...), as an array (*shape, ...)."""
        return by_run.reshape(*self.shape, *by_run.shape[1:])

    def places(self) -> list[Place]:
        """Returns the place of every run, in order."""
        rows = itertools.product(*self.axes.values())
        return [
            Place(index, dict(zip(self.axes, row, strict=True))) for index, row in enumerate(rows)
        ]

    def find(self, coordinates: Mapping[str, Any]) -> Place:
        """Returns the place of the one run at some coordinates.

        Numbers are the same within 1e-9, relative. An axis of one value may be left out.

        Raises:
          InputError: there is no such run, or there are several; it names the values that there
            are.
        """
        for name in coordinates.keys() - self.axes.keys():
            way_out = f"no such axis; the grid has {', '.join(self.axes)}"
            raise InputError(name, coordinates[name], way_out)
        chosen = {}
        for name, values in self.axes.items():
            if name in coordinates:
                chosen[name] = _nearest(name, values, coordinates[name])
            elif len(values) == 1:
                chosen[name] = values[0]
            else:
                way_out = f"{name} is missing; name one of {listed(values)}"
                raise InputError("run", dict(coordinates), way_out)
        at = [list(values).index(chosen[name]) for name, values in self.axes.items()]
        lengths = [len(values) for values in self.axes.values()]
        return Place(int(np.ravel_multi_index(at, lengths)), chosen)


def _nearest(name: str, values: Sequence, value: Any) -> float | int:
    """Returns the value of an axis that a number is equal to, but for rounding."""
    try:
        same = [v for v in values if math.isclose(v, float(value), rel_tol=1e-9)]
    except (TypeError, ValueError):
        same = []
    if not same:
        raise InputError(name, value, f"the grid has {listed(values)}")
    return min(same, key=lambda v: abs(v - float(value)))


def swept_values(config: Config) -> dict[str, tuple]:
    """Returns the values of every axis of a config's grid, as they are given.

    Factors on weight decay are axes where they are not 1.
    """
    factors = {f"decay_{one.name}": getattr(config.decay, one.name) for one in fields(DecayConfig)}
    values = {name: getattr(config.sweep, name) for name in SWEPT}
    values |= {name: given for name, given in factors.items() if given != (1.0,)}
    return {name: tuple(values[name]) for name in AXES if name in values}


def make_grid(config: Config, num_classes: int) -> Grid:
    """Returns the grid of a validated config, in the project's units."""
    axes = swept_values(config)
    units = unit_factors(config, num_classes)
    axes["weight_decay"] = tuple(wd * units.weight_decay for wd in axes["weight_decay"])
    axes["learning_rate"] = tuple(lr * units.learning_rate for lr in axes["learning_rate"])
    return Grid(axes)


def check_units(config: Config, num_classes: int) -> None:
    """Raises InputError for a valid number that leaves `train.precision` in the project's units."""
    units = unit_factors(config, num_classes)
    precision = config.train.precision
    check_held(
        "config.sweep.weight_decay", config.sweep.weight_decay, precision, units.weight_decay
    )
    check_held(
        "config.sweep.learning_rate", config.sweep.learning_rate, precision, units.learning_rate
    )


class UnitFactors(NamedTuple):
    """Factors that take a config's numbers, and PyTorch's default eps of Adam (1e-8), to ours."""

    weight_decay: float
    learning_rate: float
    adam_eps: float


def unit_factors(config: Config, num_classes: int) -> UnitFactors:
    """Returns the factors that give equal trajectories.

    PyTorch's `MSELoss` also averages over the C outputs: its gradient is 2/C of ours, so lambda =
    wd C/2 wherever decay joins the gradient. SGD's step then needs lr = 2 lr/C; Adam's does not
    change, but for eps C/2. AdamW's decay is no part of the gradient: lambda = wd. Cross-entropy is
    the same in both.
    """
    if config.units == "ours" or config.loss == "cross_entropy":
        return UnitFactors(1.0, 1.0, 1.0)
    half = num_classes / 2
    if config.train.optimizer not in OPTIMIZERS:
        raise unknown_choice("optimizer", config.train.optimizer, Optimizer)
    optimizer = OPTIMIZERS[config.train.optimizer]
    if optimizer.scales_with_loss:
        return UnitFactors(half, 1 / half, 1.0)
    joins_gradient = "coupled" in optimizer.decays
    return UnitFactors(half if joins_gradient else 1.0, 1.0, half)
