"""Histories -> matplotlib figures, as pure functions.

Lines are means over seeds and bands reach from the least to the greatest of them: unlike a standard deviation, that
stays positive on a log axis. Matplotlib is imported late, and pyplot never, so that `--help` and bad input answer at
once and no global state changes. A history given to a figure has one setting of every axis but weight_decay and seed:
`settings` takes others apart.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from ncjax.config import SWEPT
from ncjax.history import COSINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WIDTH, _HEIGHT, _DPI = 3.4, 2.1, 200  # a panel, in inches: two fill the text width of a two-column page
_SIZE, _SMALL = 8, 7  # points
_MOST_IN_LEGEND = 10
_MOST_LABELLED_CLASSES = 30
# Okabe and Ito's colours without the yellow. Seven colours and six markers repeat together only after 42 runs.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = "osD^vP"


class _Panel(NamedTuple):
    title: str
    label: str
    drawn: tuple[str, ...]  # variables of `_training`: solid, then dotted


class _Curve(NamedTuple):
    label: str
    colour: str
    linestyle: Literal["-", "--"]
    run: xr.Dataset  # `_training` of one weight decay, all seeds


_NORMS = ("nc2_equinorm_means", "nc2_equinorm_head")
_ANGLES = ("nc2_equiangular_means", "nc2_equiangular_head")
_PANELS = (
    _Panel("NC1: variability within classes", r"tr$(\Sigma_W\Sigma_B^+)\,/\,C$", ("nc1",)),
    _Panel("NC2: equal norms (solid: means, dotted: head)", "std / mean over classes", _NORMS),
    _Panel("NC2: equal angles (solid: means, dotted: head)", r"mean of $|\cos+1/(C-1)|$", _ANGLES),
    _Panel(
        "NC3: self-duality (dotted: head centred)", r"$\Vert\hat W_L-\hat M^{\top}\Vert_F^2$", ("nc3", "nc3_centered")
    ),
    _Panel("NC4: nearest class mean", "share that disagrees", ("nc4",)),
    _Panel("Error (solid: train, dotted: test)", r"1 $-$ accuracy", ("error_train", "error_test")),
)


def collapse_against_epoch(history: xr.Dataset) -> "Figure":
    """NC1 to NC4 and the error while training, a colour per weight decay."""
    return _against_epoch(_one_per_lambda(history), _PANELS, ", ".join(setting_words(history)))


def equilibrium_against_epoch(history: xr.Dataset) -> "Figure":
    """How far every layer is from a stationary point; weight decay 0, where this has no meaning, is left out."""
    label = r"$\Vert\lambda W_k+\nabla_{W_k}\mathrm{fit}\Vert\,/\,\Vert\lambda W_k\Vert$"
    layers = [str(layer) for layer in history["layer"].values]
    panels = [_Panel(layer.replace("_", " "), label, (layer,)) for layer in layers]
    decayed = history.isel(weight_decay=history["weight_decay"].values > 0)
    return _against_epoch(_one_per_lambda(decayed), panels, ", ".join(setting_words(history)))


def compare_against_epoch(histories: dict[str, xr.Dataset]) -> "Figure":
    """NC1 to NC4 and the error while training, each history at the weight decay where it collapses most."""
    curves = []
    for colour, (name, history) in zip(itertools.cycle(_COLOURS), histories.items(), strict=False):
        run = _training(history).isel(weight_decay=most_collapsed(history))
        label = rf"{name}, $\lambda$ = {_number(run['weight_decay'].item())}{_diverged(run)}"
        curves.append(_Curve(label, colour, "-", run))
    return _against_epoch(curves, _PANELS, r"Every run at its $\lambda$ of least NC3", compared=True)


def collapse_against_lambda(histories: dict[str, xr.Dataset]) -> "Figure":
    """NC1 to NC4 and the error at the last epoch, a colour and marker per history; the name of one alone is a title."""
    from matplotlib.lines import Line2D

    figure, panels = _frame(len(_PANELS), r"weight decay $\lambda$", "".join(histories) if len(histories) == 1 else "")
    looks = zip(histories, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    styles: list[dict[str, Any]] = [{"color": colour, "marker": marker} for _, colour, marker in looks]
    finals = [_training(history).isel(epoch=-1).sortby("weight_decay") for history in histories.values()]
    weight_decay = np.concatenate([final["weight_decay"].values for final in finals])
    for axes, panel in zip(panels, _PANELS, strict=True):
        _scale_x(axes, weight_decay, broken=True)
        pairs = list(itertools.product(zip(finals, styles, strict=True), zip(panel.drawn, "-:", strict=False)))
        step = min(3, 8 / len(pairs))
        drawn = [
            _draw_lambdas(axes, final, name, style | {"linestyle": line}, shift=step * (i - (len(pairs) - 1) / 2))
            for i, ((final, style), (name, line)) in enumerate(pairs)
        ]
        _finish(axes, panel, np.concatenate(drawn))
    handles = [
        Line2D([], [], label=name + _diverged(history), markersize=3.5, **style)
        for style, (name, history) in zip(styles, histories.items(), strict=True)
    ]
    shown = list(histories.values())
    last = _span([int(history["epoch"].values[-1]) for history in shown])
    caption = f"training split at epoch {last}; {_caption(shown)}, bars: least to greatest"
    _legend(figure, handles if len(handles) > 1 else [], caption)
    return figure


def class_mean_cosines(history: xr.Dataset) -> "Figure":
    """Cosines between centred class means of the first seed: least weight decay beside the most collapsed one."""
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

    least = int(history["weight_decay"].values.argmin())
    shown = [history.isel(weight_decay=i, seed=[0]) for i in dict.fromkeys((least, most_collapsed(history)))]
    names = [str(name) for name in history["label"].values]
    etf = -1 / (len(names) - 1)
    # The diagonal is 1 by definition: with it on the scale, nothing else would differ.
    off = [np.where(np.eye(len(names)), np.nan, run[COSINES].squeeze("seed")) for run in shown]
    reach = np.nan_to_num(np.abs(np.stack(off) - etf)).max(initial=0.01)
    figure = Figure(figsize=(_WIDTH * len(off) + 0.9, _WIDTH), dpi=_DPI, layout="constrained")
    figure.suptitle(", ".join(setting_words(history)), size=_SIZE)
    panels = list(figure.subplots(1, len(off), squeeze=False).flat)
    for axes, run, matrix in zip(panels, shown, off, strict=True):
        axes.imshow(matrix, cmap="PuOr", norm=CenteredNorm(etf, reach))
        title = rf"$\lambda$ = {_number(run['weight_decay'].item())}, seed {run['seed'].item()}{_diverged(run)}"
        axes.set_title(title, size=_SIZE)
        axes.set_facecolor("0.85")
        axes.tick_params(length=0, labelsize=_SMALL)
        places = range(len(names) if len(names) <= _MOST_LABELLED_CLASSES else 0)
        axes.set_xticks(places, names[: len(places)], rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(places, names[: len(places)])
    bar = figure.colorbar(panels[0].images[0], ax=panels, shrink=0.85, aspect=25)
    bar.set_label("cosine between centred class means", size=_SIZE)
    ticks = etf + reach * np.linspace(-1, 1, 5)
    words = [f"{tick:.3f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    bar.set_ticks(list(ticks), labels=[*words[:2], f"{words[2]} (ETF)", *words[3:]], size=_SMALL)
    bar.ax.axhline(etf, color="black", linewidth=1)
    return figure


def terminal_epoch(accuracy: xr.DataArray) -> xr.DataArray:
    """First measured epoch at which every seed that is still finite is right everywhere; NaN if there is none."""
    reached = ((accuracy == 1) | accuracy.isnull()).all("seed") & accuracy.notnull().any("seed")
    return accuracy["epoch"].where(reached).min("epoch")


def most_collapsed(history: xr.Dataset) -> int:
    """Index of the weight decay with the least mean NC3 on the training split at the last epoch."""
    mean = _over_seeds(history["nc3"].sel(split="train").isel(epoch=-1))[0]
    return int(np.where(np.isnan(mean), np.inf, mean).argmin())


def settings(history: xr.Dataset) -> Iterator[xr.Dataset]:
    """One history per setting of the swept axes other than weight_decay and seed, which become scalar coordinates."""
    extra = [name for name in SWEPT if name in history.dims and name not in ("weight_decay", "seed")]
    for at in itertools.product(*(range(history.sizes[name]) for name in extra)):
        yield history.isel(dict(zip(extra, at, strict=True)))


def setting_words(history: xr.Dataset) -> list[str]:
    return [f"{name}={history[name].item():g}" for name in SWEPT if name in history.coords and not history[name].ndim]


def _training(history: xr.Dataset) -> xr.Dataset:
    """What panels draw: the training split, both errors, and the residual of every layer under the layer's name."""
    drawn = {f"error_{split}": 1 - history["accuracy"].sel(split=split, drop=True) for split in ("train", "test")}
    for layer in history["layer"].values:
        drawn[str(layer)] = history["equilibrium_residual"].sel(layer=layer, drop=True)
    return history.sel(split="train", drop=True).assign(drawn)


