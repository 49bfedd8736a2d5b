"""Refuses arguments of a measurement of a model that are of wrong kinds, before anything runs."""

import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ncjax.errors import InputError, near
from ncjax.features.pooling import check_pool

_BATCHES = "a loader gives batches of (inputs, labels): a DataLoader, or a list, [(x, y)]"


def check_options(options: Any) -> None:
    """Raises InputError for an option of another type, or one that there is not."""
    from ncjax.features.reference import Asked, check_asked

    check_pool(options.pool)
    # The head is found later.
    asked = Asked(options.loss, options.weight_decay, options.global_mean)
    check_asked(asked, with_head=True)
    for name, choices in {"keep": (True, False), "float64": (None, True, False)}.items():
        value = getattr(options, name)
        if not any(value is one for one in choices):
            raise InputError(name, value, f"choose {', '.join(map(str, choices))}")
    for name, least in (("num_classes", 1), ("ignore_label", None)):
        if getattr(options, name) is not None:
            check_whole(name, getattr(options, name), least)
    if options.ood is not None:
        check_loader("ood", options.ood)


def check_whole(field: str, value: Any, least: int | None = None) -> int:
    """Returns an integer, or raises InputError where it is none or below the least."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or (least is not None and value < least):
        bound = "" if least is None else f" from {least} on"
        raise InputError(field, value, f"give an integer{bound}")
    return int(value)


def check_loader(field: str, loader: Any, *, is_read_again: bool = False) -> None:
    """Raises InputError for what gives no batches, or gives them once where they are read again."""
    is_pair = isinstance(loader, tuple) and any(hasattr(one, "shape") for one in loader)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise InputError(field, type(loader).__name__, _BATCHES)
    if is_pair or hasattr(loader, "shape") or isinstance(loader, Mapping | str):
        raise InputError(field, type(loader).__name__, _BATCHES)
    if is_read_again and isinstance(loader, Iterator):
        way_out = "it is used up after one pass; give a list, a DataLoader, ..."
        raise InputError(field, type(loader).__name__, way_out)


def check_names(layer: Any, layers: Any) -> list[str | None]:
    """Returns the names of the modules to measure; None: that which is found."""
    if layer is not None and layers is not None:
        raise InputError("layers", layers, "give layer, or layers, not both")
    if layers is None:
        if isinstance(layer, list | tuple):
            raise InputError("layer", layer, f"it is one name; several are layers={[*layer]!r}")
        if layer is not None and not isinstance(layer, str):
            raise InputError("layer", layer, f"it is a name of named_modules(), as {str(layer)!r}")
        return [layer]
    if isinstance(layers, str):
        raise InputError("layers", layers, f"give a list: layers={[layers]!r}")
    if not isinstance(layers, Iterable) or not (names := [*layers]):
        raise InputError("layers", layers, "name one module or more, each once")
    if not all(isinstance(name, str) for name in names):
        raise InputError("layers", names, f"give names, as {[str(name) for name in names]!r}")
    if len(set(names)) < len(names):
        raise InputError("layers", names, "name one module or more, each once")
    return names


def check_model(model: Any) -> Any:
    """Returns the model itself: of a compiled one, that whose modules have hooks."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        way_out = "give a torch.nn.Module; of features in arrays, `ncjax.measure`"
        raise InputError("model", type(model).__name__, way_out)
    parameters = [*model.parameters()]
    if parameters and all(one.is_meta for one in parameters):
        way_out = "it is on the meta device, without numbers; load it on another"
        raise InputError("model", type(model).__name__, way_out)
    return getattr(model, "_orig_mod", model)


def find_module(model: Any, name: str) -> Any:
    """Returns the module of a name, any of those that it is registered under."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name]
    inner = [other for other in modules if other.endswith(f".{name}")]
    if len(inner) == 1:
        like = f"; did you mean {inner[0]}?"
    elif name.removeprefix("module.") in modules:
        like = f"; did you mean {name.removeprefix('module.')}?"
    else:
        like = near(name, modules)
    way_out = f"the model has no such module{like}; see named_modules()"
    raise InputError("layer", name, way_out)
