"""Tells from one forward pass of a PyTorch model which of its outputs are the logits, and whether
a `Linear` computes them.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ncjax.features.tensors import on_host

# Rounding of inputs, weights and outputs relative to ||w|| ||h||: of TF32, and of bfloat16.
_ROUNDING, _HALF_ROUNDING = 2.0**-9, 2.0**-6
_ONE_OUTPUT = "the head has one output, not one per class: it is left out"
_OWN = "accuracy and nc4 are of the model's own outputs"
_CHANNELS_FIRST = {f"torch.nn.modules.{kind}" for kind in ("conv", "pooling", "batchnorm")}


class Watch:
    """Notes in a forward pass which `Linear` runs last, and where channels are.

    It is for one pass alone: with hooks on every module PyTorch leaves its fast paths.

    Attributes:
      last: the `Linear` of several outputs that has run last.
    """

    def __init__(self, model: Any):
        torch = sys.modules["torch"]
        self.last: Any = None
        self._given: list[Any] = []
        self._shape: tuple[int, ...] | None = None
        self._place = 0
        self._handles = []
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                self._handles.append(module.register_forward_hook(self._note_linear))
            elif any(kind.__module__ in _CHANNELS_FIRST for kind in type(module).__mro__):
                self._handles.append(module.register_forward_hook(self._note_channels))

    def _note_linear(self, module: Any, _: tuple, output: Any) -> None:
        self._shape = None
        if module.out_features < 2:
            return
        self.last = module
        if output.ndim == 2:
            self._given.append(output)

    def _note_channels(self, _: Any, __: tuple, output: Any) -> None:
        self._shape = tuple(getattr(output, "shape", ())) or None

    def next_place(self) -> int:
        """Returns how many modules have asked for their place in the order of execution."""
        self._place += 1
        return self._place

    def is_channels_first(self, features: Any) -> bool:
        """Returns whether features have the shape of the convolution, pooling or batch
        normalization that has just run, as those of an activation after it have.
        """
        return tuple(features.shape) == self._shape

    def logits_among(self, matrices: Mapping[Any, Any]) -> Any:
        """Returns the key of a model's logits; of several matrices that of the `Linear` which runs
        last; None where none of them is.
        """
        if len(matrices) < 2:
            return next(iter(matrices), None)
        for given in reversed(self._given):
            for place, matrix in matrices.items():
                if matrix is given or _is_equal(matrix, given):
                    return place
        return None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._given = [], []


class Outputs(NamedTuple):
    """Says what of a model's outputs a measurement takes, as its first batch has shown.

    Attributes:
      place: key of the logits among its `matrices`; None where there are none.
      head: weight and bias of the `Linear` that is measured, where it computes them.
      cautions: what would mislead.
      notes: what is left out and why.
      classes: rows of the head, or columns of the logits; None where there is neither.
    """

    place: Any
    head: dict[str, Any]
    cautions: Sequence[str] = ()
    notes: Sequence[str] = ()
    classes: int | None = None


class Asked(NamedTuple):
    """Holds what a user has said of a `Linear`: its name, that they have named it, the pool."""

    name: str
    is_named: bool
    pool: Any


def of_module(output: Any, watch: Watch) -> Outputs:
    """Returns what is taken of a model's outputs where no head is measured."""
    found = matrices(output)
    place = watch.logits_among(found)
    notes = []
    if len(found) > 1 and place is None:
        notes = ["the model gives several matrices, none of a Linear: no logits are taken"]
    elif len(found) > 1:
        notes = [f"element {place} of the model's outputs, of its last Linear, is the logits"]
    classes = None if place is None else found[place].shape[1]
    return Outputs(place, {}, (), notes, classes)


