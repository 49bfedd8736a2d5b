"""Finds how the layers of a network follow one another: which layer takes what comes after each,
and whether anything stands between the two.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ncjax.training import layers, models
from ncjax.training.layers import Structure

# What stands between a layer and the next: nothing, a ReLU, or something else.
Between = Literal["linear", "relu", "other"]

# Inputs on which outputs are compared.
_INPUTS = 4


class Wiring(NamedTuple):
    """Says of every layer but the head where its output goes.

    Attributes:
      following: the index of the layer that takes the features after it: the first to run whose
        input depends on its weights. After the last convolution of a residual block that is the one
        that takes the sum.
      between: what stands between its output and that input.
    """

    following: tuple[int, ...]
    between: tuple[Between, ...]


class Call(NamedTuple):
    """Holds the first input of a module and the output, as arrays of B rows."""

    input: Float[Array, "B n"]
    output: Float[Array, "B m"]


class Forward(NamedTuple):
    """Holds f(x), and what the layers that are modules of their own took and gave.

    Attributes:
      calls: by index of the layer.
      outputs: f(x), bias included.
    """

    calls: dict[int, Call]
    outputs: Float[Array, "B C"]


def forward(
    model: nn.Module, variables: Mapping[str, Any], x: Float[Array, "B *image"], found: Structure
) -> Forward:
    """Applies a network in eval mode and notes the first call of every layer.

    Not noted are weights that no module of their own applies, nor those that share a module.
    """
    paths = [layer.path[:-1] for layer in found.layers]
    owners = {path: index for index, path in enumerate(paths) if paths.count(path) == 1}
    inputs: dict[int, Any] = {}
    outputs: dict[int, Any] = {}

    def note(call: Any, given: tuple, named: dict, context: nn.module.InterceptorContext) -> Any:
        index = owners.get(context.module.path, -1)
        is_first = index >= 0 and index not in inputs
        if context.method_name != "__call__" or not is_first:
            return call(*given, **named)
        inputs[index], *_ = (*given, *named.values())
        outputs[index] = call(*given, **named)
        return outputs[index]

    with nn.intercept_methods(note):
        whole: Any = model.apply(variables, x, False, method=models.outputs)

    def rows(values: Any) -> Array:
        return jnp.reshape(values, (len(x), -1))

    calls = {index: Call(rows(inputs[index]), rows(outputs[index])) for index in inputs}
    return Forward(calls, whole)


def find(model: nn.Module, found: Structure, image: tuple[int, ...]) -> Wiring:
    """Returns the wiring of a network, measured in float64 at random weights and inputs."""
    hashable: Any = model  # as flax makes its modules
    return _find(hashable, found, image)


@functools.lru_cache(maxsize=64)
def _find(model: nn.Module, found: Structure, image: tuple[int, ...]) -> Wiring:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_INPUTS, *image))
    if hasattr(model, "dtype"):
        model = model.clone(dtype=jnp.float64)
    with jax.enable_x64(True), layers.on_host():
        values = layers.generic_values(rng, layers.variable_shapes(model, image, "float64"))
        applied = jax.jit(lambda variables: forward(model, variables, jnp.asarray(x), found))
        whole = applied(layers.nest(values))
        followings, betweens = [], []
        for index, layer in enumerate(found.layers[:-1]):
            path = ("params", *layer.path)
            other = values | {path: values[path] * rng.uniform(0.5, 2, layer.shape)}
            following = _first_changed(whole, applied(layers.nest(other)))
            followings.append(following)
            betweens.append(_between(whole.calls.get(index), whole.calls[following]))
    return Wiring(tuple(followings), tuple(betweens))


def _first_changed(before: Forward, after: Forward) -> int:
    """Returns the first layer to run whose input differs; the head if none is seen to."""
    changed = [
        index
        for index, call in before.calls.items()
        if not np.array_equal(call.input, after.calls[index].input)
    ]
    # Layers are in the order in which they run.
    return min(changed, default=max(before.calls))


def _between(call: Call | None, following: Call) -> Between:
    if call is None or call.output.shape != following.input.shape:
        return "other"
    output, given = np.asarray(call.output), np.asarray(following.input)
    if np.allclose(given, output):
        return "linear"
    return "relu" if np.allclose(given, np.maximum(output, 0)) else "other"
