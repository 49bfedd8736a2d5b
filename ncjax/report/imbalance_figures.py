"""Draws what becomes of small classes as they get smaller, after Fang et al. (PNAS 2021)."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ncjax.report import panels
from ncjax.report.panels import Panel
from ncjax.storage.history import class_sizes, imbalance_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN, _TEST = {"split": "train"}, {"split": "test"}
# Panels: the variable by class, and what selects one number a class of it.
_DRAWN: dict[Panel, tuple[str, dict[str, str]]] = {
    Panel("Nearest other row of the head", "largest cos", ()): ("class_cosine_head", {}),
    Panel("Nearest other class mean", "largest cos", ()): ("class_cosine_means", _TRAIN),
    Panel("Row of the head", r"$\Vert W_L^c\Vert$", ()): ("class_norm_head", {}),
    Panel("Test accuracy", "share of a class", ()): ("class_accuracy", _TEST),
}


def small_classes(histories: Mapping[str, xr.Dataset]) -> np.ndarray:
    """Returns which classes are small, (C,): those below the largest size in the history of the
    largest ratio.
    """
    sizes = class_sizes(max(histories.values(), key=imbalance_ratio))
    return sizes < sizes.max()


def can_compare(histories: Mapping[str, xr.Dataset]) -> bool:
    """Returns whether histories have several ratios and are alike in classes and weight decays."""
    ratios = {imbalance_ratio(history) for history in histories.values()}
    axes = {
        (*history["label"].values.tolist(), *history["weight_decay"].values.tolist())
        for history in histories.values()
    }
    measured = all("class_cosine_head" in history for history in histories.values())
    return measured and len(axes) == 1 and len(ratios) == len(histories) > 1


def minority_against_ratio(histories: Mapping[str, xr.Dataset]) -> "Figure":
    """Draws angles, norms and test accuracy of the small classes (solid) and of the others
    (dotted) against the imbalance ratio, at the last epoch; a colour per weight decay.

    Args:
      histories: of one data set and one grid each, at several ratios.
    """
    from matplotlib.lines import Line2D

    ordered = sorted(histories.values(), key=imbalance_ratio)
    ratios, is_small = np.array(list(map(imbalance_ratio, ordered))), small_classes(histories)
    figure, all_axes = panels.frame(len(_DRAWN), "largest class / smallest class", "")
    decays = ordered[0]["weight_decay"].values
    for axes, (panel, (name, select)) in zip(all_axes, _DRAWN.items(), strict=True):
        drawn = []
        for decay, colour in zip(decays, itertools.cycle(panels.COLOURS), strict=False):
            for chosen, line in ((is_small, "-"), (~is_small, ":")):
                spread = np.stack([_spread(one, name, select, decay, chosen) for one in ordered])
                look: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 1}
                axes.plot(ratios, spread[:, 0], marker="o", markersize=2.5, **look)
                if line == "-":
                    axes.fill_between(ratios, *spread[:, 1:].T, color=colour, alpha=0.15, lw=0)
                drawn.append(spread.ravel())
        axes.set_xscale("log")
        axes.set_title(panel.title, size=panels.SIZE)
        axes.set_ylabel(panel.label, size=panels.SIZE)
        if "cos" in panel.label:
            axes.axhline(-1 / (len(is_small) - 1), color="0.5", linewidth=0.8, linestyle="--")
            axes.axhline(1, color="0.5", linewidth=0.8)
    handles = [
        Line2D([], [], color=colour, label=rf"$\lambda$ = {panels.number(decay)}")
        for decay, colour in zip(decays, itertools.cycle(panels.COLOURS), strict=False)
    ]
    caption = (
        f"solid: {int(is_small.sum())} small classes, dotted: the others; "
        f"{panels.caption_of(ordered)}, band: least to greatest\n"
        "gray: 1, where classes have merged, and (dashed) a simplex ETF"
    )
    panels.legend(figure, handles, caption)
    return figure


def _spread(
    history: xr.Dataset, name: str, select: dict[str, str], decay: float, chosen: np.ndarray
) -> np.ndarray:
    """Returns mean, least and greatest over seeds of a metric's mean over some classes."""
    final = history[name].isel(epoch=-1).sel({"weight_decay": decay, **select})
    return panels.over_seeds(final.isel(label=chosen).mean("label"))
