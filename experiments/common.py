"""What every experiment does: train configs through ncjax, keep their histories, print tables, save
figures.

An experiment has `histories(train)`, which trains its configs or reads what was kept of them, and
`tables(histories)`, which makes its tables of that. Its command prints them; `python -m
experiments.tables` compares them with the READMEs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from configs import digits
from ncjax import api, variation
from ncjax import config as configuration
from ncjax.config import Config
from ncjax.errors import InputError
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.report import tables as report
from ncjax.runs.signals import Interrupted
from ncjax.storage import history

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

REPO = Path(__file__).resolve().parents[1]
HISTORIES = REPO / "experiments" / "histories"


# What `history.load` expects of every history.
_LASTING = ("finite", "loss", "accuracy", "nc1", "nc3", "nc4", "epsilon", "weight_norm_sq")
# Numbers by class take as much room as all others together.
NOT_BY_CLASS = tuple(name for name, metric in VOCABULARY.items() if "label" not in metric.dims)


class Table(NamedTuple):
    """A caption for the console, and the cells as they stand in a README."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Returns the table as Markdown."""
        headings, *rows = (f"| {' | '.join(row)} |" for row in (self.headings, *self.rows))
        return [headings, "|" + "---|" * len(self.headings), *rows]


def start(main: Callable[[bool], None], description: str | None) -> None:
    """Runs an experiment's command: with --train it trains, else it reads the histories."""
    name = Path(main.__code__.co_filename).parent.name
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"python -m experiments.{name}", None, description, formatter_class=formatter
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="train in runs/experiments, instead of reading histories/",
    )
    train = parser.parse_args().train
    run(lambda: main(train))


