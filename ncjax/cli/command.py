"""Runs the commands of the package: their signals, streams, mistakes and exit codes, alike for all.

An entry point is this line. It stands above the command's imports, which can take seconds:

    command.run("ncjax.cli.show")
"""

import argparse
import gc
import importlib
import io
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

from ncjax.runs import signals

if TYPE_CHECKING:
    from ncjax.report.draw import Style

_WIDTHS = (2.0, 40.0)  # inches; a narrower figure has no room for its text


def run(module: str) -> NoReturn:
    """Calls `main` of a module and exits with what it returns.

    It exits with 130 and 143 where SIGINT and SIGTERM stopped it, and with 1 where all was done but
    standard output could not be written. A reader who leaves early (`| head`) is no error, and
    nobody's work is cut short for either.
    """
    # What imports and traces allocate lives on; looking for garbage in it took a tenth of a warm
    # start.
    gc.set_threshold(50_000)
    output = _open_streams()
    stops = signals.Stops()
    try:
        stops.begin()
        code = importlib.import_module(module).main()
        sys.stdout.flush()
        stops.end(code)
    except SystemExit as error:  # argparse, of --help and of mistakes
        code = error.code if isinstance(error.code, int) else 1
        sys.stdout.flush()
    except BaseException:
        if stops.noted is None:
            raise
        code = None  # whatever a library made of what it was stopped by
    if stops.noted and code != stops.noted.exit_code:
        code = stops.noted.exit_code
        print(f"stopped by {stops.noted}", file=sys.stderr, flush=True)
    if output.problem and not isinstance(output.problem, BrokenPipeError):
        code = code or 1
        print(
            f"error: standard output cannot be written ({output.problem.strerror})", file=sys.stderr
        )
    stops.end(code or 0)
    # Threads of libraries that were stopped in the middle crash while the interpreter shuts down.
    if stops.noted:
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Parses arguments and says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; --help lists the arguments\n")


def add_style(parser: argparse.ArgumentParser, figures: Sequence[str]) -> None:
    """Adds the flags that choose among figures, and their format."""
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        type=lambda given: _chosen(given, figures),
        default=(),
        help=f"these figures alone, separated by commas: {', '.join(figures)}",
    )
    parser.add_argument(
        "--format",
        choices=("png", "pdf", "svg"),
        help="of the figures (default: png)",
    )
    parser.add_argument(
        "--width",
        metavar="LENGTH",
        type=inches,
        help="of the figures, as in 3.25in or 8.5cm; text keeps its size",
    )
    parser.add_argument(
        "--style",
        choices=("paper", "talk"),
        help="paper: text of 8 points, for a page; talk: text of 12 and 14 points, heavier lines",
    )


def style_of(arguments: argparse.Namespace) -> "Style":
    """Returns what the flags of `add_style` ask for."""
    from ncjax.report.draw import Style

    return Style(arguments.only, arguments.format or "png", arguments.width, arguments.style or "")


def _chosen(given: str, figures: Sequence[str]) -> tuple[str, ...]:
    """Returns names of figures that are separated by commas, or raises argparse's error."""
    names = tuple(given.split(","))
    for name in names:
        if name not in figures:
            raise argparse.ArgumentTypeError(
                f"no figure is called {name!r}; choose among {', '.join(figures)}"
            )
    return names


def inches(length: str) -> float:
    """Returns the inches of a length such as 3.25in or 8.5cm, or raises argparse's error."""
    number, unit = length[:-2], length[-2:]
    try:
        found = float(number) * {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4}[unit]
    except (ValueError, KeyError):
        found = math.nan
    if not _WIDTHS[0] <= found <= _WIDTHS[1]:
        least, most = _WIDTHS
        reason = f"{length!r} is no length from {least:g}in to {most:g}in; write 3.25in or 8.5cm"
        raise argparse.ArgumentTypeError(reason)
    return found


def refuse(error: Exception) -> int:
    """Says what is wrong in one line, whatever a reader's message was; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


class _Stream(io.FileIO):
    """Writes to a standard stream and never fails: what cannot be written is dropped, and
    `problem` is the first reason.
    """

    problem: OSError | None = None

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            return memoryview(data).nbytes

    def as_text(self, replaced: TextIO | None) -> io.TextIOWrapper:
        """Encodes and buffers as the stream that it replaces; file names that are no text come
        out as they are.
        """
        encoding = getattr(replaced, "encoding", None) or "utf-8"
        is_unbuffered = getattr(replaced, "write_through", False)
        return io.TextIOWrapper(
            self if is_unbuffered else io.BufferedWriter(self),
            encoding=encoding,
            errors="surrogateescape" if encoding.lower().startswith("utf") else "backslashreplace",
            line_buffering=getattr(replaced, "line_buffering", False),
            write_through=is_unbuffered,
        )


def _open_streams() -> _Stream:
    """Makes both streams such as take everything, closed ones too; returns standard output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # A file of ours would be given this number, and what is meant for the stream.
            os.open(os.devnull, os.O_RDWR)
    output, errors = (_Stream(number, "w", closefd=False) for number in (1, 2))
    sys.stdout, sys.stderr = output.as_text(sys.stdout), errors.as_text(sys.stderr)
    return output
