"""Draws the history of a model that `ncjax.Monitor` follows: collapse against epoch."""

import itertools
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ncjax.report import panels
from ncjax.report.panels import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    panels.NC1,
    Panel("NC2: equal norms of class means", "std / mean over classes", ("nc2_equinorm_means",)),
    Panel("NC2: equal angles", r"mean of $|\cos+1/(C-1)|$", ("nc2_equiangular_means",)),
    panels.NC3,
    Panel("NC4: nearest class mean", "share that disagrees", ("nc4",)),
    Panel("Error", r"1 $-$ accuracy", ("error",)),
)


def by_layer(history: xr.Dataset) -> "Figure":
    """Draws NC1 to NC4 and the error against epoch, a colour per layer."""
    names = [str(name) for name in history["layer"].values]
    return _against_epoch({name: history.sel(layer=name) for name in names}, "by layer")


def compared(histories: dict[str, xr.Dataset]) -> "Figure":
    """Draws the last layer of several histories, a colour each."""
    curves = {name: history.isel(layer=-1) for name, history in histories.items()}
    return _against_epoch(curves, "the last layer of each")


def _against_epoch(curves: dict[str, xr.Dataset], title: str) -> "Figure":
    from matplotlib.lines import Line2D

    shown = {
        name: one.assign(error=1 - one["accuracy"]) if "accuracy" in one else one
        for name, one in curves.items()
    }
    measured = {name for one in shown.values() for name in one if one[name].notnull().any()}
    drawn = [panel for panel in _PANELS if panel.drawn[0] in measured]
    figure, all_axes = panels.frame(len(drawn), "epoch", title)
    looks = [
        {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1}
        for _, colour, marker in zip(
            shown, itertools.cycle(panels.COLOURS), itertools.cycle(panels.MARKERS), strict=False
        )
    ]
    for axes, panel in zip(all_axes, drawn, strict=True):
        values = []
        for one, look in zip(shown.values(), looks, strict=True):
            if panel.drawn[0] in one:
                axes.plot(one["epoch"].values, one[panel.drawn[0]].values, **look)
                values.append(one[panel.drawn[0]].values)
        panels.finish(axes, panel, np.concatenate(values))
        axes.locator_params("x", integer=True)
    handles = [
        Line2D([], [], label=panels.literal(name), **look)
        for name, look in zip(shown, looks, strict=True)
    ]
    panels.legend(figure, handles, "")
    return figure
