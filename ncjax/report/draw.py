"""Writes the figures of one run, and figures that compare several runs."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from ncjax.errors import InputError
from ncjax.report import (
    figures,
    imbalance_figures,
    layer_figures,
    monitor_figures,
    panels,
    theory_figures,
    thinning,
)
from ncjax.storage import varied
from ncjax.storage.files import write_atomically
from ncjax.storage.history import imbalance_ratio
from ncjax.variation import path_word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of all figures of runs, by which some can be chosen.
FIGURES = (
    "collapse_against_epoch",
    "collapse_against_lambda",
    "class_mean_cosines",
    "equilibrium_against_epoch",
    "theory_against_lambda",
    "budget_against_epoch",
    "bounds_against_lambda_and_epoch",
    "collapse_against_clock",
    "modes_against_lambda",
    "layers_against_epoch",
    "layers_by_depth",
    "compare_against_epoch",
    "minority_against_ratio",
)


class Style(NamedTuple):
    """Says which figures are written and how: names (none: all of them), a format, a width in
    inches (None: that of their panels), and one of `panels.LOOKS`.
    """

    only: Sequence[str] = ()
    format: str = "png"
    width: float | None = None
    look: str = ""


STYLE = Style()
_TEXT_AS_TEXT: Any = {"pdf.fonttype": 42, "svg.fonttype": "none"}


# If weight decay spans 300 decades, the ends of curves and axes overflow float64.
@np.errstate(over="ignore")
def draw_all(
    history: xr.Dataset,
    folder: Path,
    weight_decay: float | None = None,
    style: Style = STYLE,
) -> list[Path]:
    """Writes the figures of one run, a set for each setting of axes but weight_decay and seed.

    Of many settings some have figures, see `remark`. Those of variants are also compared, in
    figures without a setting in their names.

    Args:
      weight_decay: the weight decay whose equilibrium budget is drawn; None: the one that collapses
        most.
    """
    written, shown = [], list(figures.settings(history, thinning.MOST_SETTINGS))
    for one in shown:
        suffix = "".join(f"-{path_word(word)}" for word in figures.setting_words(one))
        written += write_figures(_of_setting(one, weight_decay), folder, style, suffix)
    if varied.dimensions(history):
        written += write_figures(_compared({"": history}), folder, style)
    if (history["weight_decay"] > 0).any():
        phases = {"modes_against_lambda": lambda: theory_figures.modes_against_lambda(shown)}
        written += write_figures(phases, folder, style)
    return written


def remark(history: xr.Dataset) -> str:
    """Returns a line on the settings of a history that have figures; empty: all have."""
    counts = [figures.count_settings(variant) for variant in varied.split(history)]
    shown = sum(min(count, thinning.MOST_SETTINGS) for count in counts)
    words = thinning.remark(shown, sum(counts), "settings")
    return f"figures are of {words}; the others are in history.nc" if words else ""


def _of_setting(one: xr.Dataset, weight_decay: float | None) -> "dict[str, Callable[[], Figure]]":
    """Returns by name what draws the figures of a history of one setting."""
    words = ", ".join(figures.setting_words(one))
    drawn: dict[str, Callable[[], Figure]] = {
        "collapse_against_epoch": lambda: figures.collapse_against_epoch(one),
        "collapse_against_lambda": lambda: figures.collapse_against_lambda({words: one}),
        "class_mean_cosines": lambda: figures.class_mean_cosines(one),
    }
    if layer_figures.has_layers(one):
        shown = _shown_decay(one, weight_decay)
        drawn |= {
            "layers_against_epoch": lambda: layer_figures.layers_against_epoch(one, shown),
            "layers_by_depth": lambda: layer_figures.layers_by_depth(one),
        }
    if (one["weight_decay"] > 0).any():
        drawn |= {
            "equilibrium_against_epoch": lambda: theory_figures.equilibrium_against_epoch(one),
            "theory_against_lambda": lambda: theory_figures.theory_against_lambda({words: one}),
        }
        if imbalance_ratio(one) == 1:
            decay = _shown_decay(one, weight_decay)
            drawn["budget_against_epoch"] = lambda: theory_figures.budget_against_epoch(one, decay)
            if "nc2_bound_etf" in one:  # younger than some histories
                drawn["bounds_against_lambda_and_epoch"] = lambda: (
                    theory_figures.bounds_against_lambda_and_epoch(one, decay)
                )
        elif weight_decay is not None:
            way_out = "classes of different sizes have no budget; leave it out"
            raise InputError("--weight-decay", weight_decay, way_out)
        if ((one["relaxation_time"] > 0) & np.isfinite(one["relaxation_time"])).any():
            drawn["collapse_against_clock"] = lambda: theory_figures.collapse_against_clock(one)
    return drawn


def _shown_decay(history: xr.Dataset, weight_decay: float | None) -> float:
    """Returns the weight decay asked for, else the one with the least NC3 among those above 0, or 0
    where there is no other.
    """
    values = history["weight_decay"].values
    if weight_decay is None and not (values > 0).any():
        return 0.0
    if weight_decay is None:
        decayed = history.isel(weight_decay=values > 0)
        return float(decayed["weight_decay"].values[figures.most_collapsed(decayed)])
    if weight_decay not in values[values > 0]:
        choices = ", ".join(f"{value:g}" for value in values if value > 0)
        raise InputError("--weight-decay", weight_decay, f"the run has a budget at {choices}")
    return weight_decay


@np.errstate(over="ignore")
def draw_comparison(
    histories: dict[str, xr.Dataset], folder: Path, style: Style = STYLE
) -> list[Path]:
    """Writes the figures that compare several runs; every setting of a run is drawn as a run."""
    return write_figures(_compared(histories), folder, style)


def _compared(histories: dict[str, xr.Dataset]) -> "dict[str, Callable[[], Figure]]":
    """Returns by name what draws the figures that compare the settings of histories."""
    every = [
        (name, one)
        for name, history in histories.items()
        for one in figures.settings(history, thinning.MOST_COMPARED)
    ]
    named = [every[i] for i in thinning.evenly(len(every), thinning.MOST_COMPARED)]
    count = sum(figures.count_settings(history) for history in histories.values())
    some = thinning.remark(len(named), count, "settings")
    shown = {
        ", ".join(filter(None, [name, *figures.setting_words(one)])): one for name, one in named
    }
    drawn: dict[str, Callable[[], Figure]] = {
        "collapse_against_lambda": lambda: figures.collapse_against_lambda(shown, some),
        "compare_against_epoch": lambda: figures.compare_against_epoch(shown, some),
    }
    if all((one["weight_decay"] > 0).any() for one in shown.values()):
        drawn["theory_against_lambda"] = lambda: theory_figures.theory_against_lambda(shown, some)
    if imbalance_figures.can_compare(shown):
        drawn["minority_against_ratio"] = lambda: imbalance_figures.minority_against_ratio(shown)
    return drawn


def draw_monitored(
    histories: dict[str, xr.Dataset], folder: Path, style: Style = STYLE
) -> list[Path]:
    """Writes the figure of a history of `ncjax.Monitor` by layer, or one that compares several."""
    if len(histories) == 1:
        (history,) = histories.values()
        drawn = {"collapse_against_epoch": lambda: monitor_figures.by_layer(history)}
    else:
        drawn = {"compare_against_epoch": lambda: monitor_figures.compared(histories)}
    return write_figures(drawn, folder, style)


def write_figures(
    drawn: "Mapping[str, Callable[[], Figure]]", folder: Path, style: Style, suffix: str = ""
) -> list[Path]:
    """Draws the figures of these that a style asks for, and writes them; returns their paths."""
    with panels.page(style.width, panels.LOOKS[style.look]):
        return [
            _write(panels.restyle(draw()), folder / f"{name}{suffix}.{style.format}")
            for name, draw in drawn.items()
            if not style.only or name in style.only
        ]


def _write(figure: "Figure", path: Path) -> Path:
    import matplotlib

    content = io.BytesIO()
    # Text stays text, to be searched and edited. Matplotlib takes this from its global settings
    # alone, which are then as they were.
    with matplotlib.rc_context(_TEXT_AS_TEXT):
        figure.savefig(content, format=path.suffix.removeprefix("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return path
