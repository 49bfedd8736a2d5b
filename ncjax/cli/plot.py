"""Writes figures. `ncjax plot WORKDIR...` redraws those of each run and lays several
over one another.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from ncjax.cli import command
from ncjax.errors import InputError
from ncjax.paths import expanded, make_folder
from ncjax.report import draw, tables
from ncjax.storage import history as histories
from ncjax.storage import monitored


def _load(workdir: Path) -> xr.Dataset:
    path = workdir / "history.nc"
    history = histories.read(path)
    if monitored.is_monitored(history):
        return history
    history = histories.checked(history, path)
    missing = histories.missing(history)
    if missing:
        raise InputError("history", str(path), f"lacks {missing}; is it one of ncjax's?")
    return history


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="ncjax plot",
        description="Redraws WORKDIR/figures from WORKDIR/history.nc; several WORKDIRs are also "
        "compared.",
    )
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="folder of a run")
    parser.add_argument(
        "--weight-decay",
        type=float,
        help="lambda whose budget and layers are drawn (default: least NC3)",
    )
    where = (
        "folder: of one WORKDIR's figures (default: its own), else of the comparison (default: "
        "figures)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help=where)
    command.add_style(parser, draw.FIGURES)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        given = (expanded("WORKDIR", workdir) for workdir in arguments.workdirs)
        workdirs = dict.fromkeys(Path(os.path.realpath(workdir)) for workdir in given)
        shown = {workdir: _load(workdir) for workdir in workdirs}
        if arguments.out is not None:
            arguments.out = expanded("--out", arguments.out)
            make_folder("--out", arguments.out)
        written = _draw(shown, arguments)
        if arguments.only and not written:
            way_out = "these WORKDIRs have none of it; leave it out to draw those that they have"
            raise InputError("--only", ",".join(arguments.only), way_out)
    except (InputError, OSError) as error:
        return command.refuse(error)
    console = tables.make_console()
    for path in written:
        tables.say(console, str(path))
    for workdir, history in shown.items():
        if not monitored.is_monitored(history) and (remark := draw.remark(history)):
            tables.say(console, f"{workdir.name}: {remark}")
    return 0


def _draw(shown: dict[Path, xr.Dataset], arguments: argparse.Namespace) -> list[Path]:
    """Draws one run into --out or its own folder; several each into its own folder, and compared
    into --out.
    """
    style = command.style_of(arguments)
    if len(shown) == 1 and arguments.out is not None:
        (history,) = shown.values()
        return _draw_one(history, arguments.out, arguments, style)
    written = [
        path
        for workdir, history in shown.items()
        for path in _draw_one(history, workdir / "figures", arguments, style)
    ]
    names = [workdir.name for workdir in shown]
    unique = {at: at.name if names.count(at.name) == 1 else str(at) for at in shown}
    # A model that a monitor follows has no axes of a sweep: each kind is compared on its own.
    for draw_kind, of_kind in ((draw.draw_comparison, False), (draw.draw_monitored, True)):
        compared = {
            unique[at]: history
            for at, history in shown.items()
            if monitored.is_monitored(history) == of_kind
        }
        if len(compared) > 1:
            written += draw_kind(compared, arguments.out or Path("figures"), style)
    return written


def _draw_one(
    history: xr.Dataset, folder: Path, arguments: argparse.Namespace, style: draw.Style
) -> list[Path]:
    if monitored.is_monitored(history):
        return draw.draw_monitored({"": history}, folder, style)
    return draw.draw_all(history, folder, arguments.weight_decay, style)