def _over_seeds(values: xr.DataArray) -> np.ndarray:
    """Mean, least and greatest over the seeds that are finite, stacked; NaN where none is."""
    masked = np.ma.masked_invalid(values.transpose("seed", ...).values.astype(np.float64))
    return np.stack([np.ma.filled(part, np.nan) for part in (masked.mean(0), masked.min(0), masked.max(0))])


def _one_per_lambda(history: xr.Dataset) -> list[_Curve]:
    import matplotlib
    from matplotlib.colors import to_hex

    history = _training(history).sortby("weight_decay")
    values = history["weight_decay"].values
    # Neither end of viridis: one is nearly the black of weight decay 0, the other too light for a thin line.
    colours = iter(matplotlib.colormaps["viridis"](np.linspace(0.12, 0.9, int((values > 0).sum()))))
    curves = []
    for i, value in enumerate(values):
        run = history.isel(weight_decay=i)
        colour, linestyle = (to_hex(next(colours)), "-") if value > 0 else ("#000000", "--")
        curves.append(_Curve(rf"$\lambda$ = {_number(value)}{_diverged(run)}", colour, linestyle, run))
    return curves


def _against_epoch(curves: Sequence[_Curve], panels: Sequence[_Panel], title: str, compared: bool = False) -> "Figure":
    from matplotlib.lines import Line2D

    figure, all_axes = _frame(len(panels), "epoch", title)
    epochs = np.concatenate([curve.run["epoch"].values for curve in curves])
    for axes, panel in zip(all_axes, panels, strict=True):
        _scale_x(axes, epochs)
        _finish(axes, panel, np.concatenate([_draw_epochs(axes, curve, panel) for curve in curves]))
    runs = [curve.run for curve in curves]
    caption = f"training split; {_caption(runs)}, band around solid and dashed lines: least to greatest"
    if any(terminal_epoch(run["accuracy"]).notnull() for run in runs):
        caption += "\n\N{WHITE DIAMOND}: training error first 0 in every seed"
    # A run compared with others has one weight decay, and a name that no scale can show.
    if len(curves) > _MOST_IN_LEGEND and not compared:
        _lambda_bar(figure, all_axes, curves)
        curves = []
    _legend(figure, [Line2D([], [], color=c.colour, linestyle=c.linestyle, label=c.label) for c in curves], caption)
    return figure


