"""Lemma 2 along real training runs, to float precision; and with lambda > 0 no critical point interpolates."""

from configs import digits
from experiments import common
from ncjax import panels

PRECISIONS = ("float32", "float64")


def main() -> None:
    histories = {
        precision: common.record(
            f"lemma2_{precision}", common.changed(digits.get_config(), train__precision=precision), every_epoch=True
        )
        for precision in PRECISIONS
    }
    rows = []
    for weight_decay in histories["float32"]["weight_decay"].values:
        runs = {p: history.sel(weight_decay=weight_decay) for p, history in histories.items()}
        errors = [float(abs(run["lemma2_residual"]).max()) for run in runs.values()]
        final = runs["float32"].isel(epoch=-1)
        target, norm = final["norm_target"], final["weight_norm_sq"].sel(layer="head")
        cells = (final["fit_loss"].sel(split="train"), weight_decay * target, weight_decay * norm)
        rows.append((f"{weight_decay:g}", *(f"{e:.1e}" for e in errors), *map(common.over_seeds, cells)))
    common.show(
        "Lemma 2: greatest error |L - right side|/L over 12 epochs x 3 seeds x layers; and what forbids interpolation",
        ("lambda", "float32", "float64", "fit loss", "mean <r, f>", "lambda ||W_L||^2"),
        rows,
    )
    common.save(_figure(histories), "lemma2")


def _figure(histories):
    figure, (errors, forbidden) = panels.frame(2, "", "Digits, 6 weight decays x 3 seeds")
    for (precision, history), colour in zip(histories.items(), panels.COLOURS, strict=False):
        values = history["lemma2_residual"]
        greatest = values.max(("weight_decay", "seed"))
        errors.plot(history["epoch"], greatest, color=colour, marker="o", markersize=3, linewidth=1, label=precision)
    errors.set_xscale("symlog", linthresh=1)
    errors.set_yscale("log")
    errors.set_xlabel("epoch", size=panels.SIZE)
    errors.set_ylabel(r"$|L-\mathrm{right\ side}|\,/\,L$", size=panels.SIZE)
    errors.set_title("Lemma 2: greatest error of 18 runs", size=panels.SIZE)
    errors.legend(fontsize=panels.SMALL, frameon=False)
    final = histories["float32"].isel(epoch=-1)
    final = final.isel(weight_decay=final["weight_decay"].values > 0)
    decays = final["weight_decay"].values
    for values, label, style, colour in (
        (final["fit_loss"].sel(split="train"), "fit term of the loss", "-", panels.COLOURS[0]),
        (decays[:, None] * final["norm_target"], r"mean $\langle r,f\rangle$", "-", panels.COLOURS[1]),
        (decays[:, None] * final["weight_norm_sq"].sel(layer="head"), r"$\lambda\Vert W_L\Vert^2$", "--", "black"),
    ):
        forbidden.plot(
            decays, panels.over_seeds(values)[0], color=colour, linestyle=style, marker="o", markersize=3, label=label
        )
    forbidden.set_xscale("log")
    forbidden.set_yscale("log")
    forbidden.set_xlabel(r"weight decay $\lambda$", size=panels.SIZE)
    forbidden.set_title("At equilibrium residuals carry the norms", size=panels.SIZE)
    forbidden.legend(fontsize=panels.SMALL, frameon=False)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
