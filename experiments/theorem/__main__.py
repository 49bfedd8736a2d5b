"""Where W_L^c = epsilon/(lambda (C-1)) (mu_c - mu_G) holds, and by the budget why not where it does not."""

import numpy as np
import xarray as xr

from configs import digits, ufm
from experiments import common
from ncjax import panels
from ncjax.config import Config
from ncjax.history import BUDGET_TERMS

TERMS = tuple(BUDGET_TERMS)


def histories(train: bool) -> dict[str, dict[str, xr.Dataset]]:
    """Returns histories by network and setting; `digits, longer` goes on to smaller lambda with a free bias."""
    decays = {"sweep__weight_decay": (3e-3, 6e-3, 1.2e-2, 2.4e-2)}
    features = {
        name: common.recorded(
            f"ufm_{name.replace(' ', '_')}", common.changed(ufm.get_config(), **decays, **fields), train
        )
        for name, fields in common.SETTINGS.items()
    }
    longer = common.recorded("digits_free_bias_long", long_digits(), train)
    return {"UFM": features, "digits": common.relaxed_digits(train), "digits, longer": {"free bias": longer}}


def long_digits() -> Config:
    """Returns the config whose lambdas take 14,000 epochs to relax: 2 lambda t is 3.1 at the least of them."""
    fields = {
        "model__head_bias": "free",
        "train__epochs": 14_000,
        "checkpoint__every": 1000,
        "sweep__weight_decay": (1e-5, 3e-5),
        "sweep__seed": common.SEEDS,
    }
    return common.changed(digits.get_config(), **fields)


def main(train: bool) -> None:
    networks = histories(train)
    rows = []
    for network, by_setting in networks.items():
        for setting, history in by_setting.items():
            final = history.isel(epoch=-1)
            for weight_decay in history["weight_decay"].values:
                run = final.sel(weight_decay=weight_decay)
                cells = ["theorem_residual", *(f"budget_{term}" for term in TERMS)]
                error, *shares = (common.over_seeds(run[name].where(abs(run[name]) > 1e-6, 0)) for name in cells)
                nc3 = common.over_seeds(run["nc3"].sel(split="train").where(lambda x: x > 1e-6, 0))
                rows.append((network, setting, f"{weight_decay:g}", error, nc3, *shares))
    common.show(
        "Error of the theorem, and lambda W_L by the budget (shares that sum to 1; below 1e-6: 0)",
        ("network", "setting", "lambda", "theorem's error", "nc3", *TERMS),
        rows,
    )
    common.save(_figure(networks["digits"]), "theorem")


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
