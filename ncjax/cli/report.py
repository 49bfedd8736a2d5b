"""Writes one HTML file that explains a run, or compares several, and needs no network.

    ncjax report runs/digits
    ncjax report runs/digits runs/digits_bias --out compare.html

    ncjax report runs/digits --watch

A WORKDIR is of a sweep, finished or not, or of ncjax.Monitor. --watch writes nothing: it serves the
report to a browser on this machine, and renews it as measurements arrive, until Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import xarray as xr

from ncjax.cli import command
from ncjax.errors import InputError
from ncjax.paths import expanded
from ncjax.report import page, tables, watch
from ncjax.storage import history as histories
from ncjax.storage import monitored

_SUFFIXES = (".html", ".htm")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        given = (expanded("WORKDIR", workdir) for workdir in arguments.workdirs)
        workdirs = list(dict.fromkeys(Path(os.path.realpath(workdir)) for workdir in given))
        if arguments.watch:
            _watch(arguments.out, workdirs)
        out = _out(arguments.out, workdirs)
        _write(_sources(workdirs), out)
    except (InputError, OSError) as error:
        return command.refuse(error)
    tables.say(tables.make_console(), str(out))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="ncjax report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the report (default: WORKDIR/report.html; of several WORKDIRs, compare.html)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the report to a browser on this machine; Ctrl-C ends it",
    )
    return parser.parse_args(argv)


def _out(given: Path | None, workdirs: list[Path]) -> Path:
    """Returns the file to write, or raises InputError where it is none of a report."""
    if given is None:
        return workdirs[0] / page.FILE if len(workdirs) == 1 else Path("compare.html")
    out = expanded("--out", given)
    if out.suffix.lower() not in _SUFFIXES:
        raise InputError("--out", str(given), f"its name must end in {' or '.join(_SUFFIXES)}")
    if out.is_dir():
        raise InputError("--out", str(given), "it is a folder; name a file in it")
    return out


def _watch(out: Path | None, workdirs: list[Path]) -> NoReturn:
    """Serves the report until a signal ends the command."""
    if out is not None:
        raise InputError("--out", str(out), "--watch writes no file; leave one of them out")
    for workdir in workdirs:
        if not workdir.is_dir():
            raise InputError("WORKDIR", str(workdir), "no such folder; begin to train first")
    files = [workdir / "history.nc" for workdir in workdirs]
    with watch.Server(files, lambda: _sources(workdirs)) as server:
        tables.say(tables.make_console(), f"{server.address} shows it until Ctrl-C")
        sys.stdout.flush()
        while True:
            server.serve_forever()


def _write(sources: list[page.Source], out: Path) -> None:
    try:
        page.write(sources, out)
    except OSError as error:
        way_out = f"it cannot be written ({error.strerror}); name another file by --out"
        raise InputError("report", str(out), way_out) from error


def _sources(workdirs: list[Path]) -> list[page.Source]:
    names = [workdir.name for workdir in workdirs]
    return [
        page.describe(
            workdir, _load(workdir), "" if names.count(workdir.name) == 1 else str(workdir)
        )
        for workdir in workdirs
    ]


def _load(workdir: Path) -> xr.Dataset:
    if workdir.is_file():
        raise InputError("WORKDIR", str(workdir), "it is a file; name the folder of a run")
    path = workdir / "history.nc"
    history = histories.read(path)
    if monitored.is_monitored(history):
        return history
    history = histories.checked(history, path)
    if lacking := {"nc1", "accuracy"} - set(history):
        raise InputError("history", str(path), f"lacks {min(lacking)}; is it one of ncjax's?")
    return history
