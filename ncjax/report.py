"""What a run says: a live line while it trains, a table and a verdict when it is done."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

# Columns of the final table: heading, variable, what selects one number of it.
_COLUMNS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("train acc", "accuracy", {"split": "train"}),
    ("test acc", "accuracy", {"split": "test"}),
    ("nc1", "nc1", {"split": "train"}),
    ("nc2 equinorm", "nc2_equinorm_means", {"split": "train"}),
    ("nc2 equiangular", "nc2_equiangular_means", {"split": "train"}),
    ("nc3", "nc3", {"split": "train"}),
    ("nc3 centered", "nc3_centered", {"split": "train"}),
    ("nc4", "nc4", {"split": "train"}),
    ("epsilon", "epsilon", {"split": "train"}),
    ("delta", "delta", {"split": "train"}),
    ("head eq. residual", "equilibrium_residual", {"layer": "head"}),
    ("2 lambda t", "relaxation_time", {}),
)


class Progress:
    """One live line on a terminal; elsewhere a plain line per measurement."""

    def __init__(self, epochs: int, samples_per_epoch: int):
        self._epochs, self._samples = epochs, samples_per_epoch
        self._seconds_per_epoch = float("nan")
        self._nc1 = "not measured yet"
        self._console = make_console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def trained(self, epoch: int, seconds_per_epoch: float) -> None:
        self._seconds_per_epoch = seconds_per_epoch
        if self._console.is_terminal:
            self._live.update(Text(self._line(epoch)), refresh=True)

    def measured(self, epoch: int, nc1: np.ndarray) -> None:
        finite = nc1[np.isfinite(nc1)]
        self._nc1 = f"NC1 {finite.min():.2g} to {finite.max():.2g}" if finite.size else "NC1 undefined in every run"
        if not self._console.is_terminal:
            self.say(self._line(epoch))

    def _line(self, epoch: int) -> str:
        if np.isnan(self._seconds_per_epoch):
            return f"epoch {epoch}/{self._epochs}  {self._nc1}"
        rate = 1 / self._seconds_per_epoch
        left = (self._epochs - epoch) * self._seconds_per_epoch
        return (
            f"epoch {epoch}/{self._epochs}  {rate:.3g} epochs/s  {rate * self._samples:,.0f} samples/s  "
            f"{_duration(left)} left  {self._nc1}"
        )


def make_console() -> Console:
    """Standard output; wide where nobody looks at it, so that a log holds whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=220)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _mean_and_sd(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "-"
    mean, sd = finite.mean(), finite.std(ddof=1) if finite.size > 1 else 0.0
    # Equal up to rounding: there is no spread to speak of.
    return f"{mean:.3g}±{sd:.1g}" if sd > 1e-6 * abs(mean) else f"{mean:.3g}"


def _settings(history: xr.Dataset) -> tuple[list[str], list[tuple]]:
    """The swept axes but for the seeds, and every combination of their values, in the order of the grid."""
    names = [str(d) for d in history["finite"].dims if d not in ("seed", "epoch")]
    shape = [history.sizes[name] for name in names]
    return names, list(np.ndindex(*shape))


def show_results(history: xr.Dataset, console: Console) -> None:
    """One row per weight decay (and other swept setting): mean ± sd over seeds, at the last epoch measured."""
    names, settings = _settings(history)
    final = history.isel(epoch=-1)
    seeds, epoch = history.sizes["seed"], int(final["epoch"])
    keys = [[f"{history[n].values[i]:g}" for n, i in zip(names, index, strict=True)] for index in settings]
    columns = []
    for heading, variable, select in _COLUMNS:
        cells = [_mean_and_sd(final[variable].sel(select).values[index]) for index in settings]
        columns.append((heading, cells))
    runs = [int(final["finite"].values[index].sum()) for index in settings]
    if min(runs) < seeds:
        columns.insert(0, ("finite runs", [f"{count} of {seeds}" for count in runs]))
    spread = f"mean±sd over {seeds} seeds" if seeds > 1 else "one seed"
    for i, part in enumerate(_fit(columns, console.width - 14 * len(names))):
        table = Table(title=f"Epoch {epoch}, training split unless test is named, {spread}" if i == 0 else None)
        for name in names:
            table.add_column("lambda" if name == "weight_decay" else name, justify="right", no_wrap=True)
        for heading, _ in part:
            table.add_column(heading, justify="right", no_wrap=True)
        for row, key in enumerate(keys):
            table.add_row(*key, *(cells[row] for _, cells in part))
        console.print(table)
    console.print(_verdict(history), highlight=False, soft_wrap=True)


def _fit(columns: Sequence[tuple[str, list[str]]], width: int) -> list[list[tuple[str, list[str]]]]:
    """Columns packed into as few tables as the width allows, at least one column each."""
    parts, used = [[]], 0
    for column in columns:
        needed = 3 + max(len(text) for text in (column[0], *column[1]))
        if parts[-1] and used + needed > width:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += needed
    return parts


def _verdict(history: xr.Dataset) -> str:
    """Where nc1 and nc3 are least, and what they are without weight decay."""
    final = history.isel(epoch=-1).sel(split="train")
    names, settings = _settings(history)
    lines = []
    for variable in ("nc1", "nc3"):
        values = final[variable].values
        finite = [index for index in settings if np.isfinite(values[index]).any()]
        if not finite:
            continue
        best = min(finite, key=lambda index: np.nanmean(values[index]))
        where = ", ".join(f"{n}={history[n].values[i]:g}" for n, i in zip(names, best, strict=True))
        line = f"{variable} is least at {where.replace('weight_decay', 'lambda')}: {_mean_and_sd(values[best])}"
        undecayed = [index for index in finite if history["weight_decay"].values[index[0]] == 0]
        if undecayed and undecayed[0] != best:
            zero = min(undecayed, key=lambda index: np.nanmean(values[index]))
            ratio = np.nanmean(values[zero]) / np.nanmean(values[best])
            line += f"; {_mean_and_sd(values[zero])} at lambda=0, {ratio:.1f} times as much"
        lines.append(line)
    return "\n".join(lines)
