"""Where W_L^c = epsilon/(lambda (C-1)) (mu_c - mu_G) holds, and by the budget why not where it
does not.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from configs import digits, ufm
from experiments import common
from ncjax.metrics.vocabulary import BUDGET_TERMS
from ncjax.report import panels

TERMS = tuple(BUDGET_TERMS)
# Small lambdas take long to relax: 2 lambda t is 3.1 at the least of these.
LONGER = {
    "model__head_bias": "free",
    "train__epochs": 14_000,
    "checkpoint__every": 1000,
    "sweep__weight_decay": (1e-5, 3e-5),
    "sweep__seed": common.SEEDS,
}


def histories(train: bool) -> dict[str, dict[str, xr.Dataset]]:
    features = {
        name: common.recorded(
            f"ufm_{name.replace(' ', '_')}",
            common.changed(
                ufm.get_config(), sweep__weight_decay=(3e-3, 6e-3, 1.2e-2, 2.4e-2), **fields
            ),
            train,
        )
        for name, fields in common.SETTINGS.items()
    }
    longer = common.recorded(
        "digits_free_bias_long", common.changed(digits.get_config(), **LONGER), train
    )
    return {
        "UFM": features,
        "digits": common.relaxed_digits(train),
        "longer": {"free bias": longer},
    }


def tables(histories: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, common.Table]:
    return {
        "ufm": _table(
            "UFM, over lambda and seeds",
            histories["UFM"],
            lambda values: [common.over_seeds(values)],
        ),
        "digits": _table("digits, over seeds", histories["digits"], common.per_decay),
        "small": _norms([histories[name]["free bias"] for name in ("longer", "digits")]),
    }


def _table(
    caption: str,
    by_setting: Mapping[str, xr.Dataset],
    formatted: Callable[[xr.DataArray], Sequence[str]],
) -> common.Table:
    """Returns the errors and budgets of one network; `formatted` makes one cell or one for every
    weight decay.
    """
    rows, runs = [], 0
    for setting, history in by_setting.items():
        final = history.isel(epoch=-1)
        values = [
            final["theorem_residual"],
            final["nc3"].sel(split="train"),
            *(final[f"budget_{t}"] for t in TERMS),
        ]
        columns = [formatted(one.where(abs(one) > 1e-6, 0)) for one in values]
        decays = list(map(common.number, final["weight_decay"].values))
        decays = decays if len(columns[0]) > 1 else [f"{decays[0]} to {decays[-1]}"]
        rows += [(setting, *row) for row in zip(decays, *columns, strict=True)]
        runs = history["theorem_residual"].isel(epoch=-1).size // len(decays)
    return common.Table(
        "Error of the theorem, and lambda W_L by the budget (shares that sum to 1; below 1e-6: "
        f"0): {caption}",
        (f"setting (n = {runs})", "lambda", "error", "nc3", *TERMS),
        rows,
    )


def _norms(parts: Sequence[xr.Dataset]) -> common.Table:
    """Returns what stands against the theorem at each lambda of several histories, as norms."""
    rows, headings = [], ()
    for history in parts:
        final = history.isel(epoch=-1).sel(split="train")
        columns = {
            "2 lambda t": final["relaxation_time"],
            "error": final["theorem_residual"],
            "nc3": final["nc3"],
            "etf_error": final["etf_error"],
            **{term: _against(final, term) for term in TERMS[2:]},
        }
        decays = map(common.number, final["weight_decay"].values)
        rows += zip(
            decays,
            [str(history.sizes["seed"])] * len(final["weight_decay"]),
            *map(common.per_decay, columns.values()),
            strict=True,
        )
        headings = ("lambda", "n", *columns)
    return common.Table(
        "digits, free bias: norms of the budget's terms over that of lambda W_L", headings, rows
    )


def _against(final: xr.Dataset, term: str) -> xr.DataArray:
    """Norm of a term of the budget, of that of lambda W_L."""
    whole = final["weight_norm_sq"].isel(layer=-1, drop=True) ** 0.5 * final["effective_decay"]
    return final[f"budget_{term}_norm"] / whole


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    common.save(_figure(recorded["digits"]), "theorem")


def _figure(by_setting):
    """Error of the theorem against lambda, and the norms of what stands against it."""
    figure, axes = panels.frame(
        1 + len(by_setting), r"weight decay $\lambda$", "Digits, the head near equilibrium"
    )
    for (setting, history), colour, marker in zip(
        by_setting.items(), panels.COLOURS, panels.MARKERS, strict=False
    ):
        decays = history["weight_decay"].values
        values = panels.over_seeds(history["theorem_residual"].isel(epoch=-1))
        axes[0].plot(
            decays,
            values[0],
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1,
            label=setting,
        )
        axes[0].vlines(decays, values[1], values[2], color=colour, linewidth=1)
    axes[0].set_title("Error of the theorem", size=panels.SIZE)
    axes[0].set_ylabel(r"$\Vert W_L-W_{\rm theorem}\Vert\,/\,\Vert W_L\Vert$", size=panels.SIZE)
    axes[0].legend(fontsize=panels.SMALL, frameon=False)
    axes[0].set_xscale("log")
    axes[0].set_ylim(0)
    for ax, (setting, history) in zip(axes[1:], by_setting.items(), strict=True):
        final = history.isel(epoch=-1)
        decays = final["weight_decay"].values
        for i, term in enumerate(TERMS[1:]):
            norms = panels.over_seeds(_against(final, term))[0]
            ax.bar(
                np.arange(len(decays)) + 0.2 * (i - 1.5),
                norms,
                width=0.2,
                color=panels.COLOURS[3 + i],
                label=term,
            )
        ax.set_xticks(range(len(decays)), [panels.number(decay) for decay in decays])
        ax.set_title(f"What stands against it: {setting}", size=panels.SIZE)
        ax.set_ylabel(r"norm, of $\Vert\lambda W_L\Vert$", size=panels.SIZE)
        ax.set_ylim(0, 0.8)
    axes[1].legend(fontsize=panels.SMALL, frameon=False)
    seeds = panels.caption_of(list(by_setting.values()))
    figure.supxlabel(
        f"{seeds}; error bars of the first panel: least to greatest", size=panels.SMALL
    )
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
