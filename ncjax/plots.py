"""Writes figures. `python -m ncjax.plots WORKDIR...` redraws those of each run and lays several over one another."""

if __name__ == "__main__":
    from ncjax import cli

    cli.run("ncjax.plots")

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from ncjax import cli, figures, theory_figures
from ncjax import history as histories_on_disk
from ncjax.errors import InputError
from ncjax.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            if (one["relaxation_time"] > 0).any():
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


def draw_comparison(histories: dict[str, xr.Dataset], folder: Path) -> list[Path]:
    """Writes the figures that lay several runs over one another, every setting of each as one of them."""
    # Matplotlib takes dollars for mathematics.
    named = [
        (name.replace("$", r"\$"), one) for name, history in histories.items() for one in figures.settings(history)
    ]
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m ncjax.plots",
        description="Redraws WORKDIR/figures from WORKDIR/history.nc; several WORKDIRs are also compared.",
    )
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("--weight-decay", type=float, help="lambda whose budget is drawn (default: least NC3)")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder of the comparison (%(default)s)")
    arguments = parser.parse_args(argv)
    workdirs = list(dict.fromkeys(workdir.resolve() for workdir in arguments.workdirs))
    names = [workdir.name for workdir in workdirs]
    try:
        histories = [_load(workdir) for workdir in workdirs]
        written = [
            path
            for one, at in zip(histories, workdirs, strict=True)
            for path in draw_all(one, at / "figures", arguments.weight_decay)
        ]
        if len(workdirs) > 1:
            unique = [at.name if names.count(at.name) == 1 else str(at) for at in workdirs]
            written += draw_comparison(dict(zip(map(_legible, unique), histories, strict=True)), arguments.out)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a reader's message was
        return 2
    print(*written, sep="\n")
    return 0


def _legible(name: str) -> str:
    """Spells out the bytes of a file's name that no font can draw, since they are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()
