"""Do neighbouring linear layers come into balance as exp(-2 lambda t), and do those with a ReLU
between them stall, as Jacot et al. (2025) say?
"""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from configs import mnist
from experiments import common
from ncjax.config import log_spaced_epochs
from ncjax.report import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS, LINEAR = 9, 4
EPOCHS = 1500
VARIABLES = (
    "finite",
    "accuracy",
    "nc1",
    "etf_error",
    "nc3",
    "relaxation_time",
    "flow_time",
    "weight_norm_sq",
    "layer_imbalance",
    "layer_condition",
    "layer_effective_rank",
)


def histories(train: bool) -> dict[str, xr.Dataset]:
    config = common.changed(
        mnist.get_config(),
        data__per_class=100,
        model__widths=(64,) * (LAYERS - 1),
        model__linear_head_depth=LINEAR,
        train__schedule="constant",
        train__epochs=EPOCHS,
        train__batch_size=50,
        checkpoint__every=0,
        log__epochs=log_spaced_epochs(EPOCHS, 16),
        log__layers=True,
        sweep__learning_rate=0.005,  # deep linear heads diverge at more
        sweep__weight_decay=(0.0, 1.8e-3),
        sweep__seed=common.SEEDS,
    )
    recorded = common.recorded("balance", config, train, every_epoch=True, variables=VARIABLES)
    return {"balance": recorded}


def _pairs(history: xr.Dataset) -> list[tuple[str, str, str]]:
    """Returns a layer, the next one, and what stands between them, as was measured."""
    names = history["layer"].values.tolist()
    between = history["layer"].attrs["pairs"].split()
    return [(*pair, kind) for pair, kind in zip(itertools.pairwise(names), between, strict=True)]


def tables(found: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    history = found["balance"]
    start, final = history.isel(epoch=0), history.isel(epoch=-1)
    clock = final["relaxation_time"].mean("seed")
    rows = []
    for decay in history["weight_decay"].values:
        for name, following, kind in _pairs(history):
            before, after = (
                one["layer_imbalance"].sel(layer=name, weight_decay=decay) for one in (start, final)
            )
            rows.append(
                (
                    common.number(decay),
                    f"{name}, {following}",
                    kind,
                    common.over_seeds(before),
                    common.over_seeds(after),
                    common.over_seeds(after / before),
                    f"{np.exp(-clock.sel(weight_decay=decay).item()):.4g}" if decay else "1",
                )
            )
    headings = (
        f"lambda (n = {history.sizes['seed']})",
        "layers",
        "between",
        "imbalance at the start",
        "at the end",
        "end/start",
        "exp(-2 lambda t)",
    )
    return {
        "pairs": common.Table("||W_(k+1)^T W_(k+1) - W_k W_k^T||_F", headings, rows),
        "collapse": _collapse(history),
    }


def _collapse(history: xr.Dataset) -> common.Table:
    final = history.isel(epoch=-1).sel(split="train")
    shown = {
        "train acc": final["accuracy"],
        "2 lambda t": final["relaxation_time"],
        "nc1": final["nc1"],
        "etf_error": final["etf_error"],
        "nc3": final["nc3"],
        "least/greatest norm^2": final["weight_norm_sq"].min("layer")
        / final["weight_norm_sq"].max("layer"),
    }
    decays = map(common.number, final["weight_decay"].values)
    rows = list(zip(decays, *map(common.per_decay, shown.values()), strict=True))
    headings = (f"lambda (n = {history.sizes['seed']})", *shown)
    return common.Table("At the last epoch", headings, rows)


def main(train: bool) -> None:
    found = histories(train)
    common.print_tables(tables(found))
    common.save(_figure(found["balance"]), "balance")


def _figure(history: xr.Dataset) -> "Figure":
    """Draws the imbalance of every pair over its first value against 2 lambda t, and those without
    decay at the same t.
    """
    figure, [axes] = panels.frame(1, panels.CLOCKS["relaxation_time"], "")
    run = history.isel(weight_decay=-1)
    decay = run["weight_decay"].item()
    ratio = run["layer_imbalance"] / run["layer_imbalance"].isel(epoch=0)
    times = run["relaxation_time"].mean("seed").values
    control = history["layer_imbalance"].isel(weight_decay=0)
    colours, marks = {"relu": panels.COLOURS[1], "linear": panels.COLOURS[0]}, iter(panels.MARKERS)
    drawn, handles = [], {}
    for name, following, kind in _pairs(history):
        # The linear pairs lie on one another.
        words = f"ReLU: {name}, {following}" if kind == "relu" else "linear: all three"
        look = {"color": colours[kind], "linewidth": 1, "markersize": 2.5}
        look["marker"] = next(marks) if kind == "relu" else "."
        mean, least, greatest = panels.over_seeds(ratio.sel(layer=name))
        axes.plot(times, mean, **look)
        axes.fill_between(times, least, greatest, color=look["color"], alpha=0.15, linewidth=0)
        kept, *_ = panels.over_seeds((control / control.isel(epoch=0)).sel(layer=name))
        axes.plot(times, kept, color="0.6", linewidth=0.7)
        handles[words] = common.legend_line(words, **look)
        drawn += [mean, least, greatest, kept]
    axes.plot(times, np.exp(-times), color="black", linestyle="--", linewidth=1)
    panels.scale_x(axes, times)
    panels.finish(
        axes,
        panels.Panel(
            rf"Imbalance of neighbouring layers, $\lambda$ = {panels.number(decay)}",
            "over its first value",
            (),
        ),
        np.concatenate(drawn),
    )
    others = [
        common.legend_line(r"$e^{-2\lambda t}$", color="black", linestyle="--"),
        common.legend_line(r"$\lambda$ = 0, at the same $t$", color="0.6", linewidth=0.7),
    ]
    caption = f"mean over n = {history.sizes['seed']} seeds, band: least to greatest"
    panels.legend(figure, [*handles.values(), *others], caption)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
