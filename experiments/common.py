"""What every experiment does: train configs through ncjax, keep their histories, print a table, save a figure."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr
from rich.table import Table

from configs import digits
from ncjax import experiment, preflight, report
from ncjax import history as histories
from ncjax.config import Config
from ncjax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parents[1]
HISTORIES = REPO / "experiments" / "histories"


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
    history = experiment.record(preflight.prepare(config, REPO / "runs" / "experiments" / variant))
    kept = (history if every_epoch else history.isel(epoch=[-1])).drop_vars(histories.COSINES)
    HISTORIES.mkdir(exist_ok=True)
    path = HISTORIES / f"{variant}.nc"
    if not path.exists() or not histories.load(path).equals(kept):  # the same numbers keep the file they have
        histories.save(kept, path)
    return kept


def load(variant: str) -> xr.Dataset:
    """The history that `record` kept, or InputError."""
    path = HISTORIES / f"{variant}.nc"
    if not path.exists():
        raise InputError("history", str(path.relative_to(REPO)), "it was not trained yet; --train does")
    return histories.load(path)


def recorded(variant: str, config: Config, train: bool) -> xr.Dataset:
    """Returns the history of a config that is kept, or trains it."""
    return record(variant, config) if train else load(variant)


def changed(config: Config, **fields: object) -> Config:
    """The config with `section__field=value` set."""
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


SEEDS = (0, 1, 2, 3, 4)
# The three ways to meet the sum of the outputs: by the weights, by a free bias, not at all.
SETTINGS = {
    "no bias": {"model__head_bias": "none"},
    "free bias": {"model__head_bias": "free"},
    "centred targets": {"targets": "centered"},
}


def relaxed_digits(train: bool) -> dict[str, xr.Dataset]:
    """Digits trained to equilibrium at every lambda, in each of `SETTINGS`; shared by lemma1 and theorem."""
    common = {"train__epochs": 3000, "sweep__weight_decay": (1e-4, 3e-4, 1e-3, 3e-3), "sweep__seed": SEEDS}
    return {
        name: recorded(f"digits_{name.replace(' ', '_')}", changed(digits.get_config(), **common, **fields), train)
        for name, fields in SETTINGS.items()
    }


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    report.make_console().print(table)


def over_seeds(values: xr.DataArray) -> str:
    return report.mean_and_sd(values.values)


def save(figure: "Figure", name: str, stem: str = "") -> None:
    path = REPO / "experiments" / name / f"{stem or name}.png"
    figure.savefig(path)
    print(f"figure: {path.relative_to(REPO)}")
