"""The schema of a run: every field with its default, its meaning and what it must satisfy; and
the grid of runs.
"""

import itertools
import json
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from ml_collections import config_dict

from ncjax.errors import InputError

# A ConfigDict with the fields of `SCHEMA`; which attributes it has is known only when it runs.
Config: TypeAlias = Any


class Field(NamedTuple):
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


_MOST = 2**31 - 1  # that a device counts to


def _integer(default: int, meaning: str, least: int) -> Field:
    must = f"must be an integer >= {least} (and < 2**31)"
    return Field(default, meaning, must, lambda v: _is_integer(v) and least <= v <= _MOST)


def _choice(default: str, meaning: str, *others: str) -> Field:
    choices = (default, *others)
    return Field(
        default,
        meaning,
        f"must be one of {', '.join(choices)}",
        lambda v: isinstance(v, str) and v in choices,
    )


def _each(
    default: tuple, meaning: str, must: str, holds: Callable[[Any], bool], empty: bool = False
) -> Field:
    """A tuple whose elements are checked one by one (ml_collections does not check them)."""
    least = "zero or more" if empty else "one or more"
    return Field(
        default,
        meaning,
        f"must be {least} {must}",
        lambda v: (empty or len(v) > 0) and all(holds(x) for x in v),
    )


_POSITIVE = ("finite numbers > 0", lambda v: _is_finite(v) and v > 0)
_NON_NEGATIVE = ("finite numbers >= 0", lambda v: _is_finite(v) and v >= 0)
_EPOCHS = ("integers >= 0 (and < 2**31)", lambda v: _is_integer(v) and 0 <= v <= _MOST)
_WIDTHS = ("integers >= 1 (and < 2**31)", lambda v: _is_integer(v) and 1 <= v <= _MOST)
_SEEDS = ("integers in [0, 2**31)", lambda v: _is_integer(v) and 0 <= v < 2**31)
_MOMENTA = ("numbers in [0, 1)", lambda v: _is_finite(v) and 0 <= v < 1)