def of_linear(
    module: Any, asked: Asked, features: Any, dtype: Any, output: Any, watch: Watch
) -> Outputs:
    """Returns what is taken of a model's outputs where a `Linear` is measured.

    Its weight is a head where it computes one of the outputs, or where no output is of its shape
    and it runs last.

    Args:
      features: (N, p), its pooled inputs.
      dtype: type of what it gave.
    """
    own = of_module(output, watch)
    if module.out_features < 2:
        return own._replace(notes=[*own.notes, _ONE_OUTPUT])
    found, is_last = matrices(output), module is watch.last
    fitting = {
        place: matrix
        for place, matrix in found.items()
        if matrix.shape == (len(features), module.out_features)
    }
    is_read = features.shape[1] == module.in_features
    for place, matrix in fitting.items():
        if is_read and computes(module, features, matrix, dtype):
            return Outputs(place, of_head(module), classes=module.out_features)
    # Of a tuple nobody knows which element is the logits.
    others = [
        matrix.shape[1]
        for place, matrix in found.items()
        if place in ("output", "logits") and matrix.shape[1] != module.out_features
    ]
    if is_read and is_last and not fitting and (asked.is_named or not others):
        return Outputs(None, of_head(module), classes=module.out_features)
    if not is_last:
        note = f"{asked.name} does not compute the model's outputs: it is measured without a head"
        return own._replace(notes=[*own.notes, note])
    if not is_read:
        reason = f"pool={asked.pool!r} gives {features.shape[1]} features, {asked.name} reads "
        reason += f"{module.in_features}"
    elif fitting:
        reason = f"the model's outputs are not W h + b of {asked.name} and its features by "
        reason += f"pool={asked.pool!r}"
    else:
        reason = f"{asked.name}, the Linear that runs last, has {module.out_features} outputs and "
        reason += f"the model {others[0]}"
    rest = "nothing else says what it predicts" if own.place is None else _OWN
    caution = f"{reason}: its head is left out, {rest}; pool= or layer= says otherwise"
    return own._replace(cautions=[caution])


def matrices(output: Any) -> dict[Any, Any]:
    """Returns what of a model's outputs may be logits (B, C) by key: the tensor itself as `output`,
    `logits` of a mapping, the elements of a tuple.
    """
    torch = sys.modules["torch"]
    found: dict[Any, Any] = {"output": output}
    if isinstance(output, Mapping):
        found = {"logits": output.get("logits")}
    elif isinstance(output, tuple | list):
        found = dict(enumerate(output))
    return {
        place: value
        for place, value in found.items()
        if isinstance(value, torch.Tensor)
        and value.ndim == 2
        and value.shape[1] > 1
        and value.is_floating_point()
    }


def taken(output: Any, place: Any) -> Any:
    """Returns the logits of a pass, which lie where those of the first did, or None."""
    return matrices(output).get(place)


def of_head(module: Any) -> dict[str, Any]:
    """Returns the weight and bias of a `Linear` as options of a measurement."""
    bias = module.bias
    return {"head": on_host(module.weight), "bias": None if bias is None else on_host(bias)}


def computes(module: Any, features: Any, logits: Any, dtype: Any) -> bool:
    """Returns whether logits are W h + b of a `Linear` but for rounding, or their (log) softmax.

    Args:
      dtype: type of what the `Linear` gave; under autocast it is coarser than its weights.
    """
    torch = sys.modules["torch"]
    types = {features.dtype, logits.dtype, module.weight.dtype, dtype}
    is_half = bool(types & {torch.float16, torch.bfloat16})
    with torch.autocast(features.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(features.dtype, logits.dtype), torch.float32)
        h, weight = features.to(wide), module.weight.detach().to(features.device, wide)
        bias = None if module.bias is None else module.bias.detach().to(features.device, wide)
        f, expected = logits.to(features.device, wide), torch.nn.functional.linear(h, weight, bias)
        scale = h.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        if bias is not None:
            scale = scale + bias.abs()
        allowed = (_HALF_ROUNDING if is_half else _ROUNDING) * scale
        if bool(((f - expected).abs() <= allowed).all()):
            return True
        most = 2 * allowed.amax(dim=1, keepdim=True)
        if bool(((f - expected.log_softmax(1)).abs() <= most).all()):
            return True
        is_share = (f >= 0).all() & ((f.sum(1) - 1).abs() <= 0.02).all()
        return bool(is_share and (f.argmax(1) == expected.argmax(1)).all())


def _is_equal(one: Any, other: Any) -> bool:
    torch = sys.modules["torch"]
    return one.shape == other.shape and torch.equal(one, other.to(one.device, one.dtype))
