"""Draws panels of curves against a clock or weight decay, with their scales, legends and captions.

Lines are means over seeds, and bands go from the least seed to the greatest, which unlike a
standard deviation stays positive on a log axis. Matplotlib is imported late, so that `--help` and
bad input answer at once, and pyplot never is, so that no global state changes.
"""

import contextlib
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from ncjax.errors import printable
from ncjax.report import thinning
from ncjax.storage.history import extinct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# The size of a panel in inches: two fill the text width of a two-column page.
WIDTH, HEIGHT, DPI = 3.4, 2.1, 200
SIZE, SMALL = 8, 7  # points: of titles and labels; of ticks, legends and captions
_LEAST_WIDTH = 2.6  # of a panel that has another beside it
_LEAST_HEIGHT = 2.3  # of a figure, whose colour bar has a label
_LOW = 1.4  # the height of panels that stand below one another in a narrow column
_MOST_IN_LEGEND = 10
_MOST_MARKED = 60  # places of an x axis
_MOST_IN_NAME = 90  # characters; a longer name leaves no room for panels
_MOST_DECADES = 9  # decades on one axis that are all labelled
_MOST_LABELS = 8  # of a y axis with a place for 0
_NARROW = 3  # values within this factor are labelled as on a linear axis
_LABEL_HEIGHT = 0.75  # inches that a label has beside a low panel
# Of the least value measured: what is predicted below that does not stretch axes.
_LEAST_SHOWN = 0.01
# Okabe and Ito's colours without the yellow. Seven colours and six markers repeat together only
# after 42 runs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
_BELOW = "below the panel"  # the label of marks at its edge
# What a caption does not break: mathematics, and what equals it.
_WHOLE = re.compile(r"[^\s$]*\$[^$]*\$(?: = (?:\$[^$]*\$|[^\s;,]+))?|\b\w+ = [^\s;,]+")
CLOCKS = {"epoch": "epoch", "relaxation_time": r"relaxation clock $2\lambda t$"}


class Look(NamedTuple):
    """Says how figures are scaled: points of `SIZE` and `SMALL` texts, and factors on the width of
    lines and marks and on the inches of panels.
    """

    size: float = SIZE
    small: float = SMALL
    line: float = 1.0
    panel: float = 1.0


# A journal's column has one size of text; a talk is read from the last row.
LOOKS = {"": Look(), "paper": Look(small=8), "talk": Look(14, 12, line=1.8, panel=1.6)}


class _Page(NamedTuple):
    width: float | None = None  # inches; None: that of the panels
    look: Look = Look()


_PAGE = _Page()
_page: ContextVar[_Page] = ContextVar("page", default=_PAGE)


class Panel(NamedTuple):
    title: str
    label: str
    drawn: tuple[str, ...]  # variables of `training`: solid, then dotted
    predicted: str = ""  # the variable that figures against weight decay draw dashed, without bars


NC1 = Panel("NC1: variability within classes", r"tr$(\Sigma_W\Sigma_B^+)\,/\,C$", ("nc1",))
NC3 = Panel("NC3: self-duality", r"$\Vert\hat W_L-\hat M^{\top}\Vert_F^2$", ("nc3",))
HEAD_EQUILIBRIUM = Panel(
    "Equilibrium of the head",
    r"$\Vert\lambda W_L+\nabla\mathrm{fit}\Vert\,/\,\Vert\lambda W_L\Vert$",
    ("head",),
)


class Curve(NamedTuple):
    label: str
    colour: str
    linestyle: Literal["-", "--"]
    run: xr.Dataset  # `training` of one weight decay, all seeds


def over_seeds(values: xr.DataArray) -> np.ndarray:
    """Returns the mean, least and greatest over finite seeds, stacked; NaN if no seed is finite."""
    masked = np.ma.masked_invalid(values.transpose("seed", ...).values.astype(np.float64))
    return np.stack(
        [np.ma.filled(part, np.nan) for part in (masked.mean(0), masked.min(0), masked.max(0))]
    )


