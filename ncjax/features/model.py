"""Measures neural collapse of a PyTorch model, layer by layer, on the batches of a loader.

PyTorch is the user's: it is imported here only after their model has been.
"""

import contextlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ncjax.errors import InputError
from ncjax.features import outputs
from ncjax.features.arguments import (
    check_loader,
    check_model,
    check_names,
    check_options,
    find_module,
)
from ncjax.features.kept import KeptFeatures
from ncjax.features.labels import as_labels
from ncjax.features.measure import measure_batches
from ncjax.features.pooling import Pool, pooled
from ncjax.features.result import LayerMeasurements, Measurement
from ncjax.features.tensors import on_host

Key = str | int | Sequence[str] | Callable[[Any], Any] | None
Module = Any  # torch.nn.Module

_LABEL_KEYS = ("labels", "label", "targets", "target")


def measure_model(
    model: Module,
    loader: Iterable,
    layer: str | None = None,
    *,
    layers: Sequence[str] | None = None,
    inputs: Key = None,
    labels: Key = None,
    pool: Pool = "mean",
    keep: bool = True,
    ood: Iterable | None = None,
    num_classes: int | None = None,
    loss: str = "square",
    weight_decay: float | None = None,
    global_mean: str = "classes",
    ignore_label: int | None = None,
    float64: bool | None = None,
) -> "Measurement | LayerMeasurements":
    """Measures neural collapse of a PyTorch model on the examples of a loader.

    The model runs in eval mode, without gradients, on the device it is on; autocast is as the
    caller has set it. Afterwards, and after an error too, every module is in the mode it was in,
    and buffers (running statistics) and random numbers (PyTorch's, NumPy's and Python's, the
    loader's generators) are what they were.

    A `Linear` layer is measured at its input, any other module at its output. The weight and bias
    of a `Linear` are the head where W h + b are the model's outputs but for rounding or a softmax,
    or where it runs last and none of the outputs can be compared. Elsewhere the model's outputs
    are the logits, where they are (B, C); a caution says so of a `Linear` that runs last.

    Args:
      model: a `torch.nn.Module`.
      loader: batches, (inputs, labels) or mappings: a `DataLoader`, a list, ...
      layer: name of the module to measure, as in `model.named_modules()`; None: the `Linear` that
        runs last.
      layers: several names; measured in the order in which they run, and the last of them may have
        a head or logits.
      inputs: what of a batch goes into the model: a key, several keys (keyword arguments), or a
        function of the batch. None: the first of a pair; of a mapping all but the labels.
      labels: key or function of the batch. None: the second of a pair; of a mapping `labels`,
        `label`, `targets` or `target`.
      pool: makes (N, p) of features of more axes: `mean` over the positions of (N, C, H, W) or the
        tokens of (N, T, p), `flatten`, `cls` (the first token), or a function of the tensor. Of a
        `Linear` the last axis is p; of convolution, pooling and batch normalization, and of what
        follows them in the same shape, axis 1, also of (N, C, L).
      keep: run the model once and keep the features, in memory or, where they take more than a
        quarter of it, in a temporary file. False: run it twice; no random augmentation then.
      ood: out-of-distribution batches, as the loader's, whose labels are not read: nc5 and
        ood_auroc, of a single layer.
      num_classes: C; None: the head's outputs, else one more than the largest label.
      loss, weight_decay, global_mean, float64: as in `measure_batches`.
      ignore_label: examples of this label are left out, as -1 or -100.

    Returns:
      A `Measurement`; of `layers` a `LayerMeasurements`, a mapping with a row per layer.

    Raises:
      InputError: no module of that name, batches or outputs of another form; one line that names
        the way out.

    Examples:
      >>> import ncjax, torch
      >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> loader = [(torch.randn(50, 2), torch.arange(50) % 2)]
      >>> m = ncjax.measure_model(model, loader)
      >>> m.nc1_rank, "nc3" in m, m.centred.shape
      (1.0, True, (2, 8))
      >>> [*ncjax.measure_model(model, loader, layers=["0", "1", "2"])]
      ['0', '1', '2']
    """
    options = Options(
        inputs=inputs,
        labels=labels,
        pool=pool,
        keep=keep,
        ood=ood,
        num_classes=num_classes,
        loss=loss,
        weight_decay=weight_decay,
        global_mean=global_mean,
        ignore_label=ignore_label,
        float64=float64,
    )
    names = check_names(layer, layers)
    found = measure_layers(model, loader, names, options)
    for one in found.values():
        for caution in one.cautions:
            warnings.warn(caution, stacklevel=2)
    return next(iter(found.values())) if layers is None else LayerMeasurements(found)


