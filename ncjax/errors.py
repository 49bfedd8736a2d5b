"""The exception for what the user can fix, and how a message shows values and names.

A command prints an `InputError` as a single line and exits with 2.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import Any, get_args


class InputError(ValueError):
    """Reports bad input in one line: the field, the value it had, and the way out.

    It is a `ValueError`. A command prints it and exits with 2.

    Examples:
      >>> import ncjax
      >>> ncjax.metrics.nc1([[1.0], [2.0]], [0, 2])
      Traceback (most recent call last):
      ncjax.errors.InputError: labels: got 'no example of class 1'; every class needs ...
    """

    def __init__(self, field: str, value: object, way_out: str):
        super().__init__(printable(_one_line(f"{field}: got {_shown(value)}; {way_out}")))


def unknown_choice(field: str, value: object, literal: Any) -> InputError:
    """Returns the error for a value that is none of a Literal's."""
    return InputError(field, value, f"must be one of {', '.join(get_args(literal))}")


def near(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with the known names that are like one, or nothing."""
    like = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(like)}?" if like else ""


def listed(values: Iterable[float | int]) -> str:
    """Returns numbers as a message lists them."""
    return ", ".join(f"{value:.10g}" for value in values) or "none"


def warn(line: str) -> None:
    """Prints a warning on stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    r"""Returns a text with everything escaped that is not printable.

    A file name may hold `\n`, ESC, or bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def last_line(error: BaseException) -> str:
    """Returns the last line of a message: some libraries put a traceback above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python spells out no integer of more than 4,300 digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())
