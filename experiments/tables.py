"""Compares every table of results in the documents with the histories kept here, cell by cell.

    python -m experiments.tables            # exits with 1 where a cell differs
    python -m experiments.tables --write    # writes what differs

The line above a table says where it is from: `<!-- table: digits.collapse -->` is what
experiments/digits computes by that name; `<!-- not from histories: REASON -->` is left alone. A
table without such a line counts as different.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from itertools import zip_longest
from typing import NamedTuple

from experiments import common
from ncjax.errors import InputError

DOCUMENTS = ("*.md", "docs/**/*.md", "experiments/**/*.md", "benchmarks/**/*.md")
_COMPUTED = re.compile(r"<!-- table: (\w+)\.(\w+) -->")
_EXEMPT = re.compile(r"<!-- not from histories: \S.* -->")
_RULE = re.compile(r"\s*\|?(\s*:?-+:?\s*\|)+(\s*:?-+:?\s*)?")


class Finding(NamedTuple):
    """What was found of a table: the line it begins at, its name, and a sentence for each cell
    that differs.
    """

    line: int
    name: str
    cells: int
    differences: list[str]


def check(text: str) -> tuple[list[Finding], str]:
    """Compares the tables of a Markdown text with the computed ones; returns what was found, and
    the text corrected.
    """
    lines = text.splitlines()
    findings, corrected, done = [], [], 0
    for first, last in _spans(lines):
        marker = lines[first - 1].strip() if first else ""
        if match := _COMPUTED.fullmatch(marker):
            computed = _compute(*match.groups()).lines()
            cells, differences = _compare(_grid(lines[first:last]), _grid(computed))
            findings.append(Finding(first + 1, ".".join(match.groups()), cells, differences))
            corrected += [*lines[done:first], *computed]
            done = last
        elif not _EXEMPT.fullmatch(marker):
            findings.append(
                Finding(
                    first + 1,
                    "no marker",
                    0,
                    ["the line above does not say where the table is from"],
                )
            )
    return findings, "\n".join([*corrected, *lines[done:], ""])


def _spans(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yields where each table begins, at the line above its rule, and where it ends."""
    for rule in (i for i, line in enumerate(lines) if i and _RULE.fullmatch(line)):
        last = rule
        while last < len(lines) and "|" in lines[last]:
            last += 1
        yield rule - 1, last


def _compute(experiment: str, name: str) -> common.Table:
    try:
        return _compute_all(experiment)[name]
    except (ModuleNotFoundError, KeyError) as error:
        raise InputError(
            "table", f"{experiment}.{name}", "no experiment computes it; correct its marker"
        ) from error


@cache
def _compute_all(experiment: str) -> dict[str, common.Table]:
    module = import_module(f"experiments.{experiment}.__main__")
    return module.tables(module.histories(train=False))


def _grid(table: list[str]) -> list[list[str]]:
    """Returns the cells of a table, without its rule."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table]
    return [rows[0], *rows[2:]]


def _compare(found: list[list[str]], computed: list[list[str]]) -> tuple[int, list[str]]:
    """Counts the cells of either table, and says which differ."""
    cells, differences = 0, []
    for row, (theirs, ours) in enumerate(zip_longest(found, computed, fillvalue=[])):
        for column, (old, new) in enumerate(zip_longest(theirs, ours, fillvalue="nothing")):
            cells += 1
            if old != new:
                differences.append(
                    f"row {row} ({(ours or theirs)[0]}), column {column}: {old}; computed: {new}"
                )
    return cells, differences


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m experiments.tables", description="Compares the documents' tables."
    )
    parser.add_argument(
        "--write", action="store_true", help="write the computed tables into the documents"
    )
    write = parser.parse_args(argv).write
    cells = wrong = 0
    try:
        for path in (path for pattern in DOCUMENTS for path in sorted(common.REPO.glob(pattern))):
            findings, corrected = check(path.read_text())
            if write:
                path.write_text(corrected)
                findings, _ = check(corrected)
            for found in findings:
                count = len(found.differences)
                print(
                    f"{path.relative_to(common.REPO)}:{found.line} {found.name}: {found.cells} "
                    f"cells, {count} differ"
                )
                print(*(f"    {line}\n" for line in found.differences), sep="", end="")
                cells, wrong = cells + found.cells, wrong + count
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{cells} cells compared, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