def _draw_epochs(axes: "Axes", curve: _Curve, panel: _Panel) -> np.ndarray:
    """Draws one curve and returns what must fit in the panel."""
    epochs = curve.run["epoch"].values
    look: dict[str, Any] = {"color": curve.colour, "linewidth": 1, "markersize": 1.5}
    values = _over_seeds(curve.run[panel.drawn[0]])
    axes.plot(epochs, values[0], linestyle=curve.linestyle, marker="o", **look)
    axes.fill_between(epochs, values[1], values[2], color=curve.colour, alpha=0.15, linewidth=0)
    begins = epochs == terminal_epoch(curve.run["accuracy"]).item()
    mark = {"marker": "D", "markersize": 4, "markerfacecolor": "white", "linestyle": "none"}
    axes.plot(epochs[begins], values[0][begins], zorder=3, **look | mark)
    # Bands around these too would hide the lines.
    dotted = [_over_seeds(curve.run[name])[0] for name in panel.drawn[1:]]
    for mean in dotted:
        axes.plot(epochs, mean, linestyle=":", marker="o", **look)
    return np.concatenate([values.ravel(), *dotted])


def _draw_lambdas(axes: "Axes", final: xr.Dataset, name: str, style: dict[str, Any], shift: float) -> np.ndarray:
    """Draws one line, moved by `shift` points so that bars do not cover each other, and returns all its values."""
    from matplotlib.transforms import ScaledTranslation

    weight_decay, values = final["weight_decay"].values, _over_seeds(final[name])
    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    face = "white" if style["linestyle"] == ":" else style["color"]
    # No line leads to weight decay 0: a log axis does not reach it.
    for part in (weight_decay == 0, weight_decay > 0):
        look = style | {"markersize": 3.5, "markerfacecolor": face, "linewidth": 1, "transform": moved}
        axes.plot(weight_decay[part], values[0][part], **look)
    axes.vlines(weight_decay, values[1], values[2], color=style["color"], linewidth=1, zorder=1, transform=moved)
    return values.ravel()