def one_per_lambda(history: xr.Dataset) -> list[Curve]:
    """Returns a curve for each weight decay, or for `thinning.MOST_CURVES` evenly chosen ones."""
    import matplotlib
    from matplotlib.colors import to_hex

    history = training(history).sortby("weight_decay")
    kept = thinning.evenly(history.sizes["weight_decay"], thinning.MOST_CURVES)
    history = history.isel(weight_decay=kept)
    values = history["weight_decay"].values
    # Neither end of viridis is used: one is nearly the black of weight decay 0, the other is too
    # light for a thin line.
    colours = iter(matplotlib.colormaps["viridis"](np.linspace(0.12, 0.9, int((values > 0).sum()))))
    curves = []
    for i, value in enumerate(values):
        run = history.isel(weight_decay=i)
        colour, linestyle = (to_hex(next(colours)), "-") if value > 0 else ("#000000", "--")
        curves.append(Curve(rf"$\lambda$ = {number(value)}{diverged(run)}", colour, linestyle, run))
    return curves


def remark_on_curves(history: xr.Dataset) -> str:
    """Returns which weight decays `one_per_lambda` draws, or nothing where it draws all."""
    count = history.sizes["weight_decay"]
    return thinning.remark(min(count, thinning.MOST_CURVES), count, "weight decays")


def training(history: xr.Dataset) -> xr.Dataset:
    """Returns the variables that panels draw.

    These are the training split, both errors, the equilibrium residual of each layer under the
    layer's name, and simple functions of what was measured.
    """
    drawn = {
        f"error_{split}": 1 - history["accuracy"].sel(split=split, drop=True)
        for split in ("train", "test")
    }
    for layer in history["layer"].values:
        drawn[str(layer)] = history["equilibrium_residual"].sel(layer=layer, drop=True)
    norms_sq = history["weight_norm_sq"]
    balanced = norms_sq / _degrees(history)
    imbalance = abs(balanced.isel(layer=0, drop=True) - balanced.isel(layer=-1, drop=True))
    drawn["norm_imbalance"] = imbalance / imbalance.isel(epoch=0, drop=True)
    drawn["head_norm_sq"] = norms_sq.isel(layer=-1, drop=True)
    etf = -1 / (history.sizes["label"] - 1)
    drawn["predicted_equiangular_head"] = abs(history["predicted_head_cosine"] - etf)
    return history.sel(split="train", drop=True).assign(drawn)


def _degrees(history: xr.Dataset) -> xr.DataArray:
    """Returns the degree of every layer: squared norms over degrees are in balance. NaN where a
    layer takes no part in it.
    """
    layers = history["layer"]
    degrees = np.asarray(layers.attrs.get("degree", np.ones(layers.size)))
    return xr.DataArray(np.where(degrees > 0, degrees, np.nan), {"layer": layers.values})


def terminal_epoch(accuracy: xr.DataArray) -> xr.DataArray:
    """Returns the first measured epoch with accuracy 1 in every finite seed; NaN if none has it."""
    reached = ((accuracy == 1) | accuracy.isnull()).all("seed") & accuracy.notnull().any("seed")
    return accuracy["epoch"].where(reached).min("epoch")


def clock_of(run: xr.Dataset, clock: str) -> np.ndarray:
    return run["epoch"].values if clock == "epoch" else over_seeds(run[clock])[0]


def against(
    curves: Sequence[Curve],
    panels: Sequence[Panel],
    title: str,
    clock: str = "epoch",
    compared: bool = False,
    remark: str = "",
) -> "Figure":
    """Draws panels of curves against `epoch` or `relaxation_time`.

    Args:
      remark: what a caption also says.
      compared: whether the curves are runs that are compared, which a legend names.
    """

    panels = _measured(panels, [curve.run for curve in curves])
    figure, all_axes = frame(len(panels), CLOCKS[clock], title)
    times = np.concatenate([clock_of(curve.run, clock) for curve in curves])
    opacity = band_opacity(len(curves))
    begun = [terminal_epoch(curve.run["accuracy"]).item() for curve in curves]
    for axes, panel in zip(all_axes, panels, strict=True):
        scale_x(axes, times)
        drawn = [
            _draw_curve(axes, curve, panel, clock, begin, opacity)
            for curve, begin in zip(curves, begun, strict=True)
        ]
        finish(axes, panel, np.concatenate(drawn))
    runs = [curve.run for curve in curves]
    caption = (
        f"training split; {caption_of(runs)}, band around solid and dashed lines: least to greatest"
    )
    if np.isfinite(begun).any():
        caption += "\n\N{WHITE DIAMOND}: training error first 0 in every seed"
    caption += f"\n{remark}" if remark else ""
    # Compared runs have names, which a colour bar of weight decays cannot show.
    if compared:
        legend(figure, handles_of(curves), caption)
    else:
        legend_of_lambdas(figure, all_axes, curves, caption)
    return figure