SCHEMA: dict[str, Field] = {
    "data.name": Field(
        "digits",
        "digits (embedded), synthetic, identity, or any prepared TFDS image-classification set",
        "must be the name of a data set",
        lambda v: isinstance(v, str) and v != "",
    ),
    "data.dir": Field(
        "",
        "where TFDS data sets lie (default: $TFDS_DATA_DIR, then ~/tensorflow_datasets)",
        "must be a path",
        lambda v: isinstance(v, str),
    ),
    "data.per_class": _integer(
        0, "training examples per class (0: the most that keeps classes balanced)", 0
    ),
    "data.num_classes": Field(
        0,
        "classes of synthetic and identity (0: 10); of other sets the set decides",
        "must be 0 or an integer >= 2",
        lambda v: _is_integer(v) and (v == 0 or 2 <= v <= _MOST),
    ),
    "data.input_scale": Field(
        2.0, "mean norm of a centred training input", "must be a finite number > 0", _POSITIVE[1]
    ),
    "data.standardize": Field(
        False,
        "instead: every channel to mean 0 and variance 1",
        "must be True or False",
        lambda v: isinstance(v, bool),
    ),
    "data.pad": _integer(
        0, "sides of images, filled up with a border of zeros (0: as they are)", 0
    ),
    "model.kind": _choice(
        "mlp", "dense layers, or (conv) 3x3 convolutions of stride 2 below a dense head", "conv"
    ),
    "model.widths": _each((128, 128, 128), "width (channels) of each hidden layer", *_WIDTHS),
    "model.normalization": _choice(
        "none",
        "batch: before every activation; no longer homogeneous; measured in eval mode",
        "batch",
    ),
    "model.norms": _choice(
        "decayed", "scale and shift of normalization; free: trained but not decayed", "free"
    ),
    "model.activation": _choice("relu", "nonlinearity of the hidden layers", "linear"),
    "model.linear_head_depth": _integer(
        1, "layers after the last activation, the head among them", 1
    ),
    "model.head_bias": _choice(
        "none", "bias of the head; free: trained but not decayed", "free", "decayed"
    ),
    "loss": _choice(
        "square", "square: 1/2 ||y - f||^2, theory's; cross_entropy: for contrast", "cross_entropy"
    ),
    "targets": _choice("one_hot", "of the square loss; centered: one-hot less 1/C", "centered"),
    "train.epochs": _integer(300, "passes over the training split", 1),
    "train.schedule_epochs": _integer(
        0, "length of the schedule (0: train.epochs); set it to train on later", 0
    ),
    "train.batch_size": _integer(
        64, "examples per step (0: full batch); a partial last batch is dropped", 0
    ),
    "train.augment": _choice(
        "none", "random 4-pixel crops of training images, and mirroring", "crop", "crop_flip"
    ),
    "train.optimizer": _choice("sgd", "adamw is adam with decoupled decay", "adam", "adamw"),
    "train.decay": _choice(
        "coupled",
        "lambda w joins the gradient, or (decoupled) the step after momentum",
        "decoupled",
    ),
    "train.schedule": _choice(
        "cosine", "learning rate over the run; step: x0.1 at 1/3 and 2/3", "constant", "step"
    ),
    "train.precision": _choice("float32", "arithmetic of training and measurement", "float64"),
    "sweep.weight_decay": _each((1e-3,), "lambda, in the units of `units`", *_NON_NEGATIVE),
    "sweep.learning_rate": _each(
        (0.1,), "initial learning rate, in the units of `units`", *_POSITIVE
    ),
    "sweep.momentum": _each((0.9,), "momentum of SGD, beta_1 of Adam", *_MOMENTA),
    "sweep.init_scale": _each(
        (1.0,), "factor on the He initialization of every weight", *_POSITIVE
    ),
    "sweep.seed": _each((0,), "initialization and order of batches", *_SEEDS),
    "sweep.runs_per_program": _integer(
        0, "most runs at once, the rest after them (0: as many as memory holds)", 0
    ),
    "mesh.run": _integer(0, "devices over which runs are spread (0: all that are of use)", 0),
    "mesh.data": _integer(1, "devices over which the batch of each run is spread", 1),
    "units": _choice(
        "ours", "torch: numbers as for PyTorch's optimizer and MSELoss or CrossEntropyLoss", "torch"
    ),
    "log.epochs": _each(
        (), "epochs to measure at (empty: at most 12, log-spaced)", *_EPOCHS, empty=True
    ),
    "checkpoint.every": _integer(100, "epochs between checkpoints (0: only at the end)", 0),
    "checkpoint.keep": _integer(2, "newest checkpoints kept", 1),
    "checkpoint.marked": _each(
        (), "epochs whose checkpoint is made and kept", *_EPOCHS, empty=True
    ),
    "profile.dir": Field(
        "",
        "where a jax.profiler trace of one epoch goes (empty: none)",
        "must be a path",
        lambda v: isinstance(v, str),
    ),
    "compile.cache": _choice(
        "user",
        "keep compiled programs in the user's cache folder; $JAX_COMPILATION_CACHE_DIR moves them",
        "off",
    ),
}

# Where and how a run is computed, not what: a WORKDIR goes on whatever they are.
_MACHINE = ("sweep.runs_per_program", "mesh.run", "mesh.data", "profile.dir", "compile.cache")

# Order of the axes in every output; seed last, so that statistics over seeds reduce the trailing
# axis.
SWEPT = ("weight_decay", "learning_rate", "momentum", "init_scale", "seed")


def default_config() -> Config:
    """Returns a locked ConfigDict with every field of `SCHEMA` at its default."""
    # Not type-safe: a scalar must be accepted where a tuple stands, and `validate` names the field
    # better.
    nested: dict = {}
    for name, field in SCHEMA.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = field.default
    return config_dict.ConfigDict(nested, type_safe=False).lock()


