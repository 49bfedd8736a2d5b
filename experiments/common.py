"""What every experiment does: train configs through ncjax, keep their histories, print tables, save figures.

An experiment has `histories(source)`, which names its configs, and `tables(histories)`, which makes its tables of them.
Its command trains (`record`) and prints them; `python -m experiments.tables` reads what was kept (`load`) and compares
them with the READMEs.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rich.table
import xarray as xr

from configs import digits
from ncjax import config as configuration
from ncjax import experiment, history, preflight, report
from ncjax.config import Config
from ncjax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parents[1]
HISTORIES = REPO / "experiments" / "histories"

Source = Callable[..., xr.Dataset]  # `record` or `load`


class Table(NamedTuple):
    """A caption for the console, and the cells as they stand in a README."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Returns the table as Markdown."""
        headings, *rows = (f"| {' | '.join(row)} |" for row in (self.headings, *self.rows))
        return [headings, "|" + "---|" * len(self.headings), *rows]


def start(main: Callable[[], None], description: str | None) -> None:
    """An experiment takes no options: --help says what it does, anything else is refused before it trains."""
    name = Path(main.__code__.co_filename).parent.name
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(f"python -m experiments.{name}", None, description, formatter_class=formatter).parse_args()
    main()


def record(variant: str, config: Config, *, every_epoch: bool = False) -> xr.Dataset:
    """Trains a config in runs/experiments/VARIANT (continues or returns what is there).

    Keeps in HISTORIES what tables and figures are made from: the last epoch measured, unless all are asked for.
    """
    recorded = experiment.record(preflight.prepare(config, REPO / "runs" / "experiments" / variant))
    kept = (recorded if every_epoch else recorded.isel(epoch=[-1])).drop_vars(history.COSINES)
    HISTORIES.mkdir(exist_ok=True)
    path = HISTORIES / f"{variant}.nc"
    if not path.exists() or not history.load(path).equals(kept):  # the same numbers keep the file they have
        history.save(kept, path)
    return kept


def load(variant: str, config: Config, *, every_epoch: bool = False) -> xr.Dataset:
    """Returns the history that `record` kept with the same arguments, or raises InputError."""
    path = HISTORIES / f"{variant}.nc"
    name = str(path.relative_to(REPO))
    if not path.exists():
        raise InputError("history", name, "it was not trained yet; its experiment does that")
    kept = history.load(path)
    differences = configuration.differences(configuration.validate(config), json.loads(kept.attrs["config"]))
    if differences:
        raise InputError("history", name, f"{differences[0]}; its experiment trains it anew")
    return kept if every_epoch else kept.isel(epoch=[-1])


def changed(config: Config, **fields: object) -> Config:
    """The config with `section__field=value` set."""
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


# The three ways to meet the sum of the outputs: by the weights, by a free bias, not at all.
SETTINGS = {
    "no bias": {"model__head_bias": "none"},
    "free bias": {"model__head_bias": "free"},
    "centred targets": {"targets": "centered"},
}


def demo(source: Source) -> xr.Dataset:
    """Returns configs/digits.py over ten seeds, at every epoch measured; shared by digits and lemma2."""
    return source("digits", changed(digits.get_config(), sweep__seed=tuple(range(10))), every_epoch=True)


def relaxed_digits() -> dict[str, xr.Dataset]:
    """Digits trained to equilibrium at every lambda, in each of `SETTINGS`; shared by lemma1 and theorem."""
    common = {"train__epochs": 3000, "sweep__weight_decay": (1e-4, 3e-4, 1e-3, 3e-3), "sweep__seed": (0, 1)}
    return {
        name: record(f"digits_{name.replace(' ', '_')}", changed(digits.get_config(), **common, **fields))
        for name, fields in SETTINGS.items()
    }


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = rich.table.Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    report.make_console().print(table)


def print_tables(tables: Mapping[str, Table]) -> None:
    """Prints tables as a README holds them."""
    for table in tables.values():
        print("", table.caption, "", *table.lines(), "", sep="\n")


def number(value: float) -> str:
    """Formats a swept value: 1e-4, 0.01."""
    return np.format_float_scientific(value, trim="-", exp_digits=1) if 0 < value < 0.01 else f"{value:g}"


def over_seeds(values: xr.DataArray) -> str:
    """Formats mean ± sd."""
    return report.mean_and_sd(values.values).replace("±", " ± ")


def per_decay(values: xr.DataArray, *, least_in_bold: bool = False) -> list[str]:
    """Formats mean ± sd over seeds at every weight decay."""
    values = values.transpose("weight_decay", "seed")
    cells = [over_seeds(one) for one in values]
    if least_in_bold:
        least = int(values.mean("seed").values.argmin())
        cells[least] = f"**{cells[least]}**"
    return cells


def save(figure: "Figure", name: str, stem: str = "") -> None:
    path = REPO / "experiments" / name / f"{stem or name}.png"
    figure.savefig(path)
    print(f"figure: {path.relative_to(REPO)}")
