"""How seconds and memory grow with runs, width, depth, N, C and the layers that are measured.

    python -m benchmarks.growth # a table, benchmarks/results/growth.json, docs/benchmark_growth.png
    python -m benchmarks.growth --only runs host # these anew, the others as they are in growth.json
    python -m benchmarks.growth --quick # half a minute, writes nothing: does it still work?

One size varies at a time (`QUANTITIES`); all others stay as they are in its base. Of every size:
seconds to compile, of an epoch of training and of a measurement (medians of rounds that take turns
over the sizes), and what XLA says a device needs of memory. `host` is what no device does: a tiny
grid of 16, 256 and 2,000 runs, each in a process of its own, is trained from its config to its
report, and every stage is timed. An exponent is the slope of least squares between logarithms over
the upper half of a range: 1 is linear, 0 costs nothing.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Watch
from ncjax.cli import plot, report, show
from ncjax.config import Config, default_config
from ncjax.plan import prepare
from ncjax.report import tables
from ncjax.runs import listeners, loop
from ncjax.storage import history
from ncjax.training import parallel
from ncjax.training.sweep import Sweep

REPO = Path(__file__).resolve().parents[1]
ROUNDS = 5
_CALL_SECONDS = 0.1
MEASURED = ("compile_s", "epoch_s", "measurement_s", "bytes")


class Size(NamedTuple):
    """A sweep of MLPs without biases on `examples` synthetic ones in R^32."""

    runs: int = 2
    width: int = 64
    depth: int = 2  # hidden layers
    examples: int = 2000
    classes: int = 10
    batch: int = 64
    layers: bool = False  # log.layers

    @property
    def config(self) -> Config:
        config = default_config()
        config.data.name, config.data.num_classes = "synthetic", self.classes
        config.data.per_class = self.examples // self.classes
        config.model.widths = (self.width,) * self.depth
        config.train.batch_size, config.log.layers = self.batch, self.layers
        config.sweep.seed = tuple(range(self.runs))
        return config


TINY = Size(1, 8, 2, 80, 4, 20)
# What varies, over which values, from which base.
QUANTITIES: dict[str, tuple[str, tuple[int, ...], Size]] = {
    "runs": ("runs", (1, 4, 16, 64, 256, 1024, 4096), TINY),
    "width": ("width", (64, 128, 256, 512, 1024, 2048), Size(examples=500)),
    "depth": ("depth", (2, 4, 8, 16), Size()),
    "depth, log.layers": ("depth", (2, 4, 8, 16), Size(layers=True)),
    "N": ("examples", (400, 1600, 6400, 25_600, 102_400), Size()),
    "C": ("classes", (4, 8, 16, 32, 64, 128, 256), Size(width=256, examples=1024)),
}
# Weight decays, learning rates and seeds of a grid of so many runs.
HOST = {16: (4, 1, 4), 256: (8, 2, 16), 2000: (20, 5, 20)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns b of values ~ sizes^b over the upper half of the sizes, which ascend; NaN of one."""
    if len(sizes) < 2:
        return math.nan
    upper = slice((len(sizes) - 1) // 2, None)
    slope, _ = np.polyfit(np.log(sizes[upper]), np.log(values[upper]), 1)
    return float(slope)


# What devices do


def compiled(size: Size) -> Sweep:
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(prepare(size.config, folder))
    sweep.compile()
    sweep.advance(1, measured=True)
    return sweep


def time_sizes(sizes: Sequence[Size], rounds: int) -> list[dict[str, Any]]:
    """Compiles a sweep of every size, then times them in turns; returns what each takes."""
    sweeps = [compiled(size) for size in sizes]
    # A call trains for as many epochs as make the host's own milliseconds few.
    epochs = [_epochs_in(_CALL_SECONDS, sweep) for sweep in sweeps]
    times = [
        (
            sweep.advance(count, measured=False)[1] / count,
            sweep.advance(0, measured=True)[1],
        )
        for _ in range(rounds)
        for sweep, count in zip(sweeps, epochs, strict=True)
    ]
    found = []
    for i, sweep in enumerate(sweeps):
        trained, measured = zip(*times[i :: len(sweeps)], strict=True)
        found.append(
            {
                "compile_s": sweep.program.compile_seconds,
                "epoch_s": statistics.median(trained),
                "measurement_s": statistics.median(measured),
                "bytes": sweep.program.bytes_per_device,
                "rounds": {"epoch_s": trained, "measurement_s": measured},
            }
        )
    return found


def _epochs_in(seconds: float, sweep: Sweep) -> int:
    """Returns how many epochs take about so many seconds."""
    one = min(sweep.advance(1, measured=False)[1] for _ in range(2))
    return max(1, min(100, round(seconds / one)))


def measure_devices(name: str, rounds: int, most: int | None = None) -> dict[str, Any]:
    """Measures the growth with one of `QUANTITIES`, over the first `most` of its values."""
    field, values, base = QUANTITIES[name]
    values = values[:most]
    points = time_sizes([base._replace(**{field: value}) for value in values], rounds)
    return summary(values, points, MEASURED) | {"base": base._asdict()}


def summary(
    values: Sequence[int], points: list[dict[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """Returns what was measured at some values, with the exponents of the named measures."""
    fits = {name: exponent(values, [point[name] for point in points]) for name in names}
    return {"values": values, "points": points, "exponents": fits}


# What the host does


def host_config(decays: int, rates: int, seeds: int) -> Config:
    config = TINY.config
    config.sweep.weight_decay = (0.0, *np.geomspace(1e-5, 3e-2, decays - 1).tolist())
    config.sweep.learning_rate = tuple(np.geomspace(0.01, 0.2, rates).tolist())
    config.sweep.seed = tuple(range(seeds))
    config.train.epochs, config.log.epochs, config.report.enabled = 4, (0, 1, 2, 3, 4), False
    return config


class Stages:
    """Seconds of every stage, by name, in the order in which they begin."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def around(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Returns a method that is timed."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name):
                return method(*args, **kwargs)

        return wrapped


@contextlib.contextmanager
def listened(stages: Stages) -> Iterator[None]:
    """Times what a training run writes."""
    with contextlib.ExitStack() as stack:
        for owner, method, name in (
            (listeners.HistoryWriter, "on_measured", "history of a measurement"),
            (listeners.CheckpointWriter, "on_save", "checkpoint"),
        ):
            timed = stages.around(getattr(owner, method), name)
            stack.enter_context(mock.patch.object(owner, method, timed))
        yield


def time_host(decays: int, rates: int, seeds: int) -> dict[str, Any]:
    """Trains a tiny grid and shows it; returns seconds of every stage, and bytes."""
    parallel.use_every_core()
    stages, printed = Stages(), io.StringIO()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(printed):
        folder = Path(name)
        config = host_config(decays, rates, seeds)
        with stages.timed("plan"):
            plan = prepare(config, folder)
        with listened(stages):
            loop.train(plan)
        with stages.timed("resume"):
            loop.train(plan)
        recorded = history.load(folder / "history.nc")
        with stages.timed("tables"):
            tables.show_results(recorded, tables.make_console())
        for word, command in (("show", show), ("plot", plot), ("report", report)):
            with stages.timed(f"ncjax {word}"):
                assert command.main([name]) == 0
        files = ("history.nc", "metrics.jsonl", "report.html")
        sizes = {file: (folder / file).stat().st_size for file in files}
    taken = {name: statistics.median(of) for name, of in stages.seconds.items()}
    return taken | sizes | {"peak resident": peak_resident(), "characters": len(printed.getvalue())}


def peak_resident() -> int:
    """Returns the most bytes that this process has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure_host(most: int | None = None) -> dict[str, Any]:
    """Measures every grid of `HOST` in a process of its own, whose memory is its alone."""
    context, values = multiprocessing.get_context("spawn"), list(HOST)[:most]
    points = []
    for runs in values:
        with context.Pool(1) as pool:
            points.append(pool.apply(time_host, HOST[runs]))
    return summary(values, points, list(points[0]))


# Results


def _with_unit(name: str, value: float) -> str:
    if name == "bytes" or "." in name or "resident" in name:
        return f"{value / 2**20:,.3g} MiB"
    if name == "characters":
        return f"{value:,.0f}"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _rounded(fitted: float) -> str:
    return f"{round(fitted, 2) + 0.0:.2f}"  # without the sign of a 0


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields a row for every quantity and measure: both ends of the range, and the exponent."""
    for quantity, found in result.items():
        values = found["values"]
        for name, fitted in found["exponents"].items():
            ends = (_with_unit(name, found["points"][i][name]) for i in (0, -1))
            range_ = f"{values[0]:,} to {values[-1]:,}"
            yield quantity, range_, name.removesuffix("_s"), *ends, _rounded(fitted)


def show_table(result: dict[str, Any], console: Console) -> None:
    table = Table(title="exponents are of the upper half of each range")
    for heading in ("against", "from", "measured", "at the least", "at the most", "exponent"):
        numeric = heading.startswith("at ") or heading == "exponent"
        table.add_column(heading, justify="right" if numeric else "left")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)


LOOKS = {
    "compile_s": ("compile", "#999999", "s"),
    "epoch_s": ("epoch of training", "#0072B2", "o"),
    "measurement_s": ("measurement", "#D55E00", "^"),
    "bytes": ("memory of a device, GiB", "#009E73", "v"),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a panel for every quantity: seconds, and memory in GiB, against it."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(7, 4.6), dpi=200, layout="constrained")
        names = [name for name in QUANTITIES if name in result]
        all_axes = figure.subplots(2, -(-len(names) // 2), sharey=True, squeeze=False)
        for name, axes in zip(names, all_axes.flat, strict=False):
            _draw_quantity(axes, name, result[name])
        for axes in all_axes.flat[len(names) :]:
            axes.set_visible(False)
        for axes in all_axes[:, 0]:
            axes.set_ylabel("seconds, GiB")
        handles, labels = all_axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_quantity(axes: Any, name: str, found: dict[str, Any]) -> None:
    """Draws what was measured against one quantity, with its exponents at the ends of the lines."""
    for measure, (label, color, marker) in LOOKS.items():
        unit = 2**30 if measure == "bytes" else 1
        y = [point[measure] / unit for point in found["points"]]
        look = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.2}
        axes.plot(found["values"], y, label=label, **look)
        place = (found["values"][-1], y[-1])
        offset: Any = {"textcoords": "offset points", "fontsize": 6, "color": color}
        axes.annotate(_rounded(found["exponents"][measure]), place, (4, -2), **offset)
    axes.set(title=name, xlabel=QUANTITIES[name][0], xscale="log", yscale="log")
    if max(found["values"]) < 10 * min(found["values"]):  # a decade's own labels would overlap
        axes.set_xticks(found["values"], map(str, found["values"]))
        axes.minorticks_off()
    axes.margins(x=0.18)


def parse_args() -> argparse.Namespace:
    names = [*QUANTITIES, "host"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="few and small; writes nothing")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    parallel.use_every_core()
    watch = Watch(concludes=not args.quick)
    file = REPO / "benchmarks" / "results" / "growth.json"
    found = json.loads(file.read_text()) if file.exists() and not args.quick else {}
    for name in ("runs", "host") if args.quick else args.only:
        print(f"{name} ...", file=sys.stderr)
        if name == "host":
            measured = measure_host(1 if args.quick else None)
        else:
            measured = measure_devices(name, ROUNDS, 2 if args.quick else None)
        found[name] = measured | {"machine": watch.machine}
        if not args.quick and watch.concluded():  # what is interrupted keeps what it has measured
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=2) + "\n")
    result = {name: found[name] for name in (*QUANTITIES, "host") if name in found}
    show_table(result, Console(width=110))
    if args.quick:
        return
    watch.conclude()
    if any(name in result for name in QUANTITIES):
        draw(result, REPO / "docs" / "benchmark_growth.png")


if __name__ == "__main__":
    main()
