"""The table and the figures that README.md begins with: configs/digits.py over ten seeds."""

from collections.abc import Mapping

import xarray as xr

from experiments import common
from ncjax.metrics.vocabulary import BUDGET_TERMS
from ncjax.report import figures, theory_figures

# Heading: the variable, and what selects one number a run of it.
COLLAPSE = {
    "train acc": ("accuracy", {"split": "train"}),
    "test acc": ("accuracy", {"split": "test"}),
    "nc1": ("nc1", {"split": "train"}),
    "nc2 equinorm": ("nc2_equinorm_means", {"split": "train"}),
    "nc2 equiangular": ("nc2_equiangular_means", {"split": "train"}),
    "nc3": ("nc3", {"split": "train"}),
    "nc3 centered": ("nc3_centered", {"split": "train"}),
    "epsilon": ("epsilon", {"split": "train"}),
    "2 lambda t": ("relaxation_time", {}),
}
THEORY = {
    "nc3": ("nc3", {"split": "train"}),
    "its floor": ("nc3_floor", {}),
    "symmetric nc3": ("symmetric_nc3", {}),
    "head norm^2": ("weight_norm_sq", {"layer": "head"}),
    "symmetric norm^2": ("predicted_head_norm_sq", {}),
    "theorem's error": ("theorem_residual", {}),
    **{f"budget: {term}": (f"budget_{term}", {}) for term in BUDGET_TERMS},
}


def histories(train: bool) -> dict[str, xr.Dataset]:
    return {"digits": common.demo(train)}


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    final = histories["digits"].isel(epoch=-1)
    when = f"Epoch {int(final['epoch'])}, training split unless test is named, mean ± sd over seeds"
    return {
        "collapse": common.by_decay(
            f"{when}; in bold the least", final, COLLAPSE, least_in_bold=True
        ),
        "theory": common.by_decay(
            f"{when}; theory beside it, and the budget as shares of lambda W_L", final, THEORY
        ),
    }


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    common.save(figures.collapse_against_epoch(recorded["digits"]), "digits", "collapse")
    common.save(theory_figures.collapse_against_clock(recorded["digits"]), "digits", "clock")


if __name__ == "__main__":
    common.start(main, __doc__)
