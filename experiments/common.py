"""What every experiment does: train configs through ncjax, keep their histories, print a table, save a figure."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr
from rich.table import Table

from configs import digits
from ncjax import experiment, history, preflight, report
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
    recorded = experiment.record(preflight.prepare(config, REPO / "runs" / "experiments" / variant))
    kept = (recorded if every_epoch else recorded.isel(epoch=[-1])).drop_vars(history.COSINES)
    HISTORIES.mkdir(exist_ok=True)
    path = HISTORIES / f"{variant}.nc"
    if not path.exists() or not history.load(path).equals(kept):  # the same numbers keep the file they have
        history.save(kept, path)
    return kept


def load(variant: str) -> xr.Dataset:
    """The history that `record` kept, or InputError."""
    path = HISTORIES / f"{variant}.nc"
    if not path.exists():
        raise InputError("history", str(path.relative_to(REPO)), "it was not trained yet; --train does")
    return history.load(path)


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


def relaxed_digits() -> dict[str, xr.Dataset]:
    """Digits trained to equilibrium at every lambda, in each of `SETTINGS`; shared by lemma1 and theorem."""
    common = {"train__epochs": 3000, "sweep__weight_decay": (1e-4, 3e-4, 1e-3, 3e-3), "sweep__seed": (0, 1)}
    return {
        name: record(f"digits_{name.replace(' ', '_')}", changed(digits.get_config(), **common, **fields))
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
