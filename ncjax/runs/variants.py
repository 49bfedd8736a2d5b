"""Finds the variants that a WORKDIR holds, and checks the history of all against theirs."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ncjax import variation
from ncjax.errors import InputError
from ncjax.storage import history, varied
from ncjax.variation import Label, Variation


class Variants(NamedTuple):
    """Describes a WORKDIR of variants.

    Attributes:
      workdir: the folder of all.
      variation: the fields that vary.
    """

    workdir: Path
    variation: Variation

    @property
    def folders(self) -> list[tuple[dict[str, Label], Path]]:
        """Returns the labels and the folder of every variant."""
        return [
            (labels, self.workdir / variation.folder_of(labels))
            for labels in self.variation.combinations()
        ]

    def find(self, coordinates: Mapping[str, Any]) -> tuple[dict[str, Label], Path, dict[str, Any]]:
        """Returns labels and folder of the one variant that coordinates name, and what is left of
        them, which names a run of its grid.

        Raises:
          InputError: there is no such variant, or there are several.
        """
        labels = self.variation.find(coordinates)
        rest = {name: at for name, at in coordinates.items() if name not in labels}
        return labels, self.workdir / variation.folder_of(labels), rest


def find(workdir: Path) -> Variants | None:
    """Returns the variants of a WORKDIR, by its config.json or else its history; None: none."""
    stored = _parsed(workdir / "config.json")
    if stored is None:
        with contextlib.suppress(InputError, OSError):
            stored = json.loads(history.load(workdir / "history.nc").attrs["config"])
    found = variation.from_stored(stored)
    return None if found is None else Variants(workdir, found)


def joined_problem(variants: Variants) -> str | None:
    """Returns what is wrong with the history of all variants; None: it is that of theirs."""
    path = variants.workdir / "history.nc"
    try:
        joined = history.load(path)
        own = [history.load(folder / "history.nc") for _, folder in variants.folders]
    except InputError as error:
        return str(error)
    names = variants.variation.labels
    if varied.dimensions(joined) != list(names) or any(
        joined[name].values.tolist() != labels for name, labels in names.items()
    ):
        return "history.nc is of other variants; `ncjax train` with its command mends it"
    expected = varied.join(own, names, joined.attrs["config"])
    if not joined.drop_attrs().identical(expected.drop_attrs()):
        return "history.nc is not that of its variants; `ncjax train` with its command mends it"
    return None


def _parsed(path: Path) -> Any:
    """Returns what a file holds as JSON; None where there is no such file, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