def describe_fields() -> str:
    """One line per field, for `--help`."""
    return "\n".join(
        f"  --config.{name}={_shown(field.default)}\n      {field.meaning} "
        f"({field.must.removeprefix('must be ')})"
        for name, field in SCHEMA.items()
    )


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def validate(config: Config) -> Config:
    """Returns `config` with scalars of sweeps made tuples, or raises InputError naming the first
    bad field.
    """
    try:
        flat = flatten(config)
    except TypeError as error:  # ConfigDict sorts its keys
        raise InputError(
            "config", "keys of several types", "name every field by a string"
        ) from error
    for name in sorted(flat.keys() - SCHEMA.keys()):
        raise InputError(
            f"config.{name}", flat[name], "no such field; `python -m ncjax.main --help` lists them"
        )
    config = config.copy_and_resolve_references()
    for name, field in SCHEMA.items():
        if name not in flat:
            raise InputError(
                f"config.{name}", "nothing", "start from ncjax.config.default_config()"
            )
        value: Any = flat[name]
        if isinstance(field.default, tuple):
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if not field.holds(value):
            raise InputError(f"config.{name}", value, field.must)
        config.update_from_flattened_dict({name: _plain(value, field.default)})
    for name in SWEPT:
        values = config.sweep[name]
        repeated = [v for i, v in enumerate(values) if v in values[:i]]
        if repeated:
            raise InputError(
                f"config.sweep.{name}",
                values,
                f"{repeated[0]!r} stands twice; remove the repetition",
            )
        if name != "seed":
            check_held(f"config.sweep.{name}", values, config.train.precision)
    for momentum in config.sweep.momentum:
        # Steps add up to 1/(1 - momentum) gradients: what it lacks of 1 must be held as well.
        lacks = 1 - float(np.asarray(momentum, config.train.precision))
        if not math.isclose(lacks, 1 - momentum, rel_tol=1e-2):
            way_out = (
                f"{config.train.precision} takes it for {1 - lacks:.10g}; choose a smaller one"
            )
            way_out += (
                ", or set config.train.precision=float64"
                if config.train.precision == "float32"
                else ""
            )
            raise InputError("config.sweep.momentum", momentum, way_out)
    check_held("config.data.input_scale", (config.data.input_scale,), config.train.precision)
    _check_combinations(config)
    for section, field in (("log", "epochs"), ("checkpoint", "marked")):
        config[section][field] = tuple(sorted(set(config[section][field])))
        late = [epoch for epoch in config[section][field] if epoch > config.train.epochs]
        if late:
            must = f"must be at most config.train.epochs = {config.train.epochs}"
            raise InputError(f"config.{section}.{field}", late[0], must)
    return config


def check_held(field: str, values: Sequence[float], precision: str, factor: float = 1.0) -> None:
    """Raises InputError for a number that training, which computes with `factor` times it, would
    take for another.

    A subnormal number is one of them: devices may take it for 0.
    """
    limits = np.finfo(precision)
    with np.errstate(over="ignore", under="ignore"):
        held = np.multiply(values, factor).astype(precision).tolist()
    more = ", or set config.train.precision=float64" if precision == "float32" else ""
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


def is_sound(config: Config) -> bool:
    """Returns whether every field that is known, of a config as it was written, has a value that
    it may have.
    """
    flat = flatten(config)
    return all(name in flat and _holds(field, flat[name]) for name, field in SCHEMA.items())


def _holds(field: Field, value: Any) -> bool:
    return isinstance(value, (tuple, list)) == isinstance(field.default, tuple) and field.holds(
        value
    )


def _check_combinations(config: Config) -> None:
    """Choices that exclude each other; AdamW is decoupled by definition, and the config then
    says so.
    """
    if config.train.optimizer == "adam" and config.train.decay == "decoupled":
        raise InputError(
            "config.train.decay", "decoupled", "Adam so decayed is config.train.optimizer=adamw"
        )
    if config.train.optimizer == "adamw":
        config.train.decay = "decoupled"
    if config.loss == "cross_entropy" and config.targets == "centered":
        raise InputError("config.targets", "centered", "cross-entropy needs one_hot")
    if config.model.normalization == "batch" and config.model.kind != "conv":
        raise InputError(
            "config.model.normalization",
            "batch",
            "of convolutions alone; set config.model.kind=conv",
        )
    depth, hidden = config.model.linear_head_depth, len(config.model.widths)
    if depth > 1 and config.model.activation == "linear":
        raise InputError(
            "config.model.linear_head_depth", depth, "every layer is linear already; leave it 1"
        )
    if depth > hidden:
        way_out = (
            f"config.model.widths has {hidden} hidden layers, of which one must keep its activation"
        )
        raise InputError("config.model.linear_head_depth", depth, way_out)


def _plain(value: Any, default: object) -> Any:
    """A valid value in Python's own types, which JSON can hold: floats where floats are meant."""
    if isinstance(default, tuple):
        # Every tuple whose default is empty or integral holds integers.
        is_float = bool(default) and isinstance(default[0], float)
        return tuple(float(v) if is_float else int(v) for v in value)
    python_type: Any = type(default)
    return python_type(value)