def run(work: Callable[[], None]) -> None:
    """Does the work of a command; bad input and a signal in training end it with one line."""
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        print(f"stopped by {stop}; the same command continues", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None


def record(
    variant: str,
    config: Config,
    *,
    every_epoch: bool = False,
    variables: Sequence[str] = (),
    vary: Mapping[str, Sequence] | None = None,
) -> xr.Dataset:
    """Trains a config in runs/experiments/VARIANT (continues or returns what is there).

    Keeps in HISTORIES what tables and figures are made from: the last epoch measured, unless all
    are asked for, and every variable, unless some are named. `vary` is that of `ncjax.train`.
    """
    measured = api.train(config, REPO / "runs" / "experiments" / variant, vary=vary)
    kept = (measured if every_epoch else measured.isel(epoch=[-1])).drop_vars(history.COSINES)
    if variables:
        kept = kept[sorted({*variables, *_LASTING})].assign_coords(kept.coords)
    HISTORIES.mkdir(exist_ok=True)
    path = HISTORIES / f"{variant}.nc"
    if not path.exists() or not history.read(path).equals(kept):
        # The same numbers keep the file they have.
        history.save(kept, path)
    return kept


def load(
    variant: str,
    config: Config,
    *,
    every_epoch: bool = False,
    vary: Mapping[str, Sequence] | None = None,
) -> xr.Dataset:
    """Returns the history that `record` kept with the same arguments, or raises InputError."""
    path = HISTORIES / f"{variant}.nc"
    name = str(path.relative_to(REPO))
    if not path.exists():
        raise InputError("history", name, "it was not trained yet; --train does")
    kept = history.load(path)
    stored = json.loads(kept.attrs["config"])
    varied = variation.make(vary or {})
    if stored.pop("vary", {}) != json.loads(json.dumps(dict(varied.values))):
        raise InputError("history", name, "it is of other variants; --train trains them")
    first = variation.make_variants(config, varied)[0].config
    differences = configuration.differences(first, stored)
    if differences:
        raise InputError("history", name, f"{differences[0]}; --train trains it anew")
    return kept if every_epoch else kept.isel(epoch=[-1])


def recorded(
    variant: str,
    config: Config,
    train: bool,
    *,
    every_epoch: bool = False,
    variables: Sequence[str] = (),
    vary: Mapping[str, Sequence] | None = None,
) -> xr.Dataset:
    """Returns the history of a config that was kept, or trains it."""
    if train:
        return record(variant, config, every_epoch=every_epoch, variables=variables, vary=vary)
    return load(variant, config, every_epoch=every_epoch, vary=vary)


def changed(config: Config, **fields: object) -> Config:
    """The config with `section__field=value` set."""
    config.update({name.replace("__", "."): value for name, value in fields.items()})
    return config


# The three ways to meet the sum of the outputs: by the weights, by a free bias, not at all.
SETTINGS = {
    "no bias": {"model__head_bias": "none"},
    "free bias": {"model__head_bias": "free"},
    "centred targets": {"targets": "centered"},
}

# Runs of a thousand epochs and more; the demo has ten seeds.
SEEDS = (0, 1, 2, 3, 4)


def demo(train: bool) -> xr.Dataset:
    """Returns configs/digits.py over ten seeds, at every epoch measured; shared by digits and
    lemma2.
    """
    config = changed(digits.get_config(), sweep__seed=tuple(range(10)))
    return recorded("digits", config, train, every_epoch=True, variables=NOT_BY_CLASS)


def relaxed_digits(train: bool) -> dict[str, xr.Dataset]:
    """Digits, the head near equilibrium at every lambda, in each of `SETTINGS`; shared by lemma1
    and theorem.
    """
    common = {
        "train__epochs": 3000,
        "sweep__weight_decay": (1e-4, 3e-4, 1e-3, 3e-3),
        "sweep__seed": SEEDS,
    }
    return {
        name: recorded(
            f"digits_{name.replace(' ', '_')}",
            changed(digits.get_config(), **common, **fields),
            train,
        )
        for name, fields in SETTINGS.items()
    }


def print_tables(tables: Mapping[str, Table]) -> None:
    """Prints tables as a README holds them."""
    for table in tables.values():
        print("", table.caption, "", *table.lines(), "", sep="\n")


def number(value: float) -> str:
    """Formats a swept value: 1e-4, 0.01."""
    value = float(f"{value:g}")
    return (
        np.format_float_scientific(value, trim="-", exp_digits=1)
        if 0 < value < 0.01
        else f"{value:g}"
    )


def over_seeds(values: xr.DataArray) -> str:
    """Formats mean ± sd."""
    return report.mean_and_sd(values.values).replace("±", " ± ")


def sum_of_rows(run: xr.Dataset) -> xr.DataArray:
    """Returns ||1^T W_L||^2/||W_L||^2, from the floor of NC3: 1 for an orthogonal frame, 0 for a
    simplex ETF.
    """
    return run.sizes["label"] * (1 - (1 - run["nc3_floor"] / 2) ** 2)


def per_decay(values: xr.DataArray, *, least_in_bold: bool = False) -> list[str]:
    """Formats mean ± sd over seeds at every weight decay."""
    values = values.transpose("weight_decay", "seed")
    cells = [over_seeds(one) for one in values]
    if least_in_bold:
        least = int(values.mean("seed").values.argmin())
        cells[least] = f"**{cells[least]}**"
    return cells


def by_decay(
    caption: str,
    final: xr.Dataset,
    chosen: Mapping[str, tuple[str, Mapping[str, str]]],
    *,
    least_in_bold: bool = False,
) -> Table:
    """Returns a row for every weight decay.

    Args:
      chosen: by heading, a variable and what selects one number a run of it.
      least_in_bold: in columns of collapse, whose headings begin with nc.
    """
    columns = [
        per_decay(
            final[variable].sel(select), least_in_bold=least_in_bold and heading.startswith("nc")
        )
        for heading, (variable, select) in chosen.items()
    ]
    decays = [number(decay) for decay in final["weight_decay"].values]
    headings = (f"lambda (n = {final.sizes['seed']})", *chosen)
    return Table(caption, headings, list(zip(decays, *columns, strict=True)))


def legend_line(label: str, **look: Any) -> "Line2D":
    """Returns what a legend shows of lines or marks of this look."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def save(figure: "Figure", name: str, stem: str = "") -> None:
    path = REPO / "experiments" / name / f"{stem or name}.png"
    figure.savefig(path)
    print(f"figure: {path.relative_to(REPO)}")