def handles_of(curves: Sequence[Curve]) -> "list[Line2D]":
    """Returns what a legend shows of curves."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=c.colour, linestyle=c.linestyle, label=c.label) for c in curves]


def legend_of_lambdas(
    figure: "Figure", axes: Sequence["Axes"], curves: Sequence[Curve], caption: str
) -> None:
    """Names the curves of weight decays in a legend, or many of them by a colour bar."""
    if len(curves) > _MOST_IN_LEGEND:
        _lambda_bar(figure, axes, curves)
        curves = []
    legend(figure, handles_of(curves), caption)


def _measured(panels: Sequence[Panel], runs: Sequence[xr.Dataset]) -> Sequence[Panel]:
    """Returns the panels that have finite values to draw, or all of them if none has any.

    A layer below batch normalization, for example, has no equilibrium.
    """
    return [
        p for p in panels if any(run[name].notnull().any() for run in runs for name in p.drawn)
    ] or panels


def band_opacity(count: int) -> float:
    """Returns the opacity of one of so many bands: many that lie upon one another hide no line."""
    return 0.15 if count <= _MOST_IN_LEGEND else 1 - 0.5 ** (1 / count)


def _draw_curve(
    axes: "Axes", curve: Curve, panel: Panel, clock: str, begin: float, opacity: float
) -> np.ndarray:
    """Draws one curve and returns the values that must fit in the panel.

    Args:
      begin: the epoch at which the terminal phase begins, or NaN.
      opacity: of its band.
    """
    times = clock_of(curve.run, clock)
    look: dict[str, Any] = {"color": curve.colour, "linewidth": 1, "markersize": 1.5}
    values = over_seeds(curve.run[panel.drawn[0]])
    axes.plot(times, values[0], linestyle=curve.linestyle, marker="o", **look)
    axes.fill_between(times, values[1], values[2], color=curve.colour, alpha=opacity, linewidth=0)
    begins = curve.run["epoch"].values == begin
    mark = {"marker": "D", "markersize": 4, "markerfacecolor": "white", "linestyle": "none"}
    axes.plot(times[begins], values[0][begins], zorder=3, **look | mark)
    # More bands, around the dotted lines, would hide the lines.
    dotted = [over_seeds(curve.run[name])[0] for name in panel.drawn[1:]]
    for mean in dotted:
        axes.plot(times, mean, linestyle=":", marker="o", **look)
    return np.concatenate([values.ravel(), *dotted])


def is_crowded(values: np.ndarray) -> bool:
    """Returns whether marks at so many places of an x axis would cover one another."""
    return len(values) > _MOST_MARKED


def _draw_lambdas(
    axes: "Axes", final: xr.Dataset, name: str, style: dict[str, Any], shift: float
) -> np.ndarray:
    """Draws one line, moved by `shift` points to keep bars apart, and returns all its values."""
    from matplotlib.transforms import ScaledTranslation

    weight_decay, values = final["weight_decay"].values, over_seeds(final[name])
    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    face = "white" if style["linestyle"] == ":" else style["color"]
    crowded = is_crowded(weight_decay)
    # No line leads to weight decay 0, which a log axis does not reach.
    for part in (weight_decay == 0, weight_decay > 0):
        look = style | {
            "markersize": 1 if crowded else 3.5,
            "markerfacecolor": face,
            "linewidth": 1,
            "transform": moved,
        }
        axes.plot(weight_decay[part], values[0][part], **look)
    axes.vlines(
        weight_decay,
        values[1],
        values[2],
        color=style["color"],
        linewidth=1,
        alpha=0.15 if crowded else 1,
        zorder=1,
        transform=moved,
    )
    return values.ravel()


def _draw_finals(
    axes: "Axes", panel: Panel, finals: Sequence[xr.Dataset], styles: Sequence[dict]
) -> np.ndarray:
    """Draws a panel's variables and prediction for every history.

    Returns:
      The values that must fit in the panel.
    """
    pairs = list(
        itertools.product(zip(finals, styles, strict=True), zip(panel.drawn, "-:", strict=False))
    )
    step = min(3, 8 / len(pairs))
    drawn = [
        _draw_lambdas(
            axes, final, name, style | {"linestyle": line}, shift=step * (i - (len(pairs) - 1) / 2)
        )
        for i, ((final, style), (name, line)) in enumerate(pairs)
    ]
    for final, style in zip(finals, styles, strict=True) if panel.predicted else ():
        predicted = over_seeds(final[panel.predicted])[0]
        # A prediction of 0 must not squeeze the measured lines.
        least = _LEAST_SHOWN * np.nanmin(drawn[0], initial=np.inf)
        below = predicted < least
        look: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "color": style["color"]}
        at = final["weight_decay"].values
        marker = "" if is_crowded(at) else "_"
        axes.plot(at, np.where(below, np.nan, predicted), marker=marker, markersize=7, **look)
        if below.any():
            _mark_below(axes, at[below], style["color"])
        drawn.append(predicted[~below])
    return np.concatenate(drawn)


def _mark_below(axes: "Axes", at: np.ndarray, colour: str) -> None:
    """Marks at the lower edge of a panel where a line lies below it."""
    look: dict[str, Any] = {"color": colour, "linestyle": "none", "marker": "v", "markersize": 4}
    place = axes.get_xaxis_transform()
    (marks,) = axes.plot(at, 0 * at, transform=place, clip_on=False, label=_BELOW, **look)
    marks.set_in_layout(False)


def against_lambda(
    histories: dict[str, xr.Dataset], drawn_panels: Sequence[Panel], remark: str = ""
) -> tuple["Figure", list["Axes"]]:
    """Draws panels of the last epoch against weight decay, a colour and marker for each history.

    A single history gives the figure its title.
    """
    from matplotlib.lines import Line2D

    title = literal("".join(histories)) if len(histories) == 1 else ""
    drawn_panels = _measured(drawn_panels, [training(history) for history in histories.values()])
    figure, all_axes = frame(len(drawn_panels), r"weight decay $\lambda$", title)
    looks = zip(histories, itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    styles: list[dict[str, Any]] = [
        {"color": colour, "marker": marker} for _, colour, marker in looks
    ]
    sorted_histories = [history.sortby("weight_decay") for history in histories.values()]
    put_out = [extinct(history.isel(epoch=-1)) for history in sorted_histories]
    finals = [
        training(history).isel(epoch=-1).where(~out)
        for history, out in zip(sorted_histories, put_out, strict=True)
    ]
    weight_decay = np.concatenate([final["weight_decay"].values for final in finals])
    for axes, panel in zip(all_axes, drawn_panels, strict=True):
        scale_x(axes, weight_decay, broken=True)
        finish(axes, panel, _draw_finals(axes, panel, finals, styles))
    handles = [
        Line2D([], [], label=literal(name) + diverged(history), markersize=3.5, **style)
        for style, (name, history) in zip(styles, histories.items(), strict=True)
    ]
    shown = list(histories.values())
    last = _span([int(history["epoch"].values[-1]) for history in shown])
    caption = f"training split at epoch {last}; {caption_of(shown)}, bars: least to greatest"
    hidden = sum(int(out.sum()) for out in put_out)
    caption += f"\n{hidden} runs that weight decay has put out are not shown" if hidden else ""
    if any(line.get_label() == _BELOW for axes in all_axes for line in axes.lines):
        remark += "\n\N{BLACK DOWN-POINTING TRIANGLE}: dashed line below the panel"
    legend(figure, handles if len(handles) > 1 else [], "\n".join(filter(None, (caption, remark))))
    return figure, all_axes


@contextlib.contextmanager
def page(width: float | None, look: Look) -> Iterator[None]:
    """Makes the figures that are drawn in this context as wide as that, in inches (None: as wide as
    they ask), with room for the text of a look.

    Two panels that would be too narrow stand below one another. `restyle` gives text its size.
    """
    token = _page.set(_Page(width, look))
    try:
        yield
    finally:
        _page.reset(token)


def is_narrow() -> bool:
    """Returns whether a page has no room for two panels side by side."""
    width, look = _page.get()
    return width is not None and width < 2 * _LEAST_WIDTH * look.panel


def figure_size(width: float, height: float) -> tuple[float, float]:
    """Returns the size of a figure that asks for some inches, as `page` changes it."""
    given, look = _page.get()
    if given is None:
        return width * look.panel, height * look.panel
    return given, max(height * given / width, _LEAST_HEIGHT * look.panel)


def frame(count: int, x_label: str, title: str, columns: int = 2) -> tuple["Figure", list["Axes"]]:
    """Returns a figure of so many panels, which have an x axis in common where it has a label."""
    from matplotlib.figure import Figure

    given, look = _page.get()
    columns = 1 if is_narrow() else min(columns, count)
    rows = -(-count // columns)
    width = WIDTH * columns * look.panel if given is None else given
    # Six panels below one another fit on a page.
    is_low = is_narrow() and rows > 2
    height = (_LOW if is_low else HEIGHT) * look.panel
    figure = Figure(figsize=(width, height * rows + 0.6), dpi=DPI, layout="constrained")
    title = "\n".join(_wrapped(title, width * SMALL / look.size))
    figure.suptitle(title, size=SIZE)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for i, axes in enumerate(panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        is_last = i + columns >= count
        axes.tick_params(which="both", labelsize=SMALL)
        axes.tick_params(axis="x", which="both", labelbottom=is_last or not (is_low and x_label))
        axes.set_xlabel(x_label if is_last else "", size=SIZE)
    return figure, panels


def restyle(figure: "Figure") -> "Figure":
    """Gives the text, lines and marks of a figure the sizes of the page's look; returns it."""
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    look = _page.get().look
    if look == Look():
        return figure
    sizes: dict[Any, float] = {SIZE: look.size, SMALL: look.small}
    for text in figure.findobj(Text):
        text.set_fontsize(sizes.get(text.get_fontsize(), text.get_fontsize()))
    for line in figure.findobj(Line2D):
        line.set_linewidth(line.get_linewidth() * look.line)
        line.set_markersize(line.get_markersize() * look.line)
    for collection in figure.findobj(Collection):
        collection.set_linewidth(
            [width * look.line for width in np.ravel(collection.get_linewidth())]
        )
    # Ticks are made anew when a figure is drawn.
    for axes in figure.axes:
        axes.tick_params(which="both", labelsize=look.small)
    return figure


