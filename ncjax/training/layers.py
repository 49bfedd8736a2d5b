"""Finds what a network is made of: its layers of weights in forward order, what scaling each of
them does to the logits, and what weight decay acts on.
"""

import contextlib
import functools
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ncjax import environment
from ncjax.config import HeadBias, NormDecay, Precision
from ncjax.errors import InputError, last_line, unknown_choice
from ncjax.training import models

HEAD = "head"
# Inputs that homogeneity is tested on: enough for the statistics of a batch.
_INPUTS = 4
# Largest deviation from homogeneity, relative to the logits. A normalization has a small number
# under its root, so that it is of degree 0 to about 1e-5.
_TOLERANCE = 1e-3

Params = Mapping[str, Any]


def by_path(tree: Params) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of nested dicts by their keys, in their order."""
    return flax.traverse_util.flatten_dict(tree)  # pyright: ignore[reportReturnType]


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns the nested dicts of which `by_path` has the leaves."""
    return flax.traverse_util.unflatten_dict(leaves)


class Layer(NamedTuple):
    """A leaf of weights: a parameter of two dimensions or more.

    Attributes:
      path: its keys in the parameters.
      shape: of one run.
      degree: k, where logits less the head's bias scale by c^k with these weights alone, as
        measured; NaN where there is no such k.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    degree: float

    @property
    def name(self) -> str:
        """Returns `layer_1` of layer_1.kernel, `block_1.w` of block_1.w."""
        return ".".join(self.path[:-1] if self.path[-1] == "kernel" else self.path)

    def of(self, tree: Params) -> Any:
        """Returns this leaf of parameters, or of anything with their structure."""
        return functools.reduce(operator.getitem, self.path, tree)


class Structure(NamedTuple):
    """Holds what a network is made of, found before it is trained.

    Attributes:
      layers: in forward order; the last is the head.
      leaves: the paths of all parameters, in forward order.
      has_statistics: whether it notes anything beside its parameters, as running means.
      is_measured_as_trained: whether the network is the same function in training and in eval mode;
        it is not with statistics of batches, nor with dropout.
    """

    layers: tuple[Layer, ...]
    leaves: tuple[tuple[str, ...], ...]
    has_statistics: bool
    is_measured_as_trained: bool

    @property
    def degrees(self) -> tuple[float, ...]:
        return tuple(layer.degree for layer in self.layers)

    @property
    def is_homogeneous(self) -> bool:
        """Returns whether logits scale with every layer."""
        return self.is_measured_as_trained and all(degree > 0 for degree in self.degrees)

    @property
    def has_convolutions(self) -> bool:
        return any(len(layer.shape) > 2 for layer in self.layers)

    def equilibria(self) -> tuple[bool, ...]:
        """Returns which layers have an equilibrium of finite norm that a measurement sees.

        The head has; none other has where its scale does not matter (degree 0), or where the
        network is measured in another mode than it is trained in.
        """
        below = [self.is_measured_as_trained and k != 0 for k in self.degrees[:-1]]
        return (*below, True)

    def scaling(self) -> tuple[bool, ...]:
        """Returns for which layers the laws of homogeneous layers hold: norm balance, Lemma 2."""
        return tuple(self.is_measured_as_trained and k > 0 for k in self.degrees)

    def remark(self) -> str:
        """Returns one line that says which rows of theory are NaN, and why; empty: none is."""
        if self.is_homogeneous:
            powers = {layer.name: layer.degree for layer in self.layers if layer.degree != 1}
            listed = ", ".join(f"{name} of degree {k:.4g}" for name, k in powers.items())
            return listed and f"{listed}: norms are in balance as ||W_k||^2/k"
        if not self.is_measured_as_trained:
            return (
                "trained and measured in different modes: equilibrium below the head, Lemma 2 and "
                "the margin are NaN"
            )
        directions = _listed(layer for layer in self.layers if layer.degree == 0)
        others = _listed(layer for layer in self.layers if math.isnan(layer.degree))
        reasons = (
            directions and f"logits do not depend on the scale of {directions} (no equilibrium)",
            others and f"logits do not scale with {others}",
        )
        said = "; ".join(filter(None, reasons))
        return f"{said}: norm balance and Lemma 2 leave them out, the margin is NaN"


def _listed(layers: Iterable[Layer], most: int = 4) -> str:
    names = [layer.name for layer in layers]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def find(
    model: nn.Module, image: tuple[int, ...], head_bias: HeadBias, precision: Precision
) -> Structure:
    """Returns what a network is made of, on inputs of shape (B, *image).

    Degrees are measured in float64 at random parameters: logits with one layer doubled against
    2^k times the logits.

    Raises:
      InputError: `model` is not what a network has to be, see `training.own`; or its head has a
        bias and the config none, or the other way around.
    """
    hashable: Any = model  # as flax makes its modules
    return _find(hashable, image, head_bias, precision)


@functools.lru_cache(maxsize=64)
def _find(
    model: nn.Module, image: tuple[int, ...], head_bias: HeadBias, precision: Precision
) -> Structure:
    shapes = variable_shapes(model, image, precision)
    params = {path[1:]: leaf for path, leaf in shapes.items() if path[0] == "params"}
    _check_head(model, params, head_bias)
    _check_memory(model, params)
    below = [path for path in params if path[0] != HEAD]
    weights = (*(path for path in below if params[path].ndim > 1), (HEAD, "kernel"))
    with jax.enable_x64(True), on_host():
        degrees, is_same = _measure(model, shapes, weights, image)
    return Structure(
        tuple(
            Layer(path, params[path].shape, degree)
            for path, degree in zip(weights, degrees, strict=True)
        ),
        (*below, *(path for path in params if path[0] == HEAD)),
        len(params) < len(shapes),
        is_same,
    )


Shapes = Mapping[tuple[str, ...], Any]


def variable_shapes(model: nn.Module, image: tuple[int, ...], precision: Precision) -> Shapes:
    """Returns the shapes of all variables by their paths, in the order in which they are made.

    Raises:
      InputError: the network fails on such inputs, or its outputs have other shapes or types.
    """
    shapes: dict[tuple[str, ...], Any] = {}

    def apply(x: Array) -> tuple[Any, ...]:
        variables = init(model, jax.random.key(0), x)
        # Here, for a dict that leaves a trace has sorted keys.
        for path, leaf in by_path(variables).items():
            shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        trained, _ = train_outputs(model, variables, x, jax.random.key(0))
        features = model.apply(variables, x, False, method="features")
        return features, model.apply(variables, features, method="logits"), trained

    inputs = jax.ShapeDtypeStruct((_INPUTS, *image), jnp.dtype(precision))
    try:
        with jax.enable_x64(True):
            features, logits, trained = jax.eval_shape(apply, inputs)
    except Exception as error:
        if is_built_in(model):
            raise
        # It is the user's: anything may be wrong in it.
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise _wrong(model, f"it fails on inputs {inputs.shape} ({reason}); correct it") from error
    outputs = (_INPUTS, getattr(model, "num_classes", 0))
    for name, found, shape in (
        ("features(x, False)", features, (_INPUTS, math.prod(features.shape[1:]))),
        ("logits(h)", logits, outputs),
        ("logits of features(x, True)", trained, outputs),
    ):
        if found.shape != shape:
            raise _wrong(model, f"{name} has shape {found.shape} for {shape}; correct it")
        if found.dtype != precision:
            way_out = (
                f"{name} is {found.dtype} where inputs are {precision}; give it constants of "
                "x.dtype"
            )
            raise _wrong(model, way_out)
    return shapes


def init(model: nn.Module, key: Key[Array, ""], x: Float[Array, "B *image"]) -> dict[str, Any]:
    """Returns fresh variables of a network, floats in the type of its inputs.

    Flax begins running statistics in float32, and a user's own parameters may have any type.
    """
    variables = by_path(model.init(key, x, method=models.outputs))
    for path, leaf in variables.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            variables[path] = leaf.astype(x.dtype)
    return nest(variables)


def train_outputs(
    model: nn.Module, variables: dict, x: Float[Array, "B *image"], key: Key[Array, ""]
) -> tuple[Any, dict]:
    """Returns f(x) in training mode, and the other collections as they are after it.

    `key` decides what dropout drops.
    """
    noted = [name for name in variables if name != "params"]
    found, model_state = model.apply(
        variables, x, True, method=models.outputs, mutable=noted, rngs={"dropout": key}
    )
    return jnp.asarray(found), dict(model_state)


def is_built_in(model: nn.Module) -> bool:
    return isinstance(model, models.Network | models.ResNet18)


def _wrong(model: nn.Module, way_out: str) -> InputError:
    path = f"{type(model).__module__}:{type(model).__qualname__}"
    return InputError("config.model.network", path, way_out)


def _check_head(model: nn.Module, params: Shapes, head_bias: HeadBias) -> None:
    """Raises InputError where there is no head, or one that is not as the config says."""
    found = {path[1:] for path in params if path[0] == HEAD}
    if found not in ({("kernel",)}, {("kernel",), ("bias",)}) or params[HEAD, "kernel"].ndim != 2:
        way_out = "its last layer must be self.head = nn.Dense(self.num_classes)"
        raise _wrong(model, way_out)
    if (("bias",) in found) != (head_bias != "none"):
        has = "has a bias; set free or decayed, or give" if ("bias",) in found else "has none; give"
        way_out = f"the head of {type(model).__name__} {has} it an attribute use_head_bias: bool"
        raise InputError("config.model.head_bias", head_bias, way_out)


def _check_memory(model: nn.Module, params: Shapes) -> None:
    """Refuses a network that this machine cannot hold a few times, by its shapes alone."""
    needed = 3 * 8 * sum(leaf.size for leaf in params.values())
    memory = environment.physical_memory()
    if needed > memory:
        way_out = (
            f"to test for homogeneity takes {needed:,} bytes, and there are {memory:,}; shrink "
            "layers"
        )
        raise InputError("config.model.widths", getattr(model, "widths", ()), way_out)


def on_host() -> contextlib.AbstractContextManager:
    """Returns a context in which JAX computes on the CPU, which has float64, where it has one."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return contextlib.nullcontext()


