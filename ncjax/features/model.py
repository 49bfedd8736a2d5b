"""Measures neural collapse of a PyTorch model, layer by layer, on the batches of a loader.

PyTorch is the user's: it is imported here only after their model has been.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ncjax.errors import InputError, near
from ncjax.features.kept import KeptFeatures
from ncjax.features.labels import as_labels
from ncjax.features.measure import measure_batches
from ncjax.features.pooling import Pool, check_pool, pooled
from ncjax.features.result import LayerMeasurements, Measurement
from ncjax.features.tensors import on_host

Key = str | int | Sequence[str] | Callable[[Any], Any] | None
Module = Any  # torch.nn.Module

_ONE_OUTPUT = "the head has one output, not one per class: it is left out"
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
    and buffers (running statistics) and PyTorch's random numbers are what they were.

    A `Linear` layer is measured at its input, with its weight and bias as the head; any other
    module at its output, with the model's outputs as logits where they are (B, C).

    Args:
      model: a `torch.nn.Module`.
      loader: batches, (inputs, labels) or mappings: a `DataLoader`, a list, ...
      layer: name of the module to measure, as in `model.named_modules()`; None: the `Linear` that
        runs last.
      layers: several names in forward order; of them the last may have a head or logits.
      inputs: what of a batch goes into the model: a key, several keys (keyword arguments), or a
        function of the batch. None: the first of a pair; of a mapping all but the labels.
      labels: key or function of the batch. None: the second of a pair; of a mapping `labels`,
        `label`, `targets` or `target`.
      pool: makes (N, p) of features of more axes: `mean` over the positions of (N, C, H, W) or the
        tokens of (N, T, p), `flatten`, `cls` (the first token), or a function of the tensor.
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
    if layer is not None and layers is not None:
        raise InputError("layers", list(layers), "give layer, or layers, not both")
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
    found = measure_layers(model, loader, [layer] if layers is None else list(layers), options)
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
    """Returns the measurement of each module by name; arguments as in `measure_model`."""
    check_pool(options.pool)
    return _Runner(_checked(model), options).measure(names, loader)


def _torch() -> Any:
    """Returns PyTorch, which the user's model has imported."""
    return sys.modules["torch"]


