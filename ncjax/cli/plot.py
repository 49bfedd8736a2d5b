"""Writes figures. `python -m ncjax.plots WORKDIR...` redraws those of each run and lays several over one another."""

if __name__ == "__main__":
    from ncjax.cli import command

    command.run("ncjax.plots")

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ncjax.cli import command
from ncjax.errors import InputError
from ncjax.report import figures, tables, theory_figures
from ncjax.storage import history as histories_on_disk
from ncjax.storage.files import expanded, make_folder, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@np.errstate(over="ignore")  # where weight decay spans 300 decades, ends of curves and axes leave float64
def draw_all(history: xr.Dataset, folder: Path, weight_decay: float | None = None) -> list[Path]:
    """Writes the figures of one run, one set per setting of the axes other than weight_decay and seed.

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
                "budget_against_epoch": theory_figures.budget_against_epoch(one, _budget_decay(one, weight_decay)),
            }
            if ((one["relaxation_time"] > 0) & np.isfinite(one["relaxation_time"])).any():
                drawn["collapse_against_clock"] = theory_figures.collapse_against_clock(one)
        written += [_write(figure, folder / f"{name}{suffix}.png") for name, figure in drawn.items()]
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
    """Writes the figures that lay several runs over one another, every setting of each as one of them."""
    named = [(name, one) for name, history in histories.items() for one in figures.settings(history)]
    shown = {", ".join([name, *figures.setting_words(one)]): one for name, one in named}
    drawn = {
        "collapse_against_lambda": figures.collapse_against_lambda(shown),
        "compare_against_epoch": figures.compare_against_epoch(shown),
    }
    if all((one["weight_decay"] > 0).any() for one in shown.values()):
        drawn["theory_against_lambda"] = theory_figures.theory_against_lambda(shown)
    return [_write(figure, folder / f"{name}.png") for name, figure in drawn.items()]


def _write(figure: "Figure", path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return path


def _load(workdir: Path) -> xr.Dataset:
    path = workdir / "history.nc"
    history = histories_on_disk.load(path)
    missing = histories_on_disk.missing(history)
    if missing:
        raise InputError("history", str(path), f"lacks {missing}; is it one of ncjax's?")
    return history


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m ncjax.plots",
        description="Redraws WORKDIR/figures from WORKDIR/history.nc; several WORKDIRs are also compared.",
    )
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("--weight-decay", type=float, help="lambda whose budget is drawn (default: least NC3)")
    where = "folder: of one WORKDIR's figures (default: its own), else of the comparison (default: figures)"
    parser.add_argument("--out", metavar="DIR", type=Path, help=where)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        given = (expanded("WORKDIR", workdir) for workdir in arguments.workdirs)
        workdirs = dict.fromkeys(Path(os.path.realpath(workdir)) for workdir in given)
        histories = {workdir: _load(workdir) for workdir in workdirs}
        if arguments.out is not None:
            arguments.out = expanded("--out", arguments.out)
            make_folder("--out", arguments.out)
        written = _draw(histories, arguments)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a reader's message was
        return 2
    console = tables.make_console()
    for path in written:
        tables.say(console, str(path))
    return 0


def _draw(histories: dict[Path, xr.Dataset], arguments: argparse.Namespace) -> list[Path]:
    """Draws one run into --out or its own folder; several each into its own folder, and compared into --out."""
    if len(histories) == 1 and arguments.out is not None:
        (history,) = histories.values()
        return draw_all(history, arguments.out, arguments.weight_decay)
    written = [
        path
        for workdir, history in histories.items()
        for path in draw_all(history, workdir / "figures", arguments.weight_decay)
    ]
    if len(histories) > 1:
        names = [workdir.name for workdir in histories]
        unique = [at.name if names.count(at.name) == 1 else str(at) for at in histories]
        written += draw_comparison(dict(zip(unique, histories.values(), strict=True)), arguments.out or Path("figures"))
    return written