class Options(NamedTuple):
    """Holds the options of a measurement, which are those of `measure_model`."""

    inputs: Key = None
    labels: Key = None
    pool: Pool = "mean"
    keep: bool = True
    ood: Iterable | None = None
    num_classes: int | None = None
    loss: str = "square"
    weight_decay: float | None = None
    global_mean: str = "classes"
    ignore_label: int | None = None
    float64: bool | None = None


def measure_layers(
    model: Module, loader: Iterable, names: Sequence[str | None], options: Options
) -> dict[str, Measurement]:
    """Returns the measurement of each module by name, in the order in which they run; arguments as
    in `measure_model`.
    """
    model = check_measurable(model, loader, names, options)
    return _Runner(model, options).measure(names, loader)


def check_measurable(
    model: Module, loader: Iterable, names: Sequence[str | None], options: Options
) -> Module:
    """Returns the model whose modules are measured; raises InputError for what cannot be."""
    model = check_model(model)
    for name in names:
        if name is not None:
            find_module(model, name)
    check_options(options)
    check_loader("loader", loader, is_read_again=not options.keep)
    if len(names) > 1 and not options.keep:
        way_out = "several layers take one run whose features are kept"
        raise InputError("keep", options.keep, way_out)
    if len(names) > 1 and options.ood is not None:
        raise InputError("ood", "several layers", "give one layer")
    return model


def _torch() -> Any:
    """Returns PyTorch, which the user's model has imported."""
    return sys.modules["torch"]


@contextlib.contextmanager
def _left_as_it_was(model: Module, *loaders: Any) -> Iterator[None]:
    """Puts a model in eval mode without gradients, and afterwards back as it was.

    Modes are set module by module: a frozen part of a model in training mode is in eval mode.
    Random numbers are what they were, too: PyTorch's, NumPy's, Python's and the loaders' own.
    """
    torch = _torch()
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    device = _device(model)
    cards = [device] if device is not None and device.type == "cuda" else []
    generators = [(one, one.get_state()) for loader in loaders for one in _generators(loader)]
    # Their state is the user's, who may draw from it yet.
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=cards), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for generator, state in generators:
            generator.set_state(state)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                _restore(buffer, before)


def _restore(buffer: Any, before: Any) -> None:
    """Writes into a buffer what it was, if it is something else."""
    torch = _torch()
    if buffer.is_meta:
        return
    # Only dense tensors can be compared.
    if buffer.layout != torch.strided or not torch.equal(buffer, before):
        buffer.copy_(before)


def _generators(loader: Any) -> list[Any]:
    """Returns the generators of random numbers that a `DataLoader` and its samplers have."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, batches, getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    found = {id(one): one for one in (getattr(holder, "generator", None) for holder in holders)}
    return [one for one in found.values() if isinstance(one, _torch().Generator)]


def _device(model: Module) -> Any:
    """Returns the device of a model's first parameter or buffer; None where it has none."""
    tensors = (*model.parameters(), *model.buffers())
    return next((one.device for one in tensors if not one.is_meta), None)


class _Keys(NamedTuple):
    """Takes batches apart: what goes into the model, and the labels."""

    inputs: Key
    labels: Key

    def split(self, batch: Any, with_labels: bool) -> tuple[tuple, dict[str, Any], Any]:
        """Returns (arguments, keyword arguments) of the model, and the labels or None."""
        key = self._label_key(batch) if with_labels or self.inputs is None else None
        labels = _taken("labels", batch, key) if with_labels else None
        inputs = self.inputs
        if inputs is None and isinstance(batch, Mapping):
            return (), {name: value for name, value in batch.items() if name != key}, labels
        if inputs is None:
            return (_taken("inputs", batch, 0),), {}, labels
        if not callable(inputs) and not isinstance(inputs, str | int):
            return (), {name: _taken("inputs", batch, name) for name in inputs}, labels
        value = _taken("inputs", batch, inputs)
        if isinstance(value, Mapping):
            return (), dict(value), labels
        return value if isinstance(value, tuple) else (value,), {}, labels

    def _label_key(self, batch: Any) -> Key:
        if self.labels is not None:
            return self.labels
        if not isinstance(batch, Mapping):
            return 1
        return next((key for key in _LABEL_KEYS if key in batch), _LABEL_KEYS[0])