def scale_x(axes: "Axes", values: np.ndarray, broken: bool = False) -> None:
    """Makes the x axis logarithmic, with a place for 0.

    Ticks are at powers of ten. If fewer than two of these are in range, they are at 1, 2 and 5
    times powers of ten, or else at the ends.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ticks, positive = (
        [0.0] if (values == 0).any() else [],
        values[(values > 0) & np.isfinite(values)],
    )
    if positive.size:
        # Closer to the ends of float64 neither the scale nor its ticks can be computed.
        low, high = np.clip([positive.min(), positive.max()], 1e-300, 1e300)
        # The rounding keeps 1e-3, whose logarithm is -2.9999999999999996.
        decades = np.arange(
            np.floor(round(np.log10(low), 9)), np.ceil(round(np.log10(high), 9)) + 1
        )
        minor = list(range(2, 10)) if len(decades) <= _MOST_DECADES else None
        decades = decades[:: -(-len(decades) // _MOST_DECADES)]
        axes.set_xscale("symlog", linthresh=low, linscale=0.6, subs=minor)
        for factors in ((1,), (1, 2, 5), (low / 10.0 ** decades[0], high / 10.0 ** decades[0])):
            marks = np.unique(np.outer(factors, 10.0**decades))
            marks = marks[(marks > 0.999 * low) & (marks < 1.001 * high)]
            if marks.size > 1:
                break
        ticks += list(marks)
        if broken and (values == 0).any():
            look: dict[str, Any] = {
                "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                "ha": "center",
                "va": "center",
            }
            axes.text(low / 2, 0, "//", size=SMALL, transform=axes.get_xaxis_transform(), **look)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(*_limits(axes.xaxis, values))


def finish(axes: "Axes", panel: Panel, values: np.ndarray) -> None:
    """Sets a panel's words and y axis: a log scale, with a place for 0 if there are zeros.

    The axis is linear if no value is positive.
    """
    axes.set_title(panel.title, size=SIZE)
    label = panel.label
    if is_narrow():  # and low: lower than some labels are long
        label = "\n".join(_wrapped(label.replace(r"\,/\,", r"$ $/\,"), _LABEL_HEIGHT))
    axes.set_ylabel(label, size=SIZE)
    positive = values[(values > 0) & np.isfinite(values)]
    # Autoscaling would misplace the lines that are moved by points.
    axes.set_autoscaley_on(False)
    # Values more than twelve decades below the greatest mean nothing; they are drawn as zeros are.
    least = max(positive.min(), 1e-12 * positive.max()) if positive.size else 0.0
    finite = values[np.isfinite(values)]
    if positive.size and finite.min() < least:
        decade = 10.0 ** np.floor(np.log10(least))
        axes.set_yscale("symlog", linthresh=decade, linscale=0.7, subs=list(range(2, 10)))
        labels = 5 if is_narrow() else _MOST_LABELS
        locator: Any = axes.yaxis.get_major_locator()
        locator.set_params(numticks=labels)
    elif positive.size:
        axes.set_yscale("log")
        _label_plainly(axes, positive)
    elif finite.size and not finite.any():
        # Nothing but zeros has no scale.
        axes.set_yticks([0.0])
        axes.set_ylim(-0.05, 1.0)
        return
    axes.set_ylim(*_limits(axes.yaxis, values))


def _label_plainly(axes: "Axes", positive: np.ndarray) -> None:
    """Labels a log axis with decimals, as in 0.06, where these are short."""
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, MaxNLocator, NullLocator

    if positive.max() < _NARROW * positive.min():
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _decimal(value)))
        return
    for which in ("major", "minor"):
        usual = LogFormatterSciNotation(labelOnlyBase=which == "major")
        usual.set_axis(axes.yaxis)

        def label(value: float, place: Any, usual: Any = usual) -> str:
            usual.set_locs()  # by the limits of the axis
            return _decimal(value) if usual(value, place) else ""

        getattr(axes.yaxis, f"set_{which}_formatter")(FuncFormatter(label))


def _decimal(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e4 else number(value)


def _limits(axis: "Axis", values: np.ndarray) -> tuple[float, float]:
    """Returns the limits of an axis that holds finite values.

    Matplotlib's own are wrong for a scale set after drawing, and for lines moved by points.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    ends = axis.get_transform().transform(np.array([finite.min(), finite.max()], float))
    # The least padding, in decades, keeps values that are equal up to rounding from filling the
    # panel. A symlog scale counts in units of its threshold instead.
    least = 0.02 if axis.get_scale() == "log" else 0.0
    pad = max(0.05 * float(ends[1] - ends[0]), least) or 0.1 * float(abs(ends[0])) or 0.1
    with np.errstate(over="ignore"):
        limits = axis.get_transform().inverted().transform(ends + np.array([-pad, pad]))
    low, high = np.clip(limits, -np.finfo(float).max, np.finfo(float).max)
    return float(low), float(high)


