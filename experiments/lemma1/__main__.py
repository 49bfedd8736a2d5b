"""Lemma 1: a collapsed solution whose outputs sum to 0 does not interpolate; its loss is at
least 1/(2C).
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from configs import ufm
from experiments import common
from ncjax.metrics import closed_forms, theory
from ncjax.report import panels


def histories(train: bool) -> dict[str, xr.Dataset]:
    networks = {}
    for num_classes in (3, 10):
        # lambda counts in units of the scale of (*) in `closed_forms`, which goes with 1/C.
        fields = {
            "data__num_classes": num_classes,
            "model__widths": (64,),
            "sweep__init_scale": 1.0,
        }
        decays = tuple(float(f"{x / num_classes:.3g}") for x in (0.01, 0.03, 0.1))
        config = common.changed(
            ufm.get_config(), sweep__weight_decay=decays, sweep__seed=(0,), **fields
        )
        networks[f"UFM of depth 2, C = {num_classes}, no bias"] = common.recorded(
            f"lemma1_ufm_{num_classes}", config, train
        )
    return networks | {
        f"digits, {setting}": one for setting, one in common.relaxed_digits(train).items()
    }


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    rows = []
    for name, history in histories.items():
        num_classes = history.sizes["label"]
        final = history.isel(epoch=-1).sel(split="train")
        outputs = 1 - (final["epsilon"] - (num_classes - 1) * final["delta"])
        asks_for_a_sum = "centred" not in name
        if not asks_for_a_sum:
            outputs -= 1
        # ||1^T W_L||^2 = ||W_L||^2 + the products of C (C-1) pairs.
        cosine = (common.sum_of_rows(final) - 1) / (num_classes - 1)
        small = (one.where(abs(one) > 1e-6, 0) for one in (outputs, cosine))
        cells = (final["fit_loss"], *small, final["nc3"])
        columns = [
            *map(common.per_decay, cells),
            common.per_decay(if_sum_were_0(final, num_classes)),
        ]
        for decay, *row, lemma in zip(
            map(common.number, final["weight_decay"].values), *columns, strict=True
        ):
            lemmas = (lemma, f"{1 / (2 * num_classes):.3g}") if asks_for_a_sum else ("-", "-")
            rows.append((name, str(history.sizes["seed"]), decay, *row, *lemmas))
    table = common.Table(
        "What one-hot targets cost, and what they would cost were the mean outputs a simplex ETF "
        "(sum 0)",
        (
            "network",
            "n",
            "lambda",
            "fit loss",
            "sum of outputs",
            "cosine of rows",
            "nc3",
            "loss if the sum were 0",
            "1/(2C)",
        ),
        rows,
    )
    return {"loss": table}


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    common.save(_figure(recorded), "lemma1")


def if_sum_were_0(run, num_classes: int):
    """Fit term of the symmetric part of the mean residuals, 1/2 (t^2 (C-1) + q^2)/C, with q = 1:
    Lemma 1's loss.
    """
    t = run["epsilon"] + run["delta"]
    return 0.5 * (t**2 * (num_classes - 1) + 1) / num_classes


def _figure(networks):
    figure, (curves, losses) = panels.frame(2, "", "")
    alpha = np.linspace(0, 1, 400)
    for num_classes, colour in zip((2, 3, 10, 100), panels.COLOURS, strict=False):
        scaled = 2 * num_classes * theory.collapsed_loss(alpha, num_classes)
        curves.plot(alpha, scaled, color=colour, linewidth=1, label=f"C = {num_classes}")
        curves.plot((num_classes - 1) / num_classes, 1, "o", color=colour, markersize=3.5)
        # Checks the formula by its matrices.
        etf = closed_forms.simplex_etf(num_classes) / np.sqrt(num_classes)
        explicit = [
            np.sum((np.eye(num_classes) - a * num_classes * etf @ etf.T) ** 2)
            for a in (0.2, 0.5, 0.9)
        ]
        curves.plot((0.2, 0.5, 0.9), explicit, "x", color=colour, markersize=4)
    curves.set_title(
        "Collapsed, outputs of sum 0 (crosses: explicit matrices, dots: least)", size=panels.SIZE
    )
    curves.set_xlabel(r"own output $\alpha$", size=panels.SIZE)
    curves.set_ylabel(r"loss, in units of $1/(2C)$", size=panels.SIZE)
    curves.set_yscale("log")
    curves.set_ylim(0.8, 100)
    curves.legend(fontsize=panels.SMALL, frameon=False)
    for (name, history), colour, marker in zip(
        networks.items(), panels.COLOURS, panels.MARKERS, strict=False
    ):
        if history.sizes["label"] != 10:
            continue
        decays = history["weight_decay"].values
        mean, least, greatest = panels.over_seeds(
            history["fit_loss"].isel(epoch=-1).sel(split="train")
        )
        losses.plot(
            decays, mean, color=colour, marker=marker, markersize=3.5, linewidth=1, label=name
        )
        losses.vlines(decays, least, greatest, color=colour, linewidth=1)
    losses.axhline(
        0.05, color="black", linestyle="--", linewidth=1, label="least for an ETF without bias"
    )
    losses.set_xscale("log")
    losses.set_yscale("log")
    losses.set_ylim(1e-4, 10)  # room for the legend
    losses.set_title("What networks pay instead, C = 10", size=panels.SIZE)
    losses.set_xlabel(r"weight decay $\lambda$", size=panels.SIZE)
    losses.set_ylabel("fit term of the loss", size=panels.SIZE)
    losses.legend(fontsize=panels.SMALL, frameon=False, loc="upper left")
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