def _taken(field: str, batch: Any, key: Any) -> Any:
    """Returns what a key or a function finds in a batch, or raises InputError."""
    if callable(key):
        return key(batch)
    if field == "inputs" and key == 0 and not isinstance(batch, Mapping | tuple | list):
        return batch
    if isinstance(batch, Mapping):
        if key in batch:
            return batch[key]
        raise InputError(field, key, f"a batch has {', '.join(map(str, batch))}; name one of them")
    if isinstance(batch, tuple | list) and isinstance(key, int) and key < len(batch):
        return batch[key]
    way_out = f"a batch is a {type(batch).__name__}; give a function of it"
    raise InputError(field, key, way_out)


class _Tap:
    """Notes what goes into a `Linear` module, or comes out of another, in a forward pass.

    Without a name it listens to every `Linear` until one forward pass has shown which runs last.

    Attributes:
      is_named: the user has named the module.
      order: when in that pass the module has run, relative to those of other taps.
      shape: shape of its features before they are pooled.
      channels: the axis of features that counts p; None: as their number of axes says.
      dtype: type of what a `Linear` gave.
    """

    def __init__(self, model: Module, name: str | None, pool: Pool):
        torch = _torch()
        self._pool, self._handles = pool, []
        self._seen: list[tuple[str, Any]] = []
        self.order, self.dtype = 0, None
        self.shape: tuple[int, ...] = ()
        self.channels: int | None = None
        self.watch: outputs.Watch | None = None
        self.is_named = self._is_found = name is not None
        if name is not None:
            self._modules = {name: find_module(model, name)}
        else:
            modules = dict(model.named_modules())
            self._modules = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear)}
            if not self._modules:
                raise InputError("layer", None, "the model has no Linear; name the module")
        for own_name, module in self._modules.items():
            self._listen(own_name, module)

    @property
    def name(self) -> str:
        return next(reversed(self._modules))

    @property
    def module(self) -> Module:
        return self._modules[self.name]

    @property
    def is_linear(self) -> bool:
        torch = _torch()
        return isinstance(self.module, torch.nn.Linear)

    def _listen(self, name: str, module: Module) -> None:
        torch = _torch()
        if isinstance(module, torch.nn.Linear):

            def note_input(_: Module, arguments: tuple, keywords: dict, output: Any) -> None:
                # Whatever its number of axes, a `Linear` reads the last.
                self.channels, self.dtype = -1, output.dtype
                self._note(name, arguments[0] if arguments else next(iter(keywords.values())))

            hook = module.register_forward_hook(note_input, with_kwargs=True)
        else:

            def note_output(_: Module, __: tuple, output: Any) -> None:
                features = _tensor_of(name, output)
                if self.watch is not None and self.watch.is_channels_first(features):
                    self.channels = 1
                self._note(name, features)

            hook = module.register_forward_hook(note_output)
        self._handles.append(hook)

    def _note(self, name: str, features: Any) -> None:
        features, self.shape = features.detach(), tuple(features.shape)
        if self.watch is not None:
            self.order = self.watch.next_place()
        if self._is_found:
            features = pooled(features, self._pool, self.channels)
        # What follows in the model may change it in place.
        self._seen.append((name, _torch().as_tensor(features).clone()))

    def take(self) -> Any:
        """Returns the features of the forward pass that has just ended, on their device."""
        seen, self._seen = self._seen, []
        if not seen:
            raise InputError("layer", self.name, "it did not run; name a module that does")
        name, features = seen[-1]
        if not self._is_found:
            found = self._modules[name]
            self.remove()
            self._modules, self._is_found = {name: found}, True
            self._listen(name, found)
            features = pooled(features, self._pool, self.channels)
        times = sum(other == name for other, _ in seen)
        if times > 1:
            way_out = f"it ran {times} times in one pass; name one that does once"
            raise InputError("layer", name, way_out)
        return features

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _tensor_of(name: str, output: Any) -> Any:
    """Returns the tensor that a module gave: itself, the first of several, or a last state."""
    torch = _torch()
    candidates = [output]
    if isinstance(output, Mapping):
        candidates = [output.get("last_hidden_state"), *output.values()]
    elif isinstance(output, tuple | list):
        candidates = list(output)
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor):
            return candidate
    way_out = "it gives no tensor; name a module that does"
    raise InputError("layer", name, f"{way_out}, not {type(output).__name__}")