def _frame(count: int, x_label: str, title: str) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.6), dpi=_DPI, layout="constrained")
    figure.suptitle(title, size=_SIZE)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for i, axes in enumerate(panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=_SMALL)
        axes.set_xlabel(x_label if i + columns >= count else "", size=_SIZE)
    return figure, panels


def _scale_x(axes: "Axes", values: np.ndarray, broken: bool = False) -> None:
    """A log axis with a place for 0; ticks at powers of ten, or at the ends where there are fewer than two."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ticks, positive = [0.0] if (values == 0).any() else [], values[values > 0]
    if positive.size:
        low, high = float(positive.min()), float(positive.max())
        axes.set_xscale("symlog", linthresh=low, linscale=0.6, subs=list(range(2, 10)))
        # The rounding keeps 1e-3, whose logarithm is -2.9999999999999996.
        powers = 10.0 ** np.arange(np.ceil(round(np.log10(low), 9)), np.floor(round(np.log10(high), 9)) + 1)
        ticks += list(powers if powers.size > 1 else sorted({low, high}))
        if broken and (values == 0).any():
            look: dict[str, Any] = {
                "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                "ha": "center",
                "va": "center",
            }
            axes.text(low / 2, 0, "//", size=_SMALL, transform=axes.get_xaxis_transform(), **look)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(*_limits(axes.xaxis, values))


def _finish(axes: "Axes", panel: _Panel, values: np.ndarray) -> None:
    """Words, and a log scale with room for 0 where there are zeros (linear where nothing is positive)."""
    axes.set_title(panel.title, size=_SIZE)
    axes.set_ylabel(panel.label, size=_SIZE)
    positive = values[values > 0]
    if positive.size and (values == 0).any():
        decade = 10.0 ** np.floor(np.log10(positive.min()))
        axes.set_yscale("symlog", linthresh=decade, linscale=0.7, subs=list(range(2, 10)))
    elif positive.size:
        axes.set_yscale("log")
    axes.set_ylim(*_limits(axes.yaxis, values))


def _limits(axis: "Axis", values: np.ndarray) -> tuple[float, float]:
    """Matplotlib's own limits are wrong for a scale set after drawing and for lines moved by points."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    ends = axis.get_transform().transform(np.array([finite.min(), finite.max()], float))
    pad = 0.05 * float(ends[1] - ends[0]) or 0.1
    low, high = axis.get_transform().inverted().transform(ends + np.array([-pad, pad]))
    return float(low), float(high)


def _number(value: float) -> str:
    if value == 0 or 0.1 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else rf"{float(mantissa):g}\times"
    return f"${factor}10^{{{int(exponent)}}}$"


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _diverged(*histories: xr.Dataset) -> str:
    last = [history["finite"].isel(epoch=-1) for history in histories]
    count = sum(int((finite == 0).sum()) for finite in last)
    return f" ({count} of {sum(finite.size for finite in last)} diverged)" if count else ""


def _caption(histories: Sequence[xr.Dataset]) -> str:
    seeds = [history.sizes["seed"] for history in histories]
    return f"means over n = {_span(seeds)} seed{'s' if max(seeds) > 1 else ''} per run{_diverged(*histories)}"


def _legend(figure: "Figure", handles: Sequence["Line2D"], caption: str) -> None:
    # Mathematics takes less room than its source; seven characters are the line and the gaps.
    lengths = [len(re.sub(r"\\[a-z]+|[${}^]", "", str(handle.get_label()))) + 7 for handle in handles]
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 16 / max(lengths, default=1))))
    words: dict[str, Any] = {"fontsize": _SMALL, "title": caption, "title_fontsize": _SMALL}
    legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False, **words)
    legend.get_title().set_multialignment("center")


def _lambda_bar(figure: "Figure", panels: Sequence["Axes"], curves: Sequence[_Curve]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(curves)
    colours = ScalarMappable(BoundaryNorm(np.arange(count + 1), count), ListedColormap([c.colour for c in curves]))
    bar = figure.colorbar(colours, ax=list(panels), aspect=60, pad=0.02)
    shown = range(0, count, -(-count // 12))
    bar.set_ticks([i + 0.5 for i in shown], labels=[curves[i].label for i in shown], size=_SMALL)
