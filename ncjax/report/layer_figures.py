"""Draws what a run with `log.layers` records of every layer, against epoch and by depth."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ncjax.report import panels
from ncjax.report.figures import setting_title
from ncjax.report.panels import Panel, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLLAPSE = (
    Panel("NC1 after each layer", panels.NC1.label, ("layer_nc1",)),
    Panel(
        "CDNV after each layer",
        r"$\overline{(v_c+v_{c'})/(2\Vert\mu_c-\mu_{c'}\Vert^2)}$",
        ("layer_cdnv",),
    ),
    Panel("NC4 after each layer: nearest class mean", "share that disagrees", ("layer_nc4",)),
)
_RANKS = (
    Panel("Effective rank of the weights", "exp of entropy", ("layer_effective_rank",)),
    Panel("Condition of the weights", r"$\sigma_{\max}\,/\,\sigma_{\min}$", ("layer_condition",)),
)
_IMBALANCE = Panel(
    "Imbalance of a layer and the next",
    r"$\Vert W_+^{\top}W_+-WW^{\top}\Vert$, of its start",
    ("layer_imbalance",),
)
_RANK = Panel("Rank of the weights", "singular values above 1%", ("layer_rank",))

# A layer and the next with nothing between them: solid; with a ReLU: dotted.
_LINES = {"linear": "-", "relu": ":"}


def has_layers(history: xr.Dataset) -> bool:
    """Returns whether a history is of a run with `log.layers`."""
    return "layer_nc1" in history


def layers_against_epoch(history: xr.Dataset, weight_decay: float) -> "Figure":
    """Draws collapse after every layer, ranks and balance of one lambda, a colour per layer."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    run = panels.training(history).sel(weight_decay=weight_decay)
    names = [str(name) for name in run["layer"].values]
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    start = run["layer_imbalance"].isel(epoch=0, drop=True)
    run = run.assign(layer_imbalance=run["layer_imbalance"] / start)
    drawn = _measured((*_COLLAPSE, _IMBALANCE, *_RANKS), [run])
    title = ", ".join(
        filter(
            None, [rf"Every layer at $\lambda$ = {number(weight_decay)}", setting_title(history)]
        )
    )
    figure, all_axes = panels.frame(len(drawn), "epoch", title)
    epochs = run["epoch"].values
    pairs = history["layer"].attrs.get("pairs", "").split()
    lines = [_LINES.get(pair, "-") for pair in (*pairs, *[""] * (len(names) - len(pairs)))]
    for axes, panel in zip(all_axes, drawn, strict=True):
        values = []
        for place, colour in enumerate(colours):
            line = lines[place] if panel is _IMBALANCE else "-"
            one = run[panel.drawn[0]].isel(layer=place)
            look = {"color": colour, "linestyle": line}
            values.append(_draw(axes, epochs, one, look, panels.band_opacity(len(names))))
        panels.scale_x(axes, epochs)
        panels.finish(axes, panel, np.concatenate(values))
        if panel is _IMBALANCE:
            low = axes.get_ylim()
            law = np.exp(-panels.over_seeds(run["relaxation_time"])[0])
            axes.plot(epochs, law, color="black", linestyle="--", linewidth=1)
            axes.set_ylim(*low)
    handles = [
        Line2D([], [], color=colour, label=panels.literal(name))
        for name, colour in zip(names, colours, strict=True)
    ]
    caption = f"training split; {panels.caption_of([history])}, band: least to greatest"
    if _IMBALANCE in drawn:
        caption += (
            "\nimbalance: solid where nothing, dotted where a ReLU stands between; dashed: "
            r"$e^{-2\lambda t}$, the law of the former"
        )
    panels.legend(figure, handles, caption)
    return figure


def layers_by_depth(history: xr.Dataset) -> "Figure":
    """Draws collapse after every layer, and ranks, at the last epoch by depth, a colour for each
    weight decay.
    """

    curves = panels.one_per_lambda(history.isel(epoch=[-1]))
    drawn = _measured((*_COLLAPSE, _RANK, *_RANKS), [curve.run for curve in curves])
    figure, all_axes = panels.frame(len(drawn), "layer", setting_title(history))
    names = [str(name) for name in history["layer"].values]
    places = np.arange(len(names))
    for axes, panel in zip(all_axes, drawn, strict=True):
        values = []
        for curve in curves:
            one = curve.run[panel.drawn[0]].isel(epoch=-1)
            look = {"color": curve.colour, "linestyle": curve.linestyle}
            values.append(_draw(axes, places, one, look, panels.band_opacity(len(curves))))
        panels.finish(axes, panel, np.concatenate(values))
        panels.name_places(axes, names)
    last = int(history["epoch"].values[-1])
    caption = (
        f"training split at epoch {last}; {panels.caption_of([history])}, band: least to greatest"
    )
    remark = panels.remark_on_curves(history)
    caption += f"\n{remark}" if remark else ""
    panels.legend_of_lambdas(figure, all_axes, curves, caption)
    return figure


def _measured(drawn: Iterable[Panel], runs: Sequence[xr.Dataset]) -> list[Panel]:
    """Returns the panels that have a finite number, or all if none has: pairs of layers need not
    have an imbalance.
    """
    every = list(drawn)
    found = [
        panel
        for panel in every
        if any(np.isfinite(run[panel.drawn[0]].values).any() for run in runs)
    ]
    return found or every


def _draw(
    axes: "Axes", x: np.ndarray, values: xr.DataArray, look: dict[str, Any], opacity: float
) -> np.ndarray:
    """Draws the mean and the range of seeds, and returns the numbers drawn."""
    spread = panels.over_seeds(values)
    axes.plot(x, spread[0], marker="o", markersize=1.5, linewidth=1, **look)
    axes.fill_between(x, spread[1], spread[2], color=look["color"], alpha=opacity, linewidth=0)
    return spread.ravel()
