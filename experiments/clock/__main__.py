"""Do curves of other lambdas, learning rates, momenta and batch sizes fall together at equal
2 lambda t, and can the curve of a lambda be predicted from two others?
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from configs import digits, fig1_cifar10, mnist
from experiments import common
from ncjax.config import Config, log_spaced_epochs
from ncjax.report import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("nc1", "etf_error", "nc3")
VARIABLES = (*MEASURES, "accuracy", "finite", "relaxation_time", "flow_time")
# Values of 2 lambda t at which curves are compared; those that a curve does not reach, it is not.
POINTS = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
# Whether curves come together is asked of the configurations that reach this one.
REACHED = 3.0
# The three lambdas of a data set: the middle one's curve is predicted from the outer two.
DECAYS = {
    "digits": (3e-4, 1e-3, 3e-3),
    "MNIST": (5e-4, 1.5e-3, 5e-3),
    "CIFAR-10": (3e-4, 1e-3, 3e-3),
}
# Where a prediction is compared with training.
PREDICTED = np.geomspace(0.1, 10, 25)
BATCH_SIZES = {"digits": (32, 128), "MNIST": (32, 128), "CIFAR-10": (32,)}
# An axis of the grid, and what varies along it.
FACTORS = {
    "weight_decay": "lambda",
    "learning_rate": "learning rate",
    "momentum": "momentum",
    "batch_size": "batch size",
}


def _config(name: str, decays: Sequence[float]) -> Config:
    match name:
        case "digits":
            config = common.changed(
                digits.get_config(), train__epochs=150, sweep__momentum=(0.0, 0.7, 0.9)
            )
        case "MNIST":
            config = common.changed(
                mnist.get_config(),
                data__per_class=100,
                model__widths=(128, 128, 128),
                train__epochs=60,
                sweep__momentum=(0.0, 0.9),
            )
        case _:
            config = common.changed(
                fig1_cifar10.get_config(),
                units="ours",
                data__per_class=100,
                model__widths=(16, 32, 64, 128),
                train__epochs=60,
                sweep__momentum=0.9,
            )
    return common.changed(
        config,
        train__schedule="constant",
        log__epochs=log_spaced_epochs(config.train.epochs, 24),
        sweep__weight_decay=tuple(decays),
        sweep__learning_rate=(0.03, 0.1),
        sweep__seed=common.SEEDS,
    )


def histories(train: bool) -> dict[str, dict[str, xr.Dataset]]:
    """Returns by data set the runs at the outer two lambdas, and those at the middle one."""
    found = {}
    for name, (low, middle, high) in DECAYS.items():
        stem = f"clock_{name.lower().replace('-', '')}"
        found[name] = {
            which: common.recorded(
                f"{stem}_{which}",
                _config(name, decays),
                train,
                every_epoch=True,
                variables=VARIABLES,
                vary={"train.batch_size": BATCH_SIZES[name]},
            )
            for which, decays in (("outer", (low, high)), ("middle", (middle,)))
        }
    return found


def at_clock(
    history: xr.Dataset, measure: str, points: np.ndarray, clock: str = "relaxation_time"
) -> xr.DataArray:
    """Returns log of a measure of every run at values of a clock.

    It is linear in log of the clock between epochs, and NaN where a run does not reach a value.
    """
    run = history.sel(split="train", drop=True).isel(epoch=history["epoch"].values > 0)

    def interpolated(times: np.ndarray, values: np.ndarray) -> np.ndarray:
        at = np.interp(np.log(points), np.log(times), np.log(values))
        return np.where((points >= times[0]) & (points <= times[-1]), at, np.nan)

    logs = xr.apply_ufunc(
        interpolated,
        run[clock].astype(float),
        run[measure].astype(float),
        input_core_dims=[["epoch"], ["epoch"]],
        output_core_dims=[["point"]],
        vectorize=True,
    )
    return logs.assign_coords(point=points)


def predict(
    outer: xr.Dataset, decay: float, measure: str, points: np.ndarray, clock: str
) -> xr.DataArray:
    """Returns log of a measure at a lambda, predicted from the runs of two others.

    The rule: at the same value of the clock, the mean over seeds of the log is linear in log
    lambda. It was committed before any run of the middle lambdas was trained.
    """
    low, high = np.log(outer["weight_decay"].values)
    weight = (np.log(decay) - low) / (high - low)
    logs = at_clock(outer, measure, points, clock).mean("seed")
    return (1 - weight) * logs.isel(weight_decay=0, drop=True) + weight * logs.isel(
        weight_decay=1, drop=True
    )


def tables(found: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, common.Table]:
    together = {
        name.lower().replace("-", ""): common.Table(
            f"{name}: largest over least at equal 2 lambda t, mean (largest) over groups",
            *_together(name, parts),
        )
        for name, parts in found.items()
    }
    return together | {
        "fitted": common.Table("When the data are fitted", *_fitted(found)),
        "blind": common.Table(
            "The middle lambda's curve, predicted before it was trained", *_blind(found)
        ),
    }


def _together(
    name: str, parts: Mapping[str, xr.Dataset]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns how far the curves of configurations lie apart, by what differs between them."""
    rows = []
    for measure in MEASURES:
        runs = _logs(parts, measure, "relaxation_time", POINTS)
        logs = runs.mean("seed")
        rows += rows_by_factor(measure, logs)
        # The mean distance of two means of n normal numbers is 2/sqrt(pi) sd/sqrt(n).
        chance = runs.std("seed", ddof=1) * 2 / np.sqrt(np.pi * runs.sizes["seed"])
        rows.append((measure, "two sets of seeds", *(_mean_ratio(one) for one in _columns(chance))))
        # The flow time that the middle lambda's clock has at a point, for every lambda.
        times = POINTS / (2 * DECAYS[name][1])
        at_equal_t = _logs(parts, measure, "flow_time", times).mean("seed")
        by_lambda = _ranges(at_equal_t, ["weight_decay"])
        rows.append((measure, "lambda, at equal t instead", *_mean_and_largest(by_lambda)))
    # Every measure has the same clock.
    logs = _logs(parts, MEASURES[0], "relaxation_time", POINTS).mean("seed")
    counts = logs.notnull().sum([dim for dim in logs.dims if dim != "point"]).values
    whole = logs.size // logs.sizes["point"]
    rows.append(("all", "configurations compared", *(f"{count} of {whole}" for count in counts)))
    seeds = parts["outer"].sizes["seed"]
    return (f"measure (n = {seeds})", "what differs", *(f"{point:g}" for point in POINTS)), rows


