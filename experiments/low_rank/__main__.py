"""Is collapse optimal for a deep unconstrained-feature model with ReLU, or is low rank better, as
Sukenik et al. (2024) prove?
"""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from configs import ufm
from experiments import common
from ncjax.metrics import closed_forms
from ncjax.report import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS, CLASSES, PER_CLASS = 5, 10, 5
# Layers before the first activation: with 2, the features W_1 are free to have any sign.
INPUT_DEPTHS = {1: "ReLU", 2: "linear"}
# The runs whose ranks are shown, of runs by ascending loss.
_ENDS = {"least": 0, "greatest": -1}
VARIABLES = (
    "finite",
    "loss",
    "accuracy",
    "nc1",
    "etf_error",
    "nc3",
    "mode_eigenvalues",
    "weight_norm_sq",
    "relaxation_time",
    "layer_rank",
    "layer_effective_rank",
)


def histories(train: bool) -> dict[str, xr.Dataset]:
    config = common.changed(
        ufm.get_config(),
        data__per_class=PER_CLASS,
        model__activation="relu",
        model__widths=(64,) * (LAYERS - 1),
        train__precision="float32",
        train__epochs=6000,
        log__epochs=(0, 6000),
        log__layers=True,
        train__schedule="cosine",
        sweep__learning_rate=0.2,
        sweep__init_scale=(0.7, 0.8, 1.0),
        sweep__weight_decay=(0.008, 0.012),
        sweep__seed=tuple(range(8)),
    )
    vary = {"model.linear_input_depth": tuple(INPUT_DEPTHS)}
    recorded = common.recorded("low_rank", config, train, variables=VARIABLES, vary=vary)
    return {"low_rank": recorded}


def collapsed_loss(weight_decay: float) -> float:
    """Returns the loss of deep collapse: an orthogonal frame in every layer, all norms equal.

    ReLU leaves such a frame as it is, so that it is the linear model's. Its loss is (1 - a)^2/2 +
    lambda/2 sum_k ||W_k||^2 with lambda ||W_k||^2 = a (1 - a).
    """
    setting = closed_forms.Setting(CLASSES)
    gamma = closed_forms.unconstrained_gamma(LAYERS, PER_CLASS, setting)
    a = float(closed_forms.homogeneous_solution(weight_decay, gamma, LAYERS, setting).margin)
    return ((1 - a) ** 2 + LAYERS * a * (1 - a)) / 2


def tables(found: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    final = found["low_rank"].isel(epoch=-1).sel(split="train")
    losses, ranks = [], []
    for depth, words in INPUT_DEPTHS.items():
        for scale, decay in itertools.product(
            final["init_scale"].values, final["weight_decay"].values
        ):
            place = {"linear_input_depth": depth, "init_scale": scale, "weight_decay": decay}
            one = final.sel(place).sortby("loss")
            first = (words, f"{scale:g}", common.number(decay))
            losses.append((*first, *_losses(one, float(decay))))
            ranks += [(*first, which, *_ranks(one.isel(seed=i))) for which, i in _ENDS.items()]
    count = f"first map (n = {final.sizes['seed']})"
    names = final["layer"].values.tolist()
    return {
        "loss": common.Table(
            "Loss found after 6,000 epochs, beside collapse's",
            (
                count,
                "init_scale",
                "lambda",
                "collapse's loss",
                "least found",
                "median",
                "greatest",
                "below collapse",
                "of those with accuracy 1",
            ),
            losses,
        ),
        "ranks": common.Table(
            "Ranks of all layers of the runs of least and of greatest loss",
            (
                "first map",
                "init_scale",
                "lambda",
                "run",
                "loss",
                "train acc",
                "nc1",
                "etf_error",
                *names,
            ),
            ranks,
        ),
    }


def _losses(one: xr.Dataset, decay: float) -> tuple[str, ...]:
    loss, collapse = one["loss"].values, collapsed_loss(decay)
    whole = one["accuracy"].values == 1
    return (
        f"{collapse:.4f}",
        *(f"{value:.4f}" for value in (loss.min(), np.median(loss), loss.max())),
        f"{(loss < collapse).sum()} of {loss.size}",
        f"{(loss < collapse)[whole].sum()} of {whole.sum()}",
    )


def _ranks(run: xr.Dataset) -> tuple[str, ...]:
    layers = zip(run["layer_rank"].values, run["layer_effective_rank"].values, strict=True)
    return (
        f"{run['loss'].item():.4f}",
        f"{run['accuracy'].item():g}",
        f"{run['nc1'].item():.1e}",
        f"{run['etf_error'].item():.2f}",
        *(f"{rank:.0f} ({effective:.1f})" for rank, effective in layers),
    )


def main(train: bool) -> None:
    found = histories(train)
    common.print_tables(tables(found))
    common.save(_figure(found["low_rank"].isel(epoch=-1).sel(split="train")), "low_rank")


def _figure(final: xr.Dataset) -> "Figure":
    """Draws the loss of every run over collapse's against the rank of its hidden layers."""
    figure, all_axes = panels.frame(
        len(INPUT_DEPTHS), "effective rank, mean over hidden layers 2 to 4", ""
    )
    decays = final["weight_decay"].values
    all_axes[1].sharey(all_axes[0])
    for axes, (depth, words) in zip(all_axes, INPUT_DEPTHS.items(), strict=True):
        for decay, colour in zip(decays, panels.COLOURS, strict=False):
            one = final.sel(linear_input_depth=depth, weight_decay=decay)
            ranks = one["layer_effective_rank"].isel(layer=slice(1, -1)).mean("layer").values
            relative = one["loss"].values / collapsed_loss(float(decay))
            whole = one["accuracy"].values == 1
            axes.plot(ranks[whole], relative[whole], "o", color=colour, markersize=3)
            axes.plot(ranks[~whole], relative[~whole], "o", color=colour, markersize=3, mfc="none")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_title(f"first map: {words}", size=panels.SIZE)
        axes.set_ylabel("loss over that of collapse", size=panels.SIZE)
    mark = {"marker": "o", "markersize": 3, "linestyle": "none"}
    handles = [
        common.legend_line(rf"$\lambda$ = {panels.number(decay)}", color=colour, **mark)
        for decay, colour in zip(decays, panels.COLOURS, strict=False)
    ]
    handles.append(common.legend_line("collapse", color="black"))
    caption = f"a point per run, {final.sizes['seed']} seeds; hollow: not every example classified"
    panels.legend(figure, handles, caption)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
