"""Where W_L^c = epsilon/(lambda (C-1)) (mu_c - mu_G) holds, and by the budget why not where it does not."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from configs import ufm
from experiments import common
from ncjax import panels
from ncjax.history import BUDGET_TERMS

TERMS = tuple(BUDGET_TERMS)


def histories(train: bool) -> dict[str, dict[str, xr.Dataset]]:
    features = {
        name: common.recorded(
            f"ufm_{name.replace(' ', '_')}",
            common.changed(ufm.get_config(), sweep__weight_decay=(3e-3, 6e-3, 1.2e-2, 2.4e-2), **fields),
            train,
        )
        for name, fields in common.SETTINGS.items()
    }
    return {"UFM": features, "digits": common.relaxed_digits(train)}


def tables(histories: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, common.Table]:
    return {
        "ufm": _table("UFM, over lambda and seeds", histories["UFM"], lambda values: [common.over_seeds(values)]),
        "digits": _table("digits, over seeds", histories["digits"], common.per_decay),
    }


def _table(
    caption: str, by_setting: Mapping[str, xr.Dataset], formatted: Callable[[xr.DataArray], Sequence[str]]
) -> common.Table:
    """Returns the errors and budgets of one network; `formatted` makes one cell or one for every weight decay."""
    rows, runs = [], 0
    for setting, history in by_setting.items():
        final = history.isel(epoch=-1)
        values = [final["theorem_residual"], final["nc3"].sel(split="train"), *(final[f"budget_{t}"] for t in TERMS)]
        columns = [formatted(one.where(abs(one) > 1e-6, 0)) for one in values]
        decays = list(map(common.number, final["weight_decay"].values))
        decays = decays if len(columns[0]) > 1 else [f"{decays[0]} to {decays[-1]}"]
        rows += [(setting, *row) for row in zip(decays, *columns, strict=True)]
        runs = history["theorem_residual"].isel(epoch=-1).size // len(decays)
    return common.Table(
        f"Error of the theorem, and lambda W_L by the budget (shares that sum to 1; below 1e-6: 0): {caption}",
        (f"setting (n = {runs})", "lambda", "error", "nc3", *TERMS),
        rows,
    )


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    common.save(_figure(recorded["digits"]), "theorem")


def _figure(by_setting):
    """Error of the theorem against lambda, and the norms of what stands against it."""
    figure, axes = panels.frame(1 + len(by_setting), r"weight decay $\lambda$", "Digits at equilibrium")
    for (setting, history), colour, marker in zip(by_setting.items(), panels.COLOURS, panels.MARKERS, strict=False):
        decays = history["weight_decay"].values
        values = panels.over_seeds(history["theorem_residual"].isel(epoch=-1))
        axes[0].plot(decays, values[0], color=colour, marker=marker, markersize=3.5, linewidth=1, label=setting)
        axes[0].vlines(decays, values[1], values[2], color=colour, linewidth=1)
    axes[0].set_title("Error of the theorem", size=panels.SIZE)
    axes[0].set_ylabel(r"$\Vert W_L-W_{\rm theorem}\Vert\,/\,\Vert W_L\Vert$", size=panels.SIZE)
    axes[0].legend(fontsize=panels.SMALL, frameon=False)
    axes[0].set_xscale("log")
    axes[0].set_ylim(0)
    for ax, (setting, history) in zip(axes[1:], by_setting.items(), strict=True):
        final = history.isel(epoch=-1)
        decays = final["weight_decay"].values
        whole = final["weight_norm_sq"].isel(layer=-1) ** 0.5 * final["effective_decay"]
        for i, term in enumerate(TERMS[1:]):
            norms = panels.over_seeds(final[f"budget_{term}_norm"] / whole)[0]
            ax.bar(np.arange(len(decays)) + 0.2 * (i - 1.5), norms, width=0.2, color=panels.COLOURS[3 + i], label=term)
        ax.set_xticks(range(len(decays)), [panels.number(decay) for decay in decays])
        ax.set_title(f"What stands against it: {setting}", size=panels.SIZE)
        ax.set_ylabel(r"norm, of $\Vert\lambda W_L\Vert$", size=panels.SIZE)
        ax.set_ylim(0, 0.8)
    axes[1].legend(fontsize=panels.SMALL, frameon=False)
    figure.supxlabel("means over n = 2 seeds; error bars of the first panel: least to greatest", size=panels.SMALL)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