def _checked(model: Module) -> Module:
    """Returns the model itself: of a compiled one, that whose modules have hooks."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        way_out = "give a torch.nn.Module; of features in arrays, `ncjax.measure`"
        raise InputError("model", type(model).__name__, way_out)
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def _left_as_it_was(model: Module) -> Iterator[None]:
    """Puts a model in eval mode without gradients, and afterwards back as it was.

    Modes are set module by module: a frozen part of a model in training mode is in eval mode.
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
    try:
        with torch.random.fork_rng(devices=cards), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _device(model: Module) -> Any:
    """Returns the device of a model's first parameter or buffer; None where it has none."""
    return next((one.device for one in (*model.parameters(), *model.buffers())), None)


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
    """

    def __init__(self, model: Module, name: str | None, pool: Pool):
        torch = _torch()
        self._pool, self._handles = pool, []
        self._seen: list[tuple[str, Any]] = []
        modules = dict(model.named_modules())
        if name is None:
            modules = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear)}
            if not modules:
                raise InputError("layer", None, "the model has no Linear; name the module")
        elif name not in modules:
            way_out = f"the model has no such module{near(name, modules)}; see named_modules()"
            raise InputError("layer", name, way_out)
        else:
            modules = {name: modules[name]}
        self._modules = modules
        self._is_found = name is not None
        for own_name, module in modules.items():
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

            def note_input(_: Module, arguments: tuple, keywords: dict) -> None:
                self._note(name, arguments[0] if arguments else next(iter(keywords.values())))

            hook = module.register_forward_pre_hook(note_input, with_kwargs=True)
        else:

            def note_output(_: Module, __: tuple, output: Any) -> None:
                self._note(name, _tensor_of(name, output))

            hook = module.register_forward_hook(note_output)
        self._handles.append(hook)

    def _note(self, name: str, features: Any) -> None:
        features = features.detach()
        if self._is_found:
            features = pooled(features, self._pool)
        # What follows in the model may change it in place.
        self._seen.append((name, features.clone()))

    def take(self) -> np.ndarray:
        """Returns the features of the forward pass that has just ended."""
        seen, self._seen = self._seen, []
        if not seen:
            raise InputError("layer", self.name, "it did not run; name a module that does")
        name, features = seen[-1]
        if not self._is_found:
            found = self._modules[name]
            self.remove()
            self._modules, self._is_found = {name: found}, True
            self._listen(name, found)
            features = pooled(features, self._pool)
        times = sum(other == name for other, _ in seen)
        if times > 1:
            way_out = f"it ran {times} times in one pass; name one that does once"
            raise InputError("layer", name, way_out)
        return on_host(features)

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


def _logits_of(output: Any) -> Any:
    """Returns the outputs (B, C) of a model, also as Hugging Face's models give them; else None."""
    logits: Any = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        logits = output[0]
    is_matrix = isinstance(logits, _torch().Tensor) and logits.ndim == 2 and logits.shape[1] > 1
    return logits if is_matrix and logits.is_floating_point() else None


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

    def measure(self, names: Sequence[str | None], loader: Iterable) -> dict[str, Measurement]:
        """Returns the measurement of each module by name; the last may have a head or logits."""
        asked = self._options
        if not names or len(set(names)) < len(names):
            raise InputError("layers", names, "name one module or more, each once")
        if len(names) > 1 and not asked.keep:
            raise InputError(
                "keep", asked.keep, "several layers take one run whose features are kept"
            )
        if len(names) > 1 and asked.ood is not None:
            raise InputError("ood", "several layers", "give one layer")
        with _left_as_it_was(self._model), contextlib.ExitStack() as stack:
            taps = [_Tap(self._model, name, asked.pool) for name in names]
            for tap in taps:
                stack.callback(tap.remove)
            if asked.keep:
                batches = self._run_once(loader, taps)
            else:
                batches = [self._run_twice(loader, taps[0])]
            last = taps[-1]
            head = _head_of(last)
            of_last: dict[str, Any] = head | {"weight_decay": asked.weight_decay}
            if asked.ood is not None:
                of_last["ood"] = self._features_of(asked.ood, taps[0])
            num_classes = asked.num_classes
            if num_classes is None and head:
                num_classes = len(head["head"])
            found = {}
            for tap, of_tap in zip(taps, batches, strict=True):
                found[tap.name] = measure_batches(
                    of_tap,
                    num_classes=num_classes,
                    loss=asked.loss,
                    global_mean=asked.global_mean,
                    float64=asked.float64,
                    **(of_last if tap is last else {}),
                )
        if last.is_linear and not head:
            found[last.name].notes.append(_ONE_OUTPUT)
        return found

    def _run_once(self, loader: Iterable, taps: list[_Tap]) -> list[list[tuple[np.ndarray, ...]]]:
        """Returns what each tap gives of one run over all batches; the last has logits, too."""
        kept = [KeptFeatures(sharers=len(taps)) for _ in taps]
        for batch in loader:
            labels, logits = self._run(batch)
            for tap, of_tap in zip(taps, kept, strict=True):
                outputs = logits if tap is taps[-1] else None
                of_tap.add(*self._selected(tap, labels, outputs))
        return [list(of_tap) for of_tap in kept]

    def _run_twice(self, loader: Iterable, tap: _Tap) -> "_Repeated":
        """Returns batches that each pass over them computes anew."""
        if iter(loader) is loader:
            way_out = "keep=False reads it twice; give a list, a DataLoader, ..."
            raise InputError("loader", type(loader).__name__, way_out)
        for batch in loader:
            self._run(batch)
            tap.take()
            break

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            for batch in loader:
                labels, logits = self._run(batch)
                yield self._selected(tap, labels, logits)

        return _Repeated(batches)

    def _features_of(self, loader: Iterable, tap: _Tap) -> np.ndarray:
        """Returns the features (M, p) of batches without labels."""
        found = []
        for batch in loader:
            arguments, keywords, _ = self._keys.split(batch, with_labels=False)
            self._call(arguments, keywords)
            found.append(tap.take())
        if not found:
            raise InputError("ood", "no example", "give at least one batch")
        return np.concatenate(found)

    def _call(self, arguments: tuple, keywords: dict[str, Any]) -> Any:
        return self._model(*_placed(arguments, self._device), **_placed(keywords, self._device))

    def _run(self, batch: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Runs the model on a batch; returns labels and logits, if it has any."""
        arguments, keywords, labels = self._keys.split(batch, with_labels=True)
        logits = _logits_of(self._call(arguments, keywords))
        labels = on_host(labels) if hasattr(labels, "detach") else np.asarray(labels)
        return as_labels(labels), None if logits is None else on_host(logits)

    def _selected(
        self, tap: _Tap, labels: np.ndarray, logits: np.ndarray | None
    ) -> tuple[np.ndarray, ...]:
        """Returns features, labels and logits of the examples that are not left out.

        A `Linear` computes its outputs from the features: its logits are not needed.
        """
        arrays = [tap.take(), labels]
        if logits is not None and not tap.is_linear:
            arrays.append(logits)
        for name, array in zip(("features", "labels", "logits"), arrays, strict=False):
            if name == "features" and array.ndim != 2:
                raise InputError("pool", array.shape, "features must be (N, p) after it")
            if array.shape[:1] != arrays[0].shape[:1] or (name == "labels" and array.ndim != 1):
                raise InputError(name, array.shape, f"give one per example, ({len(arrays[0])},)")
        if self._options.ignore_label is not None:
            arrays = [array[labels != self._options.ignore_label] for array in arrays]
        return tuple(arrays)


class _Repeated:
    """Makes a fresh iterator of batches each time."""

    def __init__(self, batches: Callable[[], Iterator]):
        self._batches = batches

    def __iter__(self) -> Iterator:
        return self._batches()


def _head_of(tap: _Tap) -> dict[str, Any]:
    """Returns the weight and bias of a `Linear` of several outputs, as options."""
    if not tap.is_linear or tap.module.out_features < 2:
        return {}
    bias = tap.module.bias
    return {
        "head": on_host(tap.module.weight),
        "bias": None if bias is None else on_host(bias),
    }
