"""Runs the command that stands first on the command line; no other is imported."""

import argparse
import importlib
import sys

import ncjax
from ncjax.cli import command

COMMANDS = {
    "train": "trains a sweep and measures collapse as it goes, or continues one",
    "plot": "draws the figures of runs again, or lays several runs over one another",
    "report": "writes one HTML file that explains a run, or compares several",
    "show": "says what a run holds; measures it again, exports its weights",
    "merge": "joins runs of one config, but for values of the axes of its grid",
    "measure": "measures collapse in features that any model has left in a file",
}


def main() -> int:
    """Runs one command line, that of this process; returns the exit code."""
    name = _parse(sys.argv[1:2])
    del sys.argv[1]
    return importlib.import_module(f"ncjax.cli.{name}").main()


def _parse(argv: list[str]) -> str:
    """Returns the name of a command."""
    commands = "\n".join(f"  {name:<10}{meaning}" for name, meaning in COMMANDS.items())
    parser = command.Parser(
        prog="ncjax",
        usage="ncjax COMMAND ...",
        description=ncjax.__doc__,
        epilog=f"commands:\n{commands}\n\nncjax COMMAND --help lists the arguments of a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ncjax {ncjax.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser.parse_args(argv).command
