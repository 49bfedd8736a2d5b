"""Where W_L^c = epsilon/(lambda (C-1)) (mu_c - mu_G) holds, and by the budget why not where it does not."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from configs import digits, ufm
from experiments import common
from ncjax import panels
from ncjax.config import Config
from ncjax.history import BUDGET_TERMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What stands against the theorem.
TERMS = tuple(BUDGET_TERMS)[1:]
LONGER = "digits, longer"
MEASURES = {"theorem_residual": "error", "nc3": "nc3", "etf_error": "etf_error"}


def histories(train: bool) -> dict[str, dict[str, xr.Dataset]]:
    """Returns histories by network and setting; `LONGER` goes on to smaller lambda with a free bias."""
    decays = {"sweep__weight_decay": (3e-3, 6e-3, 1.2e-2, 2.4e-2)}
    features = {
        name: common.recorded(
            f"ufm_{name.replace(' ', '_')}", common.changed(ufm.get_config(), **decays, **fields), train
        )
        for name, fields in common.SETTINGS.items()
    }
    longer = common.recorded("digits_free_bias_long", long_digits(), train)
    return {"UFM": features, "digits": common.relaxed_digits(train), LONGER: {"free bias": longer}}


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


def tables(networks: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, common.Table]:
    longer = networks[LONGER]["free bias"]
    relaxed = list(networks["digits"].items())
    of_features = (row for setting, history in networks["UFM"].items() for row in _rows(setting, history, (0, -1)))
    of_digits = (
        row
        for setting, history in [("free bias, longer", longer), *relaxed]
        for row in _rows(setting, history, range(history.sizes["weight_decay"]))
    )
    tables = {}
    for name, history, rows in (("ufm", networks["UFM"]["no bias"], of_features), ("digits", longer, of_digits)):
        caption = f"Error of the theorem at the end ({name}), and norms of the budget's terms over that of lambda W_L"
        headings = (f"setting (n = {history.sizes['seed']})", "lambda", "2 lambda t", *MEASURES.values(), *TERMS)
        tables[name] = common.Table(caption, headings, list(rows))
    return tables


def _rows(setting: str, history: xr.Dataset, places: Iterable[int]) -> Iterator[list[str]]:
    """Yields a row for the weight decays at `places`; below 1e-6 is 0."""
    final = history.isel(epoch=-1).sel(split="train")
    for place in places:
        run = final.isel(weight_decay=place)
        cells = (run["relaxation_time"], *(run[name] for name in MEASURES), *(_against(run, term) for term in TERMS))
        shown = (common.over_seeds(cell.where(~(abs(cell) < 1e-6), 0)) for cell in cells)
        yield [setting, common.number(run["weight_decay"].item()), *shown]


def _against(run: xr.Dataset, term: str) -> xr.DataArray:
    """Norm of a term of the budget, of that of lambda W_L."""
    whole = run["weight_norm_sq"].isel(layer=-1, drop=True) ** 0.5 * run["effective_decay"]
    return run[f"budget_{term}_norm"] / whole


def main(train: bool) -> None:
    networks = histories(train)
    common.print_tables(tables(networks))
    common.save(_figure(_finals(networks)), "theorem")


def _finals(networks: dict[str, dict[str, xr.Dataset]]) -> dict[str, xr.Dataset]:
    """The last epoch of digits by setting, with the smaller lambdas where they were trained."""
    finals = {}
    for setting, history in networks["digits"].items():
        longer = networks[LONGER].get(setting)
        parts = [h.isel(epoch=-1, drop=True) for h in (longer, history) if h is not None]
        finals[setting] = xr.concat(parts, "weight_decay", data_vars="all") if len(parts) > 1 else parts[0]
    return finals


def _figure(finals: dict[str, xr.Dataset]) -> "Figure":
    """Error of the theorem against lambda, and the norms of what stands against it."""
    figure, axes = panels.frame(1 + len(finals), r"weight decay $\lambda$", "Digits, the head near equilibrium")
    for (setting, final), colour, marker in zip(finals.items(), panels.COLOURS, panels.MARKERS, strict=False):
        decays = final["weight_decay"].values
        values = panels.over_seeds(final["theorem_residual"])
        axes[0].plot(decays, values[0], color=colour, marker=marker, markersize=3.5, linewidth=1, label=setting)
        axes[0].vlines(decays, values[1], values[2], color=colour, linewidth=1)
    axes[0].set_title("Error of the theorem", size=panels.SIZE)
    axes[0].set_ylabel(r"$\Vert W_L-W_{\rm theorem}\Vert\,/\,\Vert W_L\Vert$", size=panels.SIZE)
    axes[0].legend(fontsize=panels.SMALL, frameon=False)
    axes[0].set_xscale("log")
    axes[0].set_ylim(0)
    for ax, (setting, final) in zip(axes[1:], finals.items(), strict=True):
        decays = final["weight_decay"].values
        for i, term in enumerate(TERMS):
            norms = panels.over_seeds(_against(final, term))[0]
            ax.bar(np.arange(len(decays)) + 0.2 * (i - 1.5), norms, width=0.2, color=panels.COLOURS[3 + i], label=term)
        ax.set_xticks(range(len(decays)), [panels.number(decay) for decay in decays])
        ax.set_title(f"What stands against it: {setting}", size=panels.SIZE)
        ax.set_ylabel(r"norm, of $\Vert\lambda W_L\Vert$", size=panels.SIZE)
        ax.set_ylim(0, 0.8)
    axes[1].legend(fontsize=panels.SMALL, frameon=False)
    seeds = common.seeds_of(finals.values())
    figure.supxlabel(f"means over {seeds}; error bars of the first panel: least to greatest", size=panels.SMALL)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