def _placed(value: Any, device: Any) -> Any:
    """Returns inputs with their tensors on a device, NumPy's arrays as tensors."""
    torch = _torch()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        return value if device is None else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _placed(one, device) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_placed(one, device) for one in value)
    return value


class _Runner:
    """Runs a model over the batches of loaders and measures what its modules give."""

    def __init__(self, model: Module, options: Options):
        self._model, self._options = model, options
        self._keys = _Keys(options.inputs, options.labels)
        self._device = _device(model)
        self._taps: list[_Tap] = []
        self._outputs: outputs.Outputs | None = None
        self._batches = self._read = self._left = 0

    def measure(self, names: Sequence[str | None], loader: Iterable) -> dict[str, Measurement]:
        """Returns the measurement of each module by name, in the order in which they run; the last
        may have a head or logits.
        """
        asked = self._options
        with _left_as_it_was(self._model, loader, asked.ood), contextlib.ExitStack() as stack:
            # Its hooks come first, so that it has seen a module before the module's tap has.
            self._watch = outputs.Watch(self._model)
            stack.callback(self._watch.remove)
            for name in names:
                tap = _Tap(self._model, name, asked.pool)
                tap.watch = self._watch
                self._taps.append(tap)
                stack.callback(tap.remove)
            batches = self._run_once(loader) if asked.keep else [self._run_twice(loader)]
            if self._outputs is None:
                used_up = iter(loader) is loader
                way_out = "the loader was used up" if used_up else "the loader gives no batch"
                raise InputError("batches", "no example", f"{way_out}; give a list, a DataLoader")
            return self._measured(batches, self._outputs)

    def _measured(self, batches: list, found: outputs.Outputs) -> dict[str, Measurement]:
        asked, last = self._options, self._taps[-1]
        of_last: dict[str, Any] = dict(found.head)
        if found.head or not last.is_linear:
            of_last["weight_decay"] = asked.weight_decay
        if asked.ood is not None:
            of_last["ood"] = self._features_of(asked.ood, last)
        measured = {}
        for tap, of_tap in zip(self._taps, batches, strict=True):
            measured[tap.name] = measure_batches(
                of_tap,
                num_classes=asked.num_classes or found.classes,
                loss=asked.loss,
                global_mean=asked.global_mean,
                float64=asked.float64,
                **(of_last if tap is last else {}),
            )
        measured[last.name].cautions.extend(found.cautions)
        measured[last.name].notes.extend(found.notes)
        return measured

    def _run_once(self, loader: Iterable) -> list[list[tuple[np.ndarray, ...]]]:
        """Returns what each tap gives of one run over all batches; the last has logits, too."""
        kept = [KeptFeatures(sharers=len(self._taps)) for _ in self._taps]
        for batch in loader:
            for of_tap, arrays in zip(kept, self._run(batch), strict=True):
                of_tap.add(*arrays)
        self._check_left()
        return [list(of_tap) for of_tap in kept]

    def _run_twice(self, loader: Iterable) -> "_Repeated":
        """Returns batches that each pass over them computes anew."""
        for batch in loader:
            self._run(batch)
            break

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            self._read = self._left = 0
            for batch in loader:
                yield self._run(batch)[0]
            self._check_left()

        return _Repeated(batches)

    def _features_of(self, loader: Iterable, tap: _Tap) -> np.ndarray:
        """Returns the features (M, p) of batches without labels."""
        found = []
        for batch in loader:
            arguments, keywords, _ = self._keys.split(batch, with_labels=False)
            self._call(arguments, keywords)
            found.append(on_host(tap.take()))
        if not found:
            raise InputError("ood", "no example", "give at least one batch")
        return np.concatenate(found)

    def _call(self, arguments: tuple, keywords: dict[str, Any]) -> Any:
        placed = _placed(arguments, self._device), _placed(keywords, self._device)
        try:
            return self._model(*placed[0], **placed[1])
        except (TypeError, AttributeError) as error:
            self._explain(arguments, keywords, error)
            raise

    def _explain(self, arguments: tuple, keywords: dict[str, Any], error: Exception) -> None:
        """Raises InputError where an error of the model comes from how a batch is taken apart."""
        known = inspect.signature(self._model.forward).parameters.values()
        takes_any = any(one.kind is one.VAR_KEYWORD for one in known)
        names = [one.name for one in known]
        extra = [name for name in keywords if name not in names]
        if extra and not takes_any:
            rest = [name for name in keywords if name in names]
            key = rest or extra[0]
            way_out = f"the model takes no such argument; inputs={key!r}"
            raise InputError("inputs", ", ".join(extra), way_out) from error
        if len(arguments) == 1 and type(arguments[0]) in (tuple, list):
            way_out = "the model fails on it; inputs=lambda batch: tuple(batch[0]) gives its parts"
            kind = f"{type(arguments[0]).__name__} of {len(arguments[0])}"
            raise InputError("inputs", kind, f"{way_out} one by one") from error

    def _run(self, batch: Any) -> list[tuple[np.ndarray, ...]]:
        """Runs the model on a batch; returns features and labels of each tap, and logits of the
        last where they are needed, of the examples that are not left out.
        """
        arguments, keywords, labels = self._keys.split(batch, with_labels=True)
        output = self._call(arguments, keywords)
        self._batches += 1
        labels = on_host(labels) if hasattr(labels, "detach") else np.asarray(labels)
        labels = as_labels(labels)
        taken = {tap: tap.take() for tap in self._taps}
        for tap in self._taps:
            self._check_features(tap, taken[tap], labels)
        logits = self._logits(taken, output)
        rows = slice(None)
        if self._options.ignore_label is not None:
            rows = labels != self._options.ignore_label
        self._read += len(labels)
        self._left += len(labels[rows])
        found: list[tuple[np.ndarray, ...]]
        found = [(on_host(taken[tap])[rows], labels[rows]) for tap in self._taps]
        if logits is not None:
            found[-1] = (*found[-1], on_host(logits)[rows])
        return found

    def _logits(self, taken: dict[_Tap, Any], output: Any) -> Any:
        """Returns the model's logits; None where the head computes them from the features."""
        found, is_first = self._outputs, self._outputs is None
        if found is None:
            self._taps.sort(key=lambda tap: tap.order)
            self._outputs = found = self._decided(taken[self._taps[-1]], output)
            self._watch.remove()
            for tap in self._taps:
                tap.watch = None
        last = self._taps[-1]
        logits = None if found.place is None else outputs.taken(output, found.place)
        if found.place is not None and (logits is None or len(logits) != len(taken[last])):
            shape = None if logits is None else tuple(logits.shape)
            raise InputError("logits", shape, f"give one per example, ({len(taken[last])},)")
        if not found.head:
            return logits
        # Batches 1, 2, 4, 8, ...: comparing all takes a tenth of the time of a small model.
        is_due = self._batches & (self._batches - 1) == 0
        is_compared = logits is not None and not is_first and is_due
        if is_compared and not outputs.computes(last.module, taken[last], logits, last.dtype):
            way_out = "its W h + b are the model's outputs in some batches, not in others"
            raise InputError("layer", last.name, f"{way_out}; pool= or layer= says otherwise")
        return None

    def _decided(self, features: Any, output: Any) -> outputs.Outputs:
        last = self._taps[-1]
        if not last.is_linear:
            return outputs.of_module(output, self._watch)
        asked = outputs.Asked(last.name, last.is_named, self._options.pool)
        return outputs.of_linear(last.module, asked, features, last.dtype, output, self._watch)

    def _check_features(self, tap: _Tap, features: Any, labels: np.ndarray) -> None:
        """Raises InputError where features and labels are not one per example."""
        shape = tuple(features.shape)
        is_sequence = len(tap.shape) == 3 and not callable(self._options.pool)
        if is_sequence and tap.shape[1] == len(labels):
            is_square = tap.shape[0] == tap.shape[1] and tap.channels != 1
            if tap.shape[0] != len(labels) or (is_square and self._has_time_first()):
                way_out = "its first axis may not be the batch's; batch_first=True, or a function"
                raise InputError("features", tap.shape, f"{way_out} for pool, as lambda h: h[-1]")
        if features.ndim != 2:
            raise InputError("pool", shape, "features must be (N, p) after it")
        if labels.ndim != 1 or len(labels) != shape[0]:
            raise InputError("labels", labels.shape, f"give one per example, ({shape[0]},)")

    def _has_time_first(self) -> bool:
        return any(getattr(one, "batch_first", None) is False for one in self._model.modules())

    def _check_left(self) -> None:
        if self._read and not self._left:
            way_out = f"all {self._read:,} examples have this label: none is left"
            raise InputError("ignore_label", self._options.ignore_label, way_out)


class _Repeated:
    """Makes a fresh iterator of batches each time."""

    def __init__(self, batches: Callable[[], Iterator]):
        self._batches = batches

    def __iter__(self) -> Iterator:
        return self._batches()