def _measure(
    model: nn.Module,
    shapes: Shapes,
    weights: Sequence[tuple[str, ...]],
    image: tuple[int, ...],
) -> tuple[list[float], bool]:
    """Returns the degree of every leaf of weights, and whether both modes are one function.

    Raises:
      InputError: logits(h) is not one dense layer.
    """
    if hasattr(model, "dtype"):
        model = model.clone(dtype=jnp.float64)
    rng = np.random.default_rng(0)
    values = generic_values(rng, shapes)
    x = rng.standard_normal((_INPUTS, *image))

    def train(variables: dict) -> Any:
        return train_outputs(model, variables, jnp.asarray(x), jax.random.key(0))[0]

    def measure(variables: dict) -> Any:
        return model.apply(variables, jnp.asarray(x), False, method=models.outputs)

    head = values["params", HEAD, "kernel"]
    h = rng.standard_normal((_INPUTS, len(head)))
    of_h: Any = model.apply(nest(values), jnp.asarray(h), method="logits")
    if not np.allclose(of_h, h @ head, 1e-4, 1e-4):
        raise _wrong(model, "logits(h) must be self.head(h) and nothing else")
    traced = jax.jit(train).trace(nest(values))
    in_training = traced.lower().compile()
    logits = np.asarray(in_training(nest(values)))
    degrees = []
    for path in weights:
        doubled = {("params", *path): 2 * values[("params", *path)]}
        degrees.append(_degree(logits, np.asarray(in_training(nest(values | doubled)))))
    in_eval = jax.jit(measure).trace(nest(values))
    if str(in_eval.jaxpr) == str(traced.jaxpr):
        return degrees, True
    # Other steps may still be the same function.
    found = in_eval.lower().compile()(nest(values))
    return degrees, bool(np.allclose(found, logits, 1e-6, 1e-6))


