"""Prints a live line while a run trains, and tables and a verdict when it is done."""

import io
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ncjax.errors import printable
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.report import thinning
from ncjax.storage import varied
from ncjax.storage.history import RELAXED, class_sizes, extinct

if TYPE_CHECKING:
    import pandas as pd

# Columns of the final tables: heading, variable, and the selection of one number of it. Empty
# columns are left out.
_TRAIN, _TEST, _HEAD = {"split": "train"}, {"split": "test"}, {"layer": "head"}
_Columns = tuple[tuple[str, str, dict[str, str]], ...]
_COLLAPSE: _Columns = (
    ("train acc", "accuracy", _TRAIN),
    ("test acc", "accuracy", _TEST),
    ("nc1", "nc1", _TRAIN),
    ("nc2 equinorm", "nc2_equinorm_means", _TRAIN),
    ("nc2 equiangular", "nc2_equiangular_means", _TRAIN),
    ("nc3", "nc3", _TRAIN),
    ("nc3 centered", "nc3_centered", _TRAIN),
    ("nc4", "nc4", _TRAIN),
    ("epsilon", "epsilon", _TRAIN),
    ("delta", "delta", _TRAIN),
    ("head eq. residual", "equilibrium_residual", _HEAD),
    ("2 lambda t", "relaxation_time", {}),
)
_THEORY: _Columns = (
    ("epsilon", "epsilon", _TRAIN),
    ("of the UFM", "closed_form_epsilon", {}),
    ("nc3", "nc3", _TRAIN),
    ("floor", "nc3_floor", {}),
    ("of the UFM", "closed_form_nc3", {}),
    ("head norm^2", "weight_norm_sq", _HEAD),
    ("predicted", "predicted_head_norm_sq", {}),
    ("of the UFM", "closed_form_norm_sq", {}),
    ("theorem's error", "theorem_residual", {}),
    ("budget: theorem", "budget_theorem", {}),
    ("mean", "budget_mean", {}),
    ("asymmetry", "budget_asymmetry", {}),
    ("within", "budget_within", {}),
    ("gradient", "budget_gradient", {}),
)
_BOUNDS: _Columns = (
    ("nc1", "nc1", _TRAIN),
    ("at most", "nc1_bound", {}),
    ("nc2 (etf error)", "etf_error", _TRAIN),
    ("at most", "nc2_bound_etf", {}),
    ("asymmetry", "nc2_share_asymmetry", {}),
    ("scatter", "nc2_share_within", {}),
    ("gradient", "nc2_share_gradient", {}),
    ("outputs", "nc2_share_outputs", {}),
    ("nc3 at least", "nc3_floor", {}),
    ("nc3", "nc3", _TRAIN),
    ("at most", "nc3_bound", {}),
    ("nc4", "nc4", _TRAIN),
    ("at most", "nc4_bound", _TRAIN),
)
# A measure, its bound, and what share of the bound each cause has; the rest is the last cause's.
_CAUSES = (
    ("nc1", "nc1", "nc1_bound", {"scatter of outputs": "nc1_bound_outputs"}, "deviations"),
    (
        "nc2",
        "etf_error",
        "nc2_bound_etf",
        {
            "asymmetry": "nc2_share_asymmetry",
            "scatter": "nc2_share_within",
            "gradient": "nc2_share_gradient",
        },
        "outputs",
    ),
    ("nc3", "nc3", "nc3_bound", {}, ""),
    ("nc4", "nc4", "nc4_bound", {}, ""),
)
_MET = 1e-6  # relative error up to which a run has met its closed form
# Metrics that are left out once outputs are 0 up to rounding: they would seem perfect.
_OF_OUTPUTS = {
    "accuracy",
    *(name for name in VOCABULARY if name.startswith(("nc1", "nc2", "nc3", "nc4"))),
}


