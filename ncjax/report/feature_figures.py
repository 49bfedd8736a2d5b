"""Draws the figures of a measurement: spectrum, angles, classes, and layers in comparison."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ncjax.report import draw, panels, thinning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ncjax.features.result import Measurement

_MOST_IN_HEAT_MAP = 100
_MOST_IN_HISTOGRAM = 2048  # classes; their two million angles show the shape of any distribution
_BLUE, _RED = panels.COLOURS[:2]


def write(found: dict[str, "Measurement"], folder: Path, style: draw.Style) -> list[Path]:
    """Draws measurements by layer, in forward order, into an existing folder; returns the files."""
    last = list(found.values())[-1]
    figures = {
        "spectrum": lambda: spectrum(last),
        "angles": lambda: angles(last),
        "classes": lambda: classes(last),
    }
    if len(found) > 1:
        figures["layers"] = lambda: layers(found)
    return draw.write_figures(figures, folder, style)


def _caption(found: "Measurement") -> str:
    unit = "" if found.unit == 1 else f" in units of {panels.number(found.unit)}"
    return f"{found.headline}{unit}"


def _words(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, size=panels.SIZE)
    axes.set_xlabel(x, size=panels.SIZE)
    axes.set_ylabel(y, size=panels.SIZE)


def spectrum(found: "Measurement") -> "Figure":
    """Draws the eigenvalues of Sigma_B, Sigma_W along the same directions, and their ratio.

    The sum of the ratios over C is nc1.
    """
    figure, (left, right) = panels.frame(2, "direction", _caption(found))
    kept = found.spectrum > 0
    places = np.flatnonzero(kept) + 1
    between, within = found.spectrum[kept], found.within[kept]
    look = {"marker": "o", "markersize": 2.5, "linewidth": 1}
    left.plot(places, between, color=_BLUE, label=r"means: $s_j^2$", **look)
    left.plot(places, within, color=_RED, label=r"within: $u_j^{\top}\Sigma_W u_j$", **look)
    panel = panels.Panel("Spectrum of the centred means", "variance", ())
    panels.finish(left, panel, np.concatenate([between, within]))
    right.plot(places, within / between, color="black", **look)
    value = found.metrics["nc1"]
    panels.finish(
        right,
        panels.Panel(f"Ratio: its sum over C is nc1 = {value:.3g}", "within / means", ()),
        within / between,
    )
    for axes in (left, right):
        if len(places) > 50:
            axes.set_xscale("log")
        else:
            axes.locator_params("x", integer=True)
    panels.legend(figure, left.get_lines(), "")
    return figure


def angles(found: "Measurement") -> "Figure":
    """Draws all cosines between centred class means, or a histogram of them for many classes."""
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

    num_classes, caption = len(found.centred), _caption(found)
    shown = thinning.evenly(num_classes, _MOST_IN_HISTOGRAM)
    with np.errstate(invalid="ignore"):  # a class mean at the global mean has no direction
        unit = found.centred[shown] / np.linalg.norm(found.centred[shown], axis=1, keepdims=True)
    cosines, etf = unit @ unit.T, -1 / (num_classes - 1)
    if num_classes > _MOST_IN_HEAT_MAP:
        off = cosines[np.triu_indices(len(shown), 1)]
        caption += (
            ""
            if len(shown) == num_classes
            else f"\nangles of {len(shown):,} classes, evenly chosen"
        )
        figure, (axes,) = panels.frame(1, "", caption)
        axes.hist(off[np.isfinite(off)], bins=100, color=_BLUE)
        line = axes.axvline(
            etf, color="black", linewidth=1, label=rf"simplex ETF: {panels.number(etf)}"
        )
        panels.legend(figure, [line], "")
        axes.set_yscale("log")
        _words(axes, "Angles between centred class means", "cosine", "pairs of classes")
        return figure
    # The diagonal is 1 by definition: with it on the scale, nothing else would differ.
    off = np.where(np.eye(num_classes), np.nan, cosines)
    reach = float(np.nan_to_num(np.abs(off - etf)).max(initial=0.01))
    size = panels.figure_size(panels.WIDTH + 0.9, panels.WIDTH)
    figure = Figure(figsize=size, dpi=panels.DPI, layout="constrained")
    figure.suptitle(caption, size=panels.SIZE)
    axes = figure.add_subplot()
    axes.imshow(off, cmap="PuOr", norm=CenteredNorm(etf, reach))
    axes.set_facecolor("0.85")
    axes.tick_params(length=0, labelsize=panels.SMALL)
    _words(axes, "Angles between centred class means", "class", "class")
    axes.locator_params(integer=True)
    panels.cosine_bar(figure, [axes], etf, reach, "cosine")
    return figure


def classes(found: "Measurement") -> "Figure":
    """Draws the spread of each class against the distance of its mean from the global mean.

    The colour is the number of examples of the class.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = panels.frame(1, "", _caption(found))
    distances, spread = np.linalg.norm(found.centred, axis=1), np.sqrt(found.variances)
    present = np.flatnonzero(found.examples)
    sizes, many = found.examples[present], len(present) > _MOST_IN_HEAT_MAP
    look: dict[str, Any] = {"s": 4 if many else 10, "linewidths": 0}
    if sizes.min() < sizes.max():
        norm = "log" if sizes.max() > 10 * sizes.min() else "linear"
        points = axes.scatter(distances, spread, c=sizes, cmap="viridis", norm=norm, **look)
        bar = figure.colorbar(points, ax=axes, aspect=25)
        bar.set_label("examples", size=panels.SIZE)
        bar.ax.tick_params(which="both", labelsize=panels.SMALL)
        if norm == "linear":
            bar.locator = MaxNLocator(integer=True)
    else:
        axes.scatter(distances, spread, color=_BLUE, **look)
    if len(present) <= 20:
        for label, x, y in zip(present, distances, spread, strict=True):
            axes.annotate(str(label), (x, y), (2, 2), textcoords="offset points", size=panels.SMALL)
    axes.margins(0.08)
    title = "Classes: spread and distance"
    _words(axes, title, r"$\Vert\mu_c-\mu_G\Vert$", r"$(\mathrm{mean}\Vert h-\mu_c\Vert^2)^{1/2}$")
    return figure


_LAYER_PANELS = (
    panels.Panel("NC1: variability within classes", r"tr$(\Sigma_W\Sigma_B^+)\,/\,C$", ("nc1",)),
    panels.Panel("CDNV", r"$\overline{(v_c+v_{c'})/(2\Vert\mu_c-\mu_{c'}\Vert^2)}$", ("cdnv",)),
    panels.Panel("NC2: angles", r"$\overline{|\cos+1/(C-1)|}$", ("nc2_equiangular_means",)),
    panels.Panel(
        "NC2: distance to a simplex ETF", r"$\Vert\hat K-(I-J/C)/\sqrt{C-1}\Vert_F$", ("etf_error",)
    ),
)


def layers(found: dict[str, "Measurement"]) -> "Figure":
    """Draws collapse by layer, in forward order."""
    figure, all_axes = panels.frame(
        len(_LAYER_PANELS), "layer", _caption(list(found.values())[-1]).rsplit(",", 1)[0]
    )
    places = np.arange(len(found))
    for axes, panel in zip(all_axes, _LAYER_PANELS, strict=True):
        values = np.array([one.metrics[panel.drawn[0]] for one in found.values()])
        axes.plot(places, values, color=_BLUE, marker="o", markersize=3, linewidth=1)
        panels.finish(axes, panel, values)
        panels.name_places(axes, list(found), are_shown=axes in all_axes[-2:])
    return figure
