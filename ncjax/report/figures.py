"""Draws collapse: pure functions from histories to matplotlib figures.

A history given to a figure is of one variant and one setting of every axis but weight_decay and
seed; `settings` splits a larger one.
"""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ncjax.config import AXES
from ncjax.report import panels, thinning
from ncjax.report.panels import Curve, Panel, number
from ncjax.storage import varied
from ncjax.storage.history import COSINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELLED_CLASSES = 30

_NORMS = ("nc2_equinorm_means", "nc2_equinorm_head")
_ANGLES = ("nc2_equiangular_means", "nc2_equiangular_head")
_PREDICTED = (
    "dashed: the least NC3 that any class means leave the head; "
    "the head's angles of a symmetric solution at equilibrium with the same mean outputs"
)
PANELS = (
    panels.NC1,
    Panel("NC2: equal norms of means (dotted: head)", "std / mean over classes", _NORMS),
    Panel(
        "NC2: equal angles of means (dotted: head)",
        r"mean of $|\cos+1/(C-1)|$",
        _ANGLES,
        "predicted_equiangular_head",
    ),
    Panel(
        "NC3: self-duality (dotted: head centred)",
        panels.NC3.label,
        ("nc3", "nc3_centered"),
        "nc3_floor",
    ),
    Panel("NC4: nearest class mean", "share that disagrees", ("nc4",)),
    Panel("Error in training (dotted: test)", r"1 $-$ accuracy", ("error_train", "error_test")),
)


def collapse_against_epoch(history: xr.Dataset) -> "Figure":
    """Draws NC1 to NC4 and the error during training, with a colour for each weight decay."""
    curves, remark = panels.one_per_lambda(history), panels.remark_on_curves(history)
    return panels.against(curves, PANELS, setting_title(history), remark=remark)


def compare_against_epoch(histories: dict[str, xr.Dataset], remark: str = "") -> "Figure":
    """Draws NC1 to NC4 and the error during training, each history at its most collapsed run.

    `remark` is what a caption also says.
    """
    curves = []
    for colour, (name, history) in zip(
        itertools.cycle(panels.COLOURS), histories.items(), strict=False
    ):
        run = panels.training(history).isel(weight_decay=most_collapsed(history))
        label = (
            rf"{panels.literal(name)}, $\lambda$ = "
            rf"{number(run['weight_decay'].item())}{panels.diverged(run)}"
        )
        curves.append(Curve(label, colour, "-", run))
    title = r"Every run at its $\lambda$ of least NC3"
    return panels.against(curves, PANELS, title, compared=True, remark=remark)


def collapse_against_lambda(histories: dict[str, xr.Dataset], remark: str = "") -> "Figure":
    """Draws NC1 to NC4 and the error at the last epoch, with the predictions of theory.

    `remark` is what a caption also says.
    """
    remarks = "\n".join(filter(None, (_PREDICTED, remark)))
    return panels.against_lambda(histories, PANELS, remarks)[0]


def class_mean_cosines(history: xr.Dataset) -> "Figure":
    """Draws cosines between centred class means at the least and the most collapsed weight decay.

    Both are of the first seed.
    """
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

    least = int(history["weight_decay"].values.argmin())
    shown = [
        history.isel(weight_decay=i, seed=[0])
        for i in dict.fromkeys((least, most_collapsed(history)))
    ]
    names = [str(name) for name in history["label"].values]
    etf = -1 / (len(names) - 1)
    # The diagonal is 1 by definition: with it on the scale, nothing else would differ.
    off = [np.where(np.eye(len(names)), np.nan, run[COSINES].squeeze("seed")) for run in shown]
    reach = float(np.nan_to_num(np.abs(np.stack(off) - etf)).max(initial=0.01))
    rows, columns = (len(off), 1) if panels.is_narrow() else (1, len(off))
    size = panels.figure_size(panels.WIDTH * columns + 0.9, panels.WIDTH * rows)
    figure = Figure(figsize=size, dpi=panels.DPI, layout="constrained")
    figure.suptitle(setting_title(history), size=panels.SIZE)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, run, matrix in zip(all_axes, shown, off, strict=True):
        axes.imshow(matrix, cmap="PuOr", norm=CenteredNorm(etf, reach))
        title = (
            rf"$\lambda$ = {number(run['weight_decay'].item())}, seed "
            rf"{run['seed'].item()}{panels.diverged(run)}"
        )
        axes.set_title(title, size=panels.SIZE)
        axes.set_facecolor("0.85")
        axes.tick_params(length=0, labelsize=panels.SMALL)
        places = range(len(names) if len(names) <= _MOST_LABELLED_CLASSES else 0)
        words = [panels.literal(name) for name in names[: len(places)]]
        axes.set_xticks(places, words, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(places, words)
    bar = panels.cosine_bar(figure, all_axes, etf, reach, "cosine between centred class means")
    bar.ax.axhline(etf, color="black", linewidth=1)
    return figure


def most_collapsed(history: xr.Dataset) -> int:
    """Returns the index of the weight decay with the least mean training NC3 at the last epoch."""
    mean = panels.over_seeds(history["nc3"].sel(split="train").isel(epoch=-1))[0]
    return int(np.where(np.isnan(mean), np.inf, mean).argmin())


def settings(history: xr.Dataset, most: int | None = None) -> Iterator[xr.Dataset]:
    """Yields one history per variant and setting of the swept axes but weight_decay and seed.

    These axes become scalar coordinates.

    Args:
      most: so many settings of each variant, evenly chosen; None: all.
    """
    for variant in varied.split(history):
        extra = _other_axes(variant)
        places = list(itertools.product(*(range(variant.sizes[name]) for name in extra)))
        for i in thinning.evenly(len(places), most or len(places)):
            yield variant.isel(dict(zip(extra, places[i], strict=True)))


def count_settings(history: xr.Dataset) -> int:
    """Returns how many histories `settings` yields."""
    return sum(
        math.prod(variant.sizes[name] for name in _other_axes(variant))
        for variant in varied.split(history)
    )


def _other_axes(history: xr.Dataset) -> list[str]:
    return [n for n in AXES if n in history.dims and n not in ("weight_decay", "seed")]


def setting_words(history: xr.Dataset) -> list[str]:
    """Returns the variant of a history of `settings` and its values, as in ["optimizer=sgd"]."""
    return varied.words(history) + [
        f"{name}={history[name].item():g}"
        for name in AXES
        if name in history.coords and not history[name].ndim
    ]


def setting_title(history: xr.Dataset) -> str:
    """Returns `setting_words` as the title of a figure."""
    return panels.literal(", ".join(setting_words(history)))