def _logs(
    parts: Mapping[str, xr.Dataset], measure: str, clock: str, points: np.ndarray
) -> xr.DataArray:
    """Returns log of a measure at all three lambdas."""
    return xr.concat(
        [at_clock(part, measure, points, clock) for part in parts.values()], "weight_decay"
    ).sortby("weight_decay")


def rows_by_factor(measure: str, logs: xr.DataArray) -> list[tuple[str, ...]]:
    """Returns how far configurations lie apart at every point, by what differs between them."""
    return [
        (measure, words, *_mean_and_largest(ranges))
        for words, ranges in _ranges_by_factor(logs).items()
    ]


def _ranges_by_factor(logs: xr.DataArray) -> dict[str, xr.DataArray]:
    """Returns max - min of log over what differs, in every group of what does not."""
    dims = [dim for dim in FACTORS if logs.sizes.get(dim, 1) > 1]
    groups = {FACTORS[dim]: _ranges(logs, [dim]) for dim in dims}
    if {"learning_rate", "momentum"} <= set(dims) and 0.7 in logs["momentum"]:
        # 0.1/(1 - 0) and 0.03/(1 - 0.7).
        same = [
            logs.sel(learning_rate=rate, momentum=momentum, drop=True)
            for rate, momentum in ((0.1, 0), (0.03, 0.7))
        ]
        groups["momentum, at equal lr/(1 - m)"] = _ranges(xr.concat(same, "pair"), ["pair"])
    those = logs.where(logs.sel(point=REACHED).notnull())
    return groups | {
        "all of these": _ranges(logs, dims),
        f"all, of those that reach {REACHED:g}": _ranges(those, dims),
    }


def _ranges(logs: xr.DataArray, dims: Sequence[str]) -> xr.DataArray:
    """Returns max - min; NaN where fewer than two configurations reach the point."""
    apart = logs.max(dims) - logs.min(dims)
    return apart.where(logs.notnull().sum(dims) > 1)


def _mean_and_largest(groups: xr.DataArray) -> list[str]:
    return [
        f"{_mean_ratio(one)} ({np.exp(np.nanmax(one)):.2f})" if np.isfinite(one).any() else "-"
        for one in _columns(groups)
    ]


def _mean_ratio(logs: np.ndarray) -> str:
    return f"{np.exp(np.nanmean(logs)):.2f}" if np.isfinite(logs).any() else "-"


def _columns(logs: xr.DataArray) -> list[np.ndarray]:
    """Returns the numbers of every point."""
    values = logs.transpose("point", ...).values
    return list(values.reshape(len(values), -1))


