"""The one exception that means "the user can fix this"; a command prints it as a single line and
exits with 2.
"""

import sys
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: names the field, the value it had, and the way out."""

    def __init__(self, field: str, value: object, way_out: str):
        super().__init__(printable(_one_line(f"{field}: got {_shown(value)}; {way_out}")))


def listed(values: Iterable[float | int]) -> str:
    """Numbers as a message lists them."""
    return ", ".join(f"{value:.10g}" for value in values) or "none"


def warn(line: str) -> None:
    """Says on stderr what went otherwise than asked for, and well."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    r"""Returns a text that is one line and can be encoded: a name may hold `\n`, ESC, or bytes
    that are not UTF-8.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def last_line(error: BaseException) -> str:
    """What went wrong, without the traceback that some libraries put into their messages."""
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