def flatten(config: Config, prefix: str = "") -> dict[str, object]:
    """Returns every field by its dotted name."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, config_dict.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(config: Config, other: dict) -> list[str]:
    """What keeps `config` from continuing a run of `other`, a parsed config.json; a line per field,
    with both values.

    More epochs are no hindrance where the learning rate of those behind does not depend on them;
    nor is another mesh.
    """
    mine, theirs = (flatten(from_json(text)) for text in (to_json(config), json.dumps(other)))
    fields = sorted((mine.keys() | theirs.keys()) - set(_MACHINE))
    longer: Any = (theirs.get("train.epochs"), mine.get("train.epochs"))
    fixed = mine.get("train.schedule") == "constant" or mine.get("train.schedule_epochs")
    if fixed and None not in longer and longer[0] < longer[1]:
        fields.remove("train.epochs")
    return [
        f"config.{name} is {mine.get(name)!r} here and {theirs.get(name)!r} there"
        for name in fields
        if mine.get(name) != theirs.get(name)
    ]


def to_json(config: Config) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """A config as it was written; a field younger than it has its default, which is what was
    done before.
    """
    nested = json.loads(text)
    for name, field in SCHEMA.items():
        section, _, leaf = name.rpartition(".")
        # JSON has lists for tuples.
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        (nested.setdefault(section, {}) if section else nested).setdefault(leaf, default)
    return config_dict.ConfigDict(nested)


def log_spaced_epochs(epochs: int, most: int = 12) -> tuple[int, ...]:
    """At most `most` epochs from 0 to `epochs`, log-spaced between 1 and `epochs`."""
    points = {round(epochs ** (i / (most - 2))) for i in range(most - 1)}
    return tuple(sorted({0, epochs} | points))


class Grid(NamedTuple):
    """The product of all swept axes. Run r of R is `np.unravel_index(r, shape)`, the last axis
    (seed) fastest.

    Attributes:
      axes: values per name in `SWEPT`, in our units.
      dims: the axes that become dimensions of every output: weight_decay, seed, and whatever else
        has several values.
    """

    axes: dict[str, tuple]
    dims: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.axes[name]) for name in self.dims)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def columns(self) -> dict[str, list]:
        """Value per run, (R,) each, of every name in `SWEPT`."""
        rows = list(itertools.product(*(self.axes[name] for name in SWEPT)))
        return {name: [row[i] for row in rows] for i, name in enumerate(SWEPT)}


def make_grid(config: Config, num_classes: int) -> Grid:
    """The grid of a validated config, in our units."""
    axes = {name: tuple(config.sweep[name]) for name in SWEPT}
    units = unit_factors(config, num_classes)
    axes["weight_decay"] = tuple(wd * units.weight_decay for wd in axes["weight_decay"])
    axes["learning_rate"] = tuple(lr * units.learning_rate for lr in axes["learning_rate"])
    dims = tuple(name for name in SWEPT if name in ("weight_decay", "seed") or len(axes[name]) > 1)
    return Grid(axes, dims)


def check_units(config: Config, num_classes: int) -> None:
    """Raises InputError where a validated number leaves `train.precision` on its way to our
    units.
    """
    units = unit_factors(config, num_classes)
    for name in ("weight_decay", "learning_rate"):
        check_held(
            f"config.sweep.{name}", config.sweep[name], config.train.precision, getattr(units, name)
        )


class UnitFactors(NamedTuple):
    """What takes a config's numbers to ours, and PyTorch's default eps of Adam, 1e-8, with them."""

    weight_decay: float
    learning_rate: float
    adam_eps: float


def unit_factors(config: Config, num_classes: int) -> UnitFactors:
    """Factors of equal trajectories.

    PyTorch's `MSELoss` also averages over the C outputs: its gradient is 2/C of ours, so lambda =
    wd C/2 wherever decay joins the gradient. SGD's step then needs lr = 2 lr/C; Adam's does not
    change, but for eps C/2. AdamW's decay is no part of the gradient: lambda = wd. Cross-entropy is
    the same in both.
    """
    if config.units == "ours" or config.loss == "cross_entropy":
        return UnitFactors(1.0, 1.0, 1.0)
    half = num_classes / 2
    return {
        "sgd": UnitFactors(half, 1 / half, 1.0),
        "adam": UnitFactors(half, 1.0, half),
        "adamw": UnitFactors(1.0, 1.0, half),
    }[config.train.optimizer]