def _blind(
    found: Mapping[str, Mapping[str, xr.Dataset]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for name, parts in found.items():
        decay = DECAYS[name][1]
        for measure in MEASURES:
            errors = {}
            for clock in ("relaxation_time", "flow_time"):
                scale = 1 if clock == "relaxation_time" else 2 * decay
                points = PREDICTED / scale
                measured = at_clock(parts["middle"], measure, points, clock).mean("seed")
                predicted = predict(parts["outer"], decay, measure, points, clock)
                errors[clock] = (
                    measured.isel(weight_decay=0, drop=True) - predicted
                ).assign_coords(point=PREDICTED)
            by_clock, by_time = errors.values()
            both = by_clock.notnull() & by_time.notnull()
            reached = by_clock.where(both).dropna("point", how="all")["point"].values
            span = f"{reached[0]:.2g} to {reached[-1]:.2g}" if reached.size else "-"
            rows.append(
                (
                    name,
                    measure,
                    common.number(decay),
                    span,
                    f"{int(both.sum())}",
                    *_errors(by_clock.where(both)),
                    *_errors(by_time.where(both)),
                )
            )
    headings = (
        "data",
        "measure",
        "lambda",
        "2 lambda t",
        "compared",
        "median error",
        "largest",
        "at equal t: median",
        "largest",
    )
    return headings, rows


def _fitted(
    found: Mapping[str, Mapping[str, xr.Dataset]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns where on the clock the mean accuracy over seeds first exceeds 0.99."""
    rows = []
    for name, parts in found.items():
        cells = []
        for decay in DECAYS[name]:
            part = next(one for one in parts.values() if decay in one["weight_decay"])
            run = part.sel(weight_decay=decay, split="train").mean("seed")
            reached = run["relaxation_time"].where(run["accuracy"] > 0.99)
            first, last = reached.min("epoch"), run["relaxation_time"].isel(epoch=-1)
            spans = [f"{x.min().item():.2g} to {x.max().item():.2g}" for x in (first, last)]
            cells.append(f"{common.number(decay)}: {spans[0]}, of {spans[1]}")
        rows.append((name, *cells))
    return ("data", "smallest lambda", "middle", "largest"), rows


def _errors(logs: xr.DataArray) -> tuple[str, str]:
    """Returns the median and the largest relative error, of differences of logs."""
    relative = np.expm1(np.abs(logs.values[np.isfinite(logs.values)]))
    if not relative.size:
        return "-", "-"
    return f"{100 * np.median(relative):.1f}%", f"{100 * relative.max():.1f}%"


def main(train: bool) -> None:
    found = histories(train)
    common.print_tables(tables(found))
    common.save(_figure(found), "clock")


_PLACES = ("smallest", "middle", "largest")
# Dots so far apart that the curves below them are seen.
_SPARSE = (0, (1, 3))


def _figure(found: Mapping[str, Mapping[str, xr.Dataset]]) -> "Figure":
    """Draws every configuration against 2 lambda t, and the blind predictions dotted; a row for
    each data set.
    """
    shown = ("nc3", "etf_error", "nc1")
    figure, all_axes = panels.frame(
        len(shown) * len(found), panels.CLOCKS["relaxation_time"], "", columns=len(shown)
    )
    colours = dict(zip(_PLACES, panels.COLOURS, strict=False))
    points = np.geomspace(0.02, 30, 60)
    for row, (name, parts) in enumerate(found.items()):
        for column, measure in enumerate(shown):
            axes, drawn = all_axes[len(shown) * row + column], []
            logs = _logs(parts, measure, "relaxation_time", points).mean("seed")
            for place, colour in enumerate(colours.values()):
                curves = logs.isel(weight_decay=place).transpose("point", ...).values
                drawn.append(np.exp(curves.reshape(len(points), -1)))
                axes.plot(points, drawn[-1], color=colour, linewidth=0.7, alpha=0.7)
            predicted = predict(
                parts["outer"], DECAYS[name][1], measure, points, "relaxation_time"
            ).transpose("point", ...)
            curves = np.exp(predicted.values.reshape(len(points), -1))
            axes.plot(points, curves, color="black", linestyle=_SPARSE, linewidth=0.8)
            panels.scale_x(axes, points)
            words = panels.Panel(name, measure, ())
            panels.finish(axes, words, np.concatenate([*map(np.ravel, drawn)]))
    handles = []
    for place, (words, colour) in enumerate(colours.items()):
        values = ", ".join(f"{panels.number(DECAYS[name][place])} {name}" for name in found)
        handles.append(common.legend_line(rf"{words} $\lambda$: {values}", color=colour))
    words = r"middle $\lambda$, predicted before it was trained"
    handles.append(common.legend_line(words, color="black", linestyle=_SPARSE))
    seeds = {parts["outer"].sizes["seed"] for parts in found.values()}
    caption = f"training split; a line per configuration, mean of log over n = {max(seeds)} seeds"
    panels.legend(figure, handles, caption)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