def literal(text: str) -> str:
    r"""Escapes a user's name so that matplotlib does not read `$\frac$` in it as mathematics."""
    text = printable(text)
    if len(text) > _MOST_IN_NAME:
        text = f"{text[: _MOST_IN_NAME // 3]}...{text[-_MOST_IN_NAME // 2 :]}"
    return text.replace("$", r"\$")


def number(value: float | np.ndarray) -> str:
    """Formats a scalar as matplotlib's mathematics."""
    value = float(np.asarray(value))
    if value == 0 or 0.1 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else rf"{float(mantissa):g}\times"
    return f"${factor}10^{{{int(exponent)}}}$"


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def diverged(*histories: xr.Dataset) -> str:
    last = [history["finite"].isel(epoch=-1) for history in histories]
    count = sum(int((finite == 0).sum()) for finite in last)
    return f" ({count} of {sum(finite.size for finite in last)} diverged)" if count else ""


def name_places(axes: "Axes", names: Sequence[str], *, are_shown: bool = True) -> None:
    """Puts names on the x axis, one at each integer from 0 on, turned where they need more room.

    Args:
      are_shown: whether this panel has the names of its column; the ticks it has anyway.
    """
    turned = max(map(len, names)) * len(names) > 40
    axes.set_xticks(
        np.arange(len(names)),
        [literal(name) if are_shown else "" for name in names],
        size=SMALL,
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
    )