class Progress:
    """Shows progress: one live line on a terminal, elsewhere a plain line per measurement.

    Args:
      epochs: the number of epochs of the run.
      samples_per_epoch: the number of examples of an epoch, over all runs.
      quiet: whether nothing is shown.
    """

    def __init__(self, epochs: int, samples_per_epoch: int, quiet: bool = False):
        self._epochs, self._samples = epochs, samples_per_epoch
        self._seconds_per_epoch = float("nan")
        self._nc1 = "not measured yet"
        self._console = make_console(quiet)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        say(self._console, line)

    def trained(self, epoch: int, seconds_per_epoch: float) -> None:
        self._seconds_per_epoch = seconds_per_epoch
        if self._console.is_terminal:
            self._live.update(Text(self._line(epoch)), refresh=True)

    def measured(self, epoch: int, nc1: np.ndarray) -> None:
        finite = nc1[np.isfinite(nc1)]
        self._nc1 = (
            f"NC1 {finite.min():.2g} to {finite.max():.2g}"
            if finite.size
            else "NC1 undefined in every run"
        )
        if not self._console.is_terminal:
            self.say(self._line(epoch))

    def _line(self, epoch: int) -> str:
        if np.isnan(self._seconds_per_epoch):
            return f"epoch {epoch}/{self._epochs}  {self._nc1}"
        rate = 1 / self._seconds_per_epoch
        left = (self._epochs - epoch) * self._seconds_per_epoch
        return (
            f"epoch {epoch}/{self._epochs}  {rate:.3g} epochs/s  {rate * self._samples:,.0f} "
            "samples/s  "
            f"{duration(left)} left  {self._nc1}"
        )


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """Returns a console on standard output or standard error.

    It prints text without markup, because names of files, folders and data sets may hold `[/b]` or
    `:cat:`. If it is no terminal, it is wide, so that a log holds whole tables.

    Args:
      quiet: whether nothing is printed.
      stderr: whether to print on standard error.
    """
    if quiet:
        return Console(quiet=True, force_terminal=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is another type
        # In a locale that has no "±", "\xb1" is printed instead of an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(markup=False, emoji=False, stderr=stderr)
    if not console.is_terminal:
        console.width = 220
    return console


def say(console: Console, line: str) -> None:
    """Prints a line without markup, and without control characters in the names that it holds."""
    console.print(printable(line), highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def mean_and_sd(values: np.ndarray) -> str:
    """Formats mean±sd of the finite values.

    The sd has one digit, or two if the first is a 1. The mean ends at the same decimal place, or
    after four digits, or at its first digit.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return "-"
    mean, sd = float(finite.mean()), float(finite.std(ddof=1)) if finite.size > 1 else 0.0
    if sd <= 1e-6 * abs(mean):
        # The values are equal up to rounding, so the spread means nothing.
        return short_exponent(f"{mean:.3g}")
    more = int(f"{sd:e}"[0] == "1")
    place = _exponent(sd) - more
    kept = min(max(place, _exponent(mean) - 3), _exponent(mean)) if mean else place
    if 0 < abs(mean) < 1e-3:
        shown = f"{mean:.{max(_exponent(mean) - kept, 0)}e}±{sd:.{more}e}"
    else:
        spread = (
            f"{round(sd, -place):.{max(-place, 0)}f}" if kept == place else f"{sd:.{more + 1}g}"
        )
        shown = f"{round(mean, -kept):.{max(-kept, 0)}f}±{spread}"
    return short_exponent(shown)


def _exponent(number: float) -> int:
    """Returns the power of ten of a number's first digit."""
    return int(f"{number:e}".split("e")[1])


def _three_digits(value: float) -> str:
    return short_exponent(f"{value:.3g}")


def short_exponent(number: str) -> str:
    """Writes 1e-05 as 1e-5."""
    return number.replace("e-0", "e-").replace("e+0", "e")


def _settings(history: xr.Dataset) -> tuple[list[str], list[tuple]]:
    """Returns the names of the swept axes but seed, and every index into their values.

    The indices are in the order of the grid.
    """
    names = [str(d) for d in history["finite"].dims if d not in ("seed", "epoch")]
    shape = [history.sizes[name] for name in names]
    return names, list(np.ndindex(*shape))


def show_results(history: xr.Dataset, console: Console) -> None:
    """Prints collapse and then theory at the last measured epoch, followed by a verdict."""
    show_collapse(history, console)
    _show(
        history,
        console,
        _THEORY,
        "Measured beside predicted; the head's equilibrium budget, as shares of lambda W_L",
    )
    _show(
        history,
        console,
        _BOUNDS,
        "Measured beside proved bounds; the causes of nc2 as shares of its bound",
    )
    for variant in varied.split(history):
        lines = (*bounds(variant), *least(variant), *short(variant), *closed_form(variant))
        for line in lines:
            say(console, _of_variant(variant, line))


def show_collapse(history: xr.Dataset, console: Console) -> None:
    """Prints the table of measured collapse at the last epoch of a history."""
    seeds, epoch = history.sizes["seed"], int(history["epoch"][-1])
    spread = f"mean±sd over {seeds} seeds" if seeds > 1 else "one seed"
    _show(
        history, console, _COLLAPSE, f"Epoch {epoch}, training split unless test is named, {spread}"
    )
    for variant in varied.split(history):
        for line in degenerate(variant):
            say(console, _of_variant(variant, line))


def _of_variant(history: xr.Dataset, line: str) -> str:
    """Returns a line that says which variant it is about, if there are several."""
    return ": ".join(filter(None, [", ".join(varied.words(history)), line]))


def show_layers(one: xr.Dataset, names: Sequence[str], title: str, console: Console) -> None:
    """Prints metrics by layer: a row per metric, a column per layer, and what the metric is."""
    layers = [str(name) for name in one["layer"].values]
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    for layer in layers:
        table.add_column(printable(layer), justify="right")
    table.add_column("meaning")
    for name in names:
        values = [float(one[name].sel(layer=layer)) for layer in layers]
        cells = ["-" if np.isnan(value) else f"{value:.4g}" for value in values]
        table.add_row(name, *cells, printable(one[name].attrs["definition"]))
    console.print(table)


def show_by_class(frame: "pd.DataFrame", console: Console) -> None:
    """Prints a row per class, from `Measurement.by_class`."""
    table = Table(title="Classes: the rival has the nearest mean; the angle to it in degrees")
    for heading in ("class", *frame.columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, row in frame.iterrows():
        table.add_row(f"{label}", *(f"{value:.4g}" for value in row))
    console.print(table)


def as_latex(frame: "pd.DataFrame") -> str:
    """Returns a table as a LaTeX `tabular` with booktabs' rules, numbers with four digits."""
    headings = [frame.index.name or "", *frame.columns]
    rows = [[label, *row] for label, row in zip(frame.index, frame.to_numpy(), strict=True)]
    lines = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in (headings, *rows)]
    begin = rf"\begin{{tabular}}{{l{'r' * len(frame.columns)}}}"
    parts = [begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}", ""])


def _latex_cell(value: Any) -> str:
    if isinstance(value, str):
        return re.sub(r"([\\{}$&#%_^~])", _escaped, printable(value))
    number = float(value)
    if math.isnan(number):
        return "--"
    if math.isinf(number):
        return r"$\infty$" if number > 0 else r"$-\infty$"
    mantissa, _, exponent = f"{number:.4g}".partition("e")
    return rf"${mantissa} \times 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def _escaped(match: re.Match) -> str:
    words = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return words.get(match[0], f"\\{match[0]}")


def _show(history: xr.Dataset, console: Console, chosen: _Columns, title: str) -> None:
    """Prints a row of mean ± sd over seeds for each variant, weight decay and other setting.

    Of a large grid it prints a smaller one, and says so.
    """
    every = varied.split(history)
    variants = [_thinned(variant, max(2, thinning.MOST_ROWS // len(every))) for variant in every]
    shown, count = (sum(len(_settings(one)[1]) for one in part) for part in (variants, every))
    title = "; ".join(filter(None, [title, thinning.remark(shown, count, "rows")]))
    names = [*varied.dimensions(history), *_settings(variants[0])[0]]
    keys = [key for variant in variants for key in _keys(variant)]
    by_variant = [_cells(variant, chosen) for variant in variants]
    headings = ["finite runs", "put out", *(heading for heading, *_ in chosen)]
    seeds = history.sizes["seed"]
    telling_nothing = {"finite runs": f"{seeds} of {seeds}", "put out": f"0 of {seeds}"}
    columns = []
    for heading, *parts in zip(headings, *by_variant, strict=True):
        cells = [cell for part in parts for cell in part]
        if set(cells) != {telling_nothing.get(heading, "-")}:
            columns.append((heading, cells))
    for i, part in enumerate(_fit(columns, console.width - 14 * len(names))):
        table = Table(title=title if i == 0 else None)
        for name in names:
            table.add_column(
                "lambda" if name == "weight_decay" else name, justify="right", no_wrap=True
            )
        for heading, _ in part:
            table.add_column(heading, justify="right", no_wrap=True)
        for row, key in enumerate(keys):
            table.add_row(*key, *(cells[row] for _, cells in part))
            if len(variants) > 1 and (row + 1) % (len(keys) // len(variants)) == 0:
                table.add_section()
        console.print(table)


def _thinned(variant: xr.Dataset, most: int) -> xr.Dataset:
    """Returns a grid of at most so many settings out of those of a variant."""
    names, settings = _settings(variant)
    if len(settings) <= most:
        return variant
    return variant.isel(thinning.of_grid({name: variant.sizes[name] for name in names}, most))


def _keys(variant: xr.Dataset) -> list[list[str]]:
    """Returns the first cells of the rows of a variant: its labels, and the values of a setting."""
    names, settings = _settings(variant)
    labels = [printable(str(variant[name].item())) for name in varied.dimensions(variant)]
    return [
        labels + [f"{variant[n].values[i]:g}" for n, i in zip(names, index, strict=True)]
        for index in settings
    ]


def _cells(variant: xr.Dataset, chosen: _Columns) -> list[list[str]]:
    """Returns the cells of every column; first those of runs that are finite, and put out."""
    _, settings = _settings(variant)
    final, seeds = variant.isel(epoch=-1), variant.sizes["seed"]
    out = extinct(final)
    columns = [
        [f"{int(counted.values[index].sum())} of {seeds}" for index in settings]
        for counted in (final["finite"], out)
    ]
    for _, variable, select in chosen:
        values = final[variable].sel(select)
        values = values.where(~out) if variable in _OF_OUTPUTS else values
        columns.append([mean_and_sd(values.values[index]) for index in settings])
    return columns


def _fit(columns: Sequence[tuple[str, list[str]]], width: int) -> list[list[tuple[str, list[str]]]]:
    """Packs columns into as few tables as the width allows, with at least one column in each."""
    parts, used = [[]], 0
    for column in columns:
        needed = 3 + max(len(text) for text in (column[0], *column[1]))
        if parts[-1] and used + needed > width:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += needed
    return parts


def bounds(history: xr.Dataset) -> list[str]:
    """Returns lines on each measure's bound and causes, at the weight decay of least nc3."""
    final = history.isel(epoch=-1)
    final = final.where(~extinct(final))
    names, settings = _settings(history)
    nc3 = final["nc3"].sel(split="train").values
    bounded = [
        index
        for index in settings
        if np.isfinite(nc3[index] * final["nc2_bound_etf"].values[index]).any()
    ]
    if not bounded:
        return []
    best = min(bounded, key=lambda index: np.nanmean(nc3[index]))
    run = final.isel(dict(zip(names, best, strict=True)))
    where = ", ".join(f"{name} = {run[name].item():g}" for name in names)
    lines = [f"proved at {where.replace('weight_decay', 'lambda')}, means over seeds:"]
    for words, measured, bound, causes, last in _CAUSES:
        value, most = _mean(run, measured), _mean(run, bound)
        if np.isnan(most):
            continue
        line = f"  {words} {_three_digits(value)}, at most {_three_digits(most)}"
        shares = {cause: _mean(run, share) for cause, share in causes.items()}
        if shares and np.isfinite([*shares.values()]).all():
            shares[last] = 1 - sum(shares.values())
            line += ": " + ", ".join(f"{cause} {share:.0%}" for cause, share in shares.items())
        if words == "nc3":
            line += f", at least {_three_digits(_mean(run, 'nc3_floor'))} by its head"
        if words == "nc4" and (run[bound].sel(split="train") == 0).all():
            line += ": certified, every example is nearest to its own class mean"
        lines.append(line)
    return lines


def _mean(run: xr.Dataset, name: str) -> float:
    """Returns the mean over seeds, on the training split; NaN if it is undefined in all."""
    values = run[name].sel(_TRAIN) if "split" in run[name].dims else run[name]
    return float(values.astype(np.float64).mean())


def least(history: xr.Dataset, variables: Sequence[str] = ("nc1", "nc3")) -> list[str]:
    """Returns lines on where variables are least, and on their values without weight decay."""
    final = history.isel(epoch=-1).sel(split="train")
    alive = ~extinct(history.isel(epoch=-1))
    names, settings = _settings(history)
    lines = []
    for variable in variables:
        values = final[variable].where(alive).values
        finite = [index for index in settings if np.isfinite(values[index]).any()]
        if not finite:
            continue
        best = min(finite, key=lambda index: np.nanmean(values[index]))
        where = ", ".join(
            f"{n} = {history[n].values[i]:g}" for n, i in zip(names, best, strict=True)
        )
        line = (
            f"{variable} is least at {where.replace('weight_decay', 'lambda')}: "
            f"{mean_and_sd(values[best])}"
        )
        undecayed = [index for index in finite if history["weight_decay"].values[index[0]] == 0]
        if undecayed and undecayed[0] != best:
            zero = min(undecayed, key=lambda index: np.nanmean(values[index]))
            line += f", against {mean_and_sd(values[zero])} at lambda = 0"
            least_mean = np.nanmean(values[best])
            if least_mean > 0:
                line += f" ({np.nanmean(values[zero]) / least_mean:.1f} times as much)"
        lines.append(line)
    return lines


def degenerate(history: xr.Dataset) -> list[str]:
    """Returns lines on the numbers in the table of collapse that are misleading."""
    final = history.isel(epoch=-1)
    out, lines = extinct(final), []
    if out.any():
        lines.append(
            "put out: outputs are the same for every input; accuracy and nc1 to nc4 are of the "
            "other runs"
        )
    rank = min(
        history.sizes["label"] - 1, json.loads(history.attrs["config"])["model"]["widths"][-1]
    )
    lost = (final["nc1_rank"].sel(split="train", drop=True) < rank) & ~out
    if lost.any():
        where = f"{int(lost.sum())} runs at lambda = {_decays_where(lost)}"
        lines.append(
            f"nc1_rank is below {rank} in {where}: nc1 does not see directions in which class "
            "means are one"
        )
    sizes = class_sizes(history)
    if sizes.min() < sizes.max():
        lines.append(
            f"classes have {sizes.min()} to {sizes.max()} training examples: the theorem, the "
            "budget, predictions and closed forms are of classes of one size, and NaN"
        )
    if history.attrs["per_class"] == "1":
        lines.append(
            "one example in each class: nc1 and cdnv of the training split are 0 whatever is "
            "learned"
        )
    return lines


def _decays_where(condition: xr.DataArray) -> str:
    """Returns a list, as text, of the lambdas at which any run meets a condition."""
    met = condition.any([dim for dim in condition.dims if dim != "weight_decay"])
    decays = condition["weight_decay"].values[met.values]
    return thinning.abridged([f"{value:g}" for value in decays])


def short(history: xr.Dataset) -> list[str]:
    """Returns a line on the lambdas for which the run is too short, and on the epochs they need.

    The relaxation clock is proportional to the number of epochs.
    """
    final = history["relaxation_time"].isel(epoch=-1)
    epochs = int(history["epoch"][-1])
    elapsed = final.min([dim for dim in final.dims if dim != "weight_decay"])
    short = elapsed[(elapsed > 0) & (elapsed < RELAXED)]
    if not short.size:
        return []
    needed = [f"{math.ceil(epochs * RELAXED / value):,}" for value in short.values]
    needed[0] = f"the same schedule needs {needed[0]} epochs"
    decays = zip(short["weight_decay"].values, needed, strict=True)
    where = thinning.abridged([f"{decay:g} ({length})" for decay, length in decays])
    return [f"short of equilibrium (2 lambda t below {RELAXED:g}) at lambda = {where}"]


def closed_form(history: xr.Dataset) -> list[str]:
    """Returns a line on how many unconstrained-feature runs met their closed form, and how closely.

    It also names the lambdas at which runs did not.
    """
    final = history.isel(epoch=-1).sel(split="train")
    error = abs(final["epsilon"] / final["closed_form_epsilon"] - 1)
    exists, met = error.notnull(), error < _MET
    if not exists.any():
        return []
    errors = {
        "epsilon": error,
        "||W_L||^2": abs(
            final["weight_norm_sq"].sel(layer="head") / final["closed_form_norm_sq"] - 1
        ),
        "nc3 (absolute)": abs(final["nc3"] - final["closed_form_nc3"]),
    }
    line = (
        f"closed form: epsilon met to {_MET:g} by {int(met.sum())} of {int(exists.sum())} finite "
        "runs that have one"
    )
    if met.any():
        line += "; largest error of those: " + ", ".join(
            f"{name} {float(e.where(met).max()):.1g}" for name, e in errors.items()
        )
    elsewhere = exists & ~met
    if elsewhere.any():
        line += (
            f"; not by all at lambda = {_decays_where(elsewhere)}, where modes died or the run is "
            "short"
        )
    return [line]
