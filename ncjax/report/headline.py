"""Says in sentences what a history shows: when it collapsed, where most, and what holds it back."""

import math

import numpy as np
import xarray as xr

from ncjax import config as configuration
from ncjax.metrics.vocabulary import BUDGET_TERMS, FEATURE_VOCABULARY
from ncjax.report import numbers, tables, thinning
from ncjax.storage import monitored, varied

_MEASURES = ("nc1", "nc2_equinorm_means", "nc2_equiangular_means", "nc3", "nc4")


def sentences(history: xr.Dataset) -> list[str]:
    """Returns what a reader should know of a history first, a line each."""
    if monitored.is_monitored(history):
        return [*_monitored(history), *history.attrs["remarks"].splitlines()]
    lines = [_what_ran(history)]
    for variant in varied.split(history):
        words = ", ".join(varied.words(variant))
        lines += [f"{words}: {line}" if words else line for line in _of_variant(variant)]
    return lines


def _of_variant(history: xr.Dataset) -> list[str]:
    """Returns the lines on runs that share what is no number."""
    lines = _fitted(history)
    for name in _MEASURES:
        if name in history:
            title = FEATURE_VOCABULARY[name].title
            lines += [line.replace(name, title, 1) for line in tables.least(history, [name])]
    lines += _held_back(history)
    where, *bounded = tables.bounds(history) or [""]
    lines += [f"{where.partition(',')[0]}: {line.strip()}" for line in bounded]
    for describe in (tables.short, tables.degenerate, tables.closed_form):
        # An older history lacks some variables.
        try:
            lines += describe(history)
        except KeyError:
            continue
    return lines


def _what_ran(history: xr.Dataset) -> str:
    config = configuration.from_json(history.attrs["config"])
    grid = numbers.grid_of(history)
    sizes = " x ".join(f"{history.sizes[dim]} {dim}" for dim in grid)
    runs = math.prod(history.sizes[dim] for dim in grid)
    done, asked = int(history["epoch"][-1]), config.train.epochs
    epochs = (
        f"for {done} epochs" if done >= asked else f"and measured up to epoch {done} of {asked}"
    )
    finite = history["finite"].isel(epoch=-1) if "finite" in history else None
    lost = 0 if finite is None else int(finite.size - finite.sum())
    line = f"{runs} networks ({sizes}) trained on {config.data.name} {epochs}"
    return f"{line}; {lost} diverged" if lost else line


def _fitted(history: xr.Dataset) -> list[str]:
    """Returns a line on when training errors vanish, by weight decay."""
    accuracy = history["accuracy"].sel(split="train", drop=True)
    # Diverged runs are NaN, which a minimum leaves out.
    worst = accuracy.min([dim for dim in accuracy.dims if dim not in ("weight_decay", "epoch")])
    first = worst["epoch"].where(worst == 1).min("epoch")
    reached = [
        f"{int(epoch)} at lambda = {numbers.label(decay)}"
        for decay, epoch in zip(first["weight_decay"].values, first.values, strict=True)
        if np.isfinite(epoch)
    ]
    never = [
        numbers.label(decay)
        for decay, epoch in zip(first["weight_decay"].values, first.values, strict=True)
        if not np.isfinite(epoch)
    ]
    if not reached:
        return ["no weight decay has a training error of 0 in every run"]
    line = f"the training error of every run is first 0 at epoch {thinning.abridged(reached)}"
    return [f"{line}; never at {thinning.abridged(never)}" if never else line]


def _held_back(history: xr.Dataset) -> list[str]:
    """Returns a line on the shares of the head's equilibrium where NC3 is least."""
    names = [f"budget_{term}" for term in BUDGET_TERMS]
    if not {"nc3", *names} <= set(history):
        return []
    final = history[["nc3", *names]].isel(epoch=-1).sel(split="train", drop=True)
    settings = final.mean("seed").where(final["budget_theorem"].notnull().any("seed"))
    if not np.isfinite(settings["nc3"]).any():
        return []
    best = settings.isel(settings["nc3"].argmin(...))
    shares = {term: float(best[f"budget_{term}"]) for term in BUDGET_TERMS if term != "theorem"}
    largest = max(shares, key=lambda term: abs(np.nan_to_num(shares[term])))
    meaning = BUDGET_TERMS[largest].partition(": ")[2] or BUDGET_TERMS[largest]
    where = ", ".join(
        f"{'lambda' if name == 'weight_decay' else name} = {numbers.label(best[name].values[()])}"
        for name in numbers.grid_of(history)
        if name != "seed"
    )
    return [
        f"what holds it back: at {where}, where NC3 is least, the theorem's part projects to "
        f"{float(best['budget_theorem']):.0%} of lambda W_L (100% where the theorem holds); what "
        f"offsets it most is {largest} ({meaning}), {shares[largest]:+.0%}"
    ]


def _monitored(history: xr.Dataset) -> list[str]:
    """Returns lines on the last layer at the first and the last epoch, and the best layer."""
    layers = [str(name) for name in history["layer"].values]
    first, last = (int(history["epoch"][i]) for i in (0, -1))
    lines = [f"a model followed by ncjax.Monitor: {len(layers)} layers, epoch {first} to {last}"]
    for name in _MEASURES:
        if name not in history:
            continue
        values = history[name].isel(epoch=-1).values.astype(np.float64)
        if not np.isfinite(values).any():
            continue
        least = int(np.nanargmin(values))
        title = FEATURE_VOCABULARY[name].title
        line = f"{title} is least in {layers[least]}: {values[least]:.3g}"
        begun = float(history[name].isel(epoch=0, layer=least))
        lines.append(f"{line}; it began at {begun:.3g}" if last > first else line)
    return lines
