"""Lemma 2 along real training runs, to float precision; and with lambda > 0 no critical point
interpolates.
"""

from collections.abc import Mapping

import xarray as xr

from configs import digits
from experiments import common
from ncjax.report import panels
from ncjax.report import tables as report


def histories(train: bool) -> dict[str, xr.Dataset]:
    config = common.changed(
        digits.get_config(), train__precision="float64", sweep__seed=tuple(range(5))
    )
    return {
        "float32": common.demo(train),
        "float64": common.recorded("lemma2_float64", config, train, every_epoch=True),
    }


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    errors = {
        f"greatest error, {name} (n = {one.sizes['seed']})": abs(one["lemma2_residual"]).max(
            ("epoch", "seed")
        )
        for name, one in histories.items()
    }
    history = histories["float32"]
    final = history.isel(epoch=-1)
    decays = final["weight_decay"]
    at_the_end = {
        "fit loss": final["fit_loss"].sel(split="train"),
        "mean <r, f>": decays * final["norm_target"],
        "lambda norm(W_L)^2": decays * final["weight_norm_sq"].sel(layer="head"),
    }
    columns = [
        *(
            [report.short_exponent(f"{error:.2g}") for error in column.values]
            for column in errors.values()
        ),
        *map(common.per_decay, at_the_end.values()),
    ]
    table = common.Table(
        f"Lemma 2: greatest error |L - right side|/L over {history.sizes['epoch']} epochs, seeds "
        "and layers; "
        "and what forbids interpolation, mean ± sd over seeds in float32",
        (f"lambda (n = {history.sizes['seed']})", *errors, *at_the_end),
        list(zip(map(common.number, decays.values), *columns, strict=True)),
    )
    return {"identity": table}


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    common.save(_figure(recorded), "lemma2")


def _figure(histories):
    figure, (errors, forbidden) = panels.frame(
        2, "", "Digits, 6 weight decays; float32: 10 seeds, float64: 5"
    )
    for (precision, history), colour in zip(histories.items(), panels.COLOURS, strict=False):
        values = history["lemma2_residual"]
        greatest = values.max(("weight_decay", "seed"))
        errors.plot(
            history["epoch"],
            greatest,
            color=colour,
            marker="o",
            markersize=3,
            linewidth=1,
            label=precision,
        )
    errors.set_xscale("symlog", linthresh=1)
    errors.set_yscale("log")
    errors.set_xlabel("epoch", size=panels.SIZE)
    errors.set_ylabel(r"$|L-\mathrm{right\ side}|\,/\,L$", size=panels.SIZE)
    errors.set_title("Lemma 2: greatest error of all runs", size=panels.SIZE)
    errors.legend(fontsize=panels.SMALL, frameon=False)
    final = histories["float32"].isel(epoch=-1)
    final = final.isel(weight_decay=final["weight_decay"].values > 0)
    decays = final["weight_decay"].values
    for values, label, style, colour in (
        (final["fit_loss"].sel(split="train"), "fit term of the loss", "-", panels.COLOURS[0]),
        (
            decays[:, None] * final["norm_target"],
            r"mean $\langle r,f\rangle$",
            "-",
            panels.COLOURS[1],
        ),
        (
            decays[:, None] * final["weight_norm_sq"].sel(layer="head"),
            r"$\lambda\Vert W_L\Vert^2$",
            "--",
            "black",
        ),
    ):
        forbidden.plot(
            decays,
            panels.over_seeds(values)[0],
            color=colour,
            linestyle=style,
            marker="o",
            markersize=3,
            label=label,
        )
    forbidden.set_xscale("log")
    forbidden.set_yscale("log")
    forbidden.set_xlabel(r"weight decay $\lambda$", size=panels.SIZE)
    forbidden.set_title("At equilibrium residuals carry the norms", size=panels.SIZE)
    forbidden.legend(fontsize=panels.SMALL, frameon=False)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
