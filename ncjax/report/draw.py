"""Writes the figures of runs: those of each, and several laid over one another."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ncjax.errors import InputError
from ncjax.report import figures, imbalance_figures, theory_figures
from ncjax.storage.files import write_atomically
from ncjax.storage.history import imbalance_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Where weight decay spans 300 decades, ends of curves and axes leave float64.
@np.errstate(over="ignore")
def draw_all(history: xr.Dataset, folder: Path, weight_decay: float | None = None) -> list[Path]:
    """Writes the figures of one run, one set per setting of the axes other than weight_decay and
    seed.

    weight_decay: whose equilibrium budget is drawn; by default the one that collapses most.
    """
    written = []
    for one in figures.settings(history):
        suffix = "".join(f"-{word}" for word in figures.setting_words(one))
        words = ", ".join(figures.setting_words(one))
        drawn = {
            "collapse_against_epoch": figures.collapse_against_epoch(one),
            "collapse_against_lambda": figures.collapse_against_lambda({words: one}),
            "class_mean_cosines": figures.class_mean_cosines(one),
        }
        if (one["weight_decay"] > 0).any():
            drawn |= {
                "equilibrium_against_epoch": theory_figures.equilibrium_against_epoch(one),
                "theory_against_lambda": theory_figures.theory_against_lambda({words: one}),
            }
            if imbalance_ratio(one) == 1:
                drawn["budget_against_epoch"] = theory_figures.budget_against_epoch(
                    one, _budget_decay(one, weight_decay)
                )
            elif weight_decay is not None:
                way_out = "classes of different sizes have no budget; leave it out"
                raise InputError("--weight-decay", weight_decay, way_out)
            if ((one["relaxation_time"] > 0) & np.isfinite(one["relaxation_time"])).any():
                drawn["collapse_against_clock"] = theory_figures.collapse_against_clock(one)
        written += [
            _write(figure, folder / f"{name}{suffix}.png") for name, figure in drawn.items()
        ]
    if (history["weight_decay"] > 0).any():
        phases = theory_figures.modes_against_lambda(list(figures.settings(history)))
        written.append(_write(phases, folder / "modes_against_lambda.png"))
    return written


def _budget_decay(history: xr.Dataset, weight_decay: float | None) -> float:
    """The weight decay asked for, else the one with the least NC3 among those above 0."""
    values = history["weight_decay"].values
    if weight_decay is None:
        decayed = history.isel(weight_decay=values > 0)
        return float(decayed["weight_decay"].values[figures.most_collapsed(decayed)])
    if weight_decay not in values[values > 0]:
        choices = ", ".join(f"{value:g}" for value in values if value > 0)
        raise InputError("--weight-decay", weight_decay, f"the run has a budget at {choices}")
    return weight_decay


@np.errstate(over="ignore")
def draw_comparison(histories: dict[str, xr.Dataset], folder: Path) -> list[Path]:
    """Writes the figures that lay several runs over one another, every setting of each as one of
    them.
    """
    named = [
        (name, one) for name, history in histories.items() for one in figures.settings(history)
    ]
    shown = {", ".join([name, *figures.setting_words(one)]): one for name, one in named}
    drawn = {
        "collapse_against_lambda": figures.collapse_against_lambda(shown),
        "compare_against_epoch": figures.compare_against_epoch(shown),
    }
    if all((one["weight_decay"] > 0).any() for one in shown.values()):
        drawn["theory_against_lambda"] = theory_figures.theory_against_lambda(shown)
    if imbalance_figures.can_compare(shown):
        drawn["minority_against_ratio"] = imbalance_figures.minority_against_ratio(shown)
    return [_write(figure, folder / f"{name}.png") for name, figure in drawn.items()]


def _write(figure: "Figure", path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return path