def caption_of(histories: Sequence[xr.Dataset]) -> str:
    seeds = [history.sizes["seed"] for history in histories]
    return (
        f"means over n = {_span(seeds)} seed{'s' if max(seeds) > 1 else ''} per "
        f"run{diverged(*histories)}"
    )


def legend(figure: "Figure", handles: Sequence["Line2D"], caption: str) -> None:
    """Draws a legend below a figure, with a caption above it, in lines and rows that fit."""
    # A line and the gaps beside it take seven characters.
    lengths = [len(_visible(str(handle.get_label()))) + 7 for handle in handles]
    inches = figure.get_figwidth() * SMALL / _page.get().look.small
    columns = max(1, min(len(handles), int(inches * 16 / max(lengths, default=1))))
    rows = -(-len(handles) // columns)
    columns = max(1, -(-len(handles) // max(rows, 1)))
    caption = "\n".join(part for line in caption.splitlines() for part in _wrapped(line, inches))
    words: dict[str, Any] = {"fontsize": SMALL, "title": caption, "title_fontsize": SMALL}
    legend = figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, frameon=False, **words
    )
    legend.get_title().set_multialignment("center")


def _visible(text: str) -> str:
    """Returns about as many characters as one sees of a text with mathematics in it."""
    return re.sub(r"\\[,;! ]|[${}^_]", "", re.sub(r"\\[A-Za-z]+", "x", text))


def cosine_bar(
    figure: "Figure", panels: Sequence["Axes"], etf: float, reach: float, label: str
) -> "Colorbar":
    """Draws the colour bar of images of cosines, from etf - reach to etf + reach.

    Args:
      etf: the cosine of a simplex ETF.
    """
    bar = figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.85, aspect=25)
    bar.set_label(label, size=SIZE)
    ticks = etf + reach * np.linspace(-1, 1, 5)
    words = [f"{tick:.3f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    bar.set_ticks(list(ticks), labels=[*words[:2], f"{words[2]} (ETF)", *words[3:]], size=SMALL)
    return bar


def _wrapped(line: str, inches: float) -> list[str]:
    """Breaks a line of a caption into lines of about one length that fit, but never within
    mathematics or beside its equals sign.
    """
    kept: list[str] = []

    def put_away(found: re.Match) -> str:
        kept.append(found[0])
        # It is counted as long as it looks.
        return "\0" * max(1, len(_visible(found[0])))

    line = re.sub(_WHOLE, put_away, line)
    places = iter(kept)
    width = int(19 * inches)
    parts = textwrap.wrap(line, width, break_long_words=False)
    while len(parts) > 1 and width > 1:
        narrower = textwrap.wrap(line, width - 1, break_long_words=False)
        if len(narrower) > len(parts):
            break
        parts, width = narrower, width - 1
    return [re.sub("\0+", lambda _: next(places), part) for part in parts]


def _lambda_bar(figure: "Figure", panels: Sequence["Axes"], curves: Sequence[Curve]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(curves)
    colours = ScalarMappable(
        BoundaryNorm(np.arange(count + 1), count), ListedColormap([c.colour for c in curves])
    )
    bar = figure.colorbar(colours, ax=list(panels), aspect=60, pad=0.02)
    shown = range(0, count, -(-count // 12))
    bar.minorticks_off()
    bar.set_ticks([i + 0.5 for i in shown], labels=[curves[i].label for i in shown], size=SMALL)
