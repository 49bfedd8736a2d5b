"""Joins sweeps. `ncjax merge A B --out C` writes WORKDIRs of one config, but for values of the axes
of its grid, into a new one that a single command might have trained.

Every run of the grid of all values must be in one of them, and in no other. Wall times are not
kept. Exit codes: 0; 2: bad input.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ncjax import environment
from ncjax.cli import command
from ncjax.errors import InputError
from ncjax.paths import expanded, make_folder
from ncjax.report import tables


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="ncjax merge", description=__doc__)
    parser.add_argument("workdirs", metavar="WORKDIR", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the new WORKDIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    arguments = _parse(argv)
    try:
        workdirs = [expanded("WORKDIR", workdir) for workdir in arguments.workdirs]
        out = expanded("--out", arguments.out)
        if len(workdirs) < 2:
            raise InputError("WORKDIR", str(workdirs[0]), "name two or more")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError("--out", str(out), "it is not empty; name a new folder")
        make_folder("--out", out)
        environment.import_jax()
        from ncjax.runs import merge

        grid = merge.merge(workdirs, out)
    except (InputError, OSError) as error:
        return command.refuse(error)
    sizes = " x ".join(f"{len(values)} {name}" for name, values in grid.dim_values.items())
    tables.say(tables.make_console(), f"{out} holds {grid.size} runs ({sizes})")
    return 0