def generic_values(rng: np.random.Generator, shapes: Shapes) -> dict[tuple[str, ...], np.ndarray]:
    """Returns generic values of variables: no bias is 0 but the head's, no scale 1.

    What is no parameter is 1: running variances have to be positive.
    """
    return {path: _random(rng, path, leaf) for path, leaf in shapes.items()}


def _random(rng: np.random.Generator, path: tuple[str, ...], leaf: Any) -> np.ndarray:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    if path == ("params", HEAD, "bias"):
        return np.zeros(leaf.shape)
    if path[0] != "params":
        return np.ones(leaf.shape)
    normal = rng.standard_normal(leaf.shape)
    if leaf.ndim > 1:
        return normal * math.sqrt(2 / math.prod(leaf.shape[:-1]))
    return 1 + 0.3 * normal


def _degree(before: np.ndarray, after: np.ndarray) -> float:
    """Returns k of after = 2^k before, an integer where one does; NaN where none does."""
    if not (np.isfinite(before).all() and np.isfinite(after).all() and before.any()):
        return math.nan
    measured = math.log2(max(np.linalg.norm(after) / np.linalg.norm(before), 1e-300))
    for k in (float(round(measured)), measured):
        if np.abs(after - 2**k * before).max() <= _TOLERANCE * np.abs(after).max():
            return k
    return math.nan


def decay_factors(
    params: dict, hidden: Any, head: Any, bias: Any, head_bias: HeadBias, norms: NormDecay
) -> dict:
    """Returns what lambda is multiplied by for every leaf; False where weight decay does not act:
    on a free head bias and on free biases, scales and shifts below the head.

    Args:
      hidden, head, bias: factors, of what is below the head, of its weights, of its bias.
    """
    for name, value, choices in (
        ("head_bias", head_bias, HeadBias),
        ("norms", norms, NormDecay),
    ):
        if value not in get_args(choices):
            raise unknown_choice(name, value, choices)

    def factor(path: tuple, leaf: Any) -> Any:
        if path[0].key == HEAD and path[1].key == "kernel":
            return head
        if path[0].key == HEAD:
            return False if head_bias == "free" else bias
        return False if leaf.ndim < 2 and norms == "free" else hidden

    return jax.tree_util.tree_map_with_path(factor, params)


def display_order(names: Iterable[str]) -> list[str]:
    """Returns dotted names of parameters as a reader expects them: by number, the head last."""

    def key(name: str) -> tuple:
        first = name.partition(".")[0]
        number = re.search(r"\d+$", first)
        return first == HEAD, int(number.group()) if number else 0, name

    return sorted(names, key=key)
