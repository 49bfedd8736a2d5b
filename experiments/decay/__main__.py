"""Coupled, decoupled, Adam, AdamW: who reaches which equilibrium?"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from configs import digits
from experiments import common
from ncjax.report import panels
from ncjax.report.panels import Panel

DECAYS = (3e-4, 1e-3, 3e-3)
ADAM = {"train__optimizer": "adam", "sweep__learning_rate": 1e-3}
OPTIMIZERS = {
    "SGD, coupled": {"sweep__weight_decay": (0.0, *DECAYS)},
    # Decoupled, SGD with momentum 0.9 seeks lambda (1 - 0.9): ten times the number for the same
    # equilibrium.
    "SGD, decoupled": {
        "sweep__weight_decay": tuple(10 * x for x in DECAYS),
        "train__decay": "decoupled",
    },
    "Adam, coupled": {"sweep__weight_decay": (0.0, *DECAYS), **ADAM},
    "AdamW": {
        "sweep__weight_decay": (0.0, 0.01, 0.1, 1.0, 3.0),
        **ADAM,
        "train__optimizer": "adamw",
    },
}
LOSSES = {"square": "", "cross_entropy": "cross_entropy_"}
PANELS = (
    panels.HEAD_EQUILIBRIUM,
    Panel(
        "Norm of the head (open: what balance asks)",
        r"$\Vert W_L\Vert_F^2$",
        ("head_norm_sq", "norm_target"),
    ),
    panels.NC3,
    panels.NC1,
)


def histories(train: bool) -> dict[str, dict[str, xr.Dataset]]:
    """Returns histories by loss and optimizer."""
    common_fields = {"train__epochs": 1000, "sweep__seed": common.SEEDS}
    return {
        loss: {
            name: common.recorded(
                f"decay_{prefix}{name.lower().replace(', ', '_')}",
                common.changed(digits.get_config(), loss=loss, **common_fields, **fields),
                train,
            )
            for name, fields in OPTIMIZERS.items()
        }
        for loss, prefix in LOSSES.items()
    }


def tables(by_loss: Mapping[str, Mapping[str, xr.Dataset]]) -> dict[str, common.Table]:
    return {loss: _table(loss, by_optimizer) for loss, by_optimizer in by_loss.items()}


def _table(loss: str, by_optimizer: Mapping[str, xr.Dataset]) -> common.Table:
    rows, headings = [], ()
    for name, history in by_optimizer.items():
        final = history.isel(epoch=-1).sel(split="train")
        norms = final["weight_norm_sq"]
        of_head = norms.sel(layer="head")
        shown = {
            "train acc": final["accuracy"],
            "head eq. residual": final["equilibrium_residual"].sel(layer="head"),
            "least/greatest norm^2": norms.min("layer") / norms.max("layer"),
            "norm^2/target": of_head / final["norm_target"],
            # As Zhao et al. (ICLR 2026) define it: ||1^T W_L||.
            "nc0": (common.sum_of_rows(final) * of_head) ** 0.5,
            "nc1": final["nc1"],
            "etf_error": final["etf_error"],
            "nc3": final["nc3"],
            "epsilon": final["epsilon"],
        }
        effective = [
            "-" if name == "AdamW" else common.number(value) for value in _effective(history)
        ]
        decays = map(common.number, final["weight_decay"].values)
        rows += [
            (name, *row)
            for row in zip(decays, effective, *map(common.per_decay, shown.values()), strict=True)
        ]
        headings = (f"optimizer (n = {history.sizes['seed']})", "lambda", "effective", *shown)
    return common.Table(
        f"Digits, {loss.replace('_', '-')}, 1000 epochs; training split", headings, rows
    )


def main(train: bool) -> None:
    by_loss = histories(train)
    common.print_tables(tables(by_loss))
    for loss, by_optimizer in by_loss.items():
        by_effective = {
            name: h.assign_coords(weight_decay=_effective(h)) for name, h in by_optimizer.items()
        }
        remark = (
            f"{loss.replace('_', '-')} loss; weight decay: the effective one; "
            "AdamW has none, hence as given"
        )
        figure, _ = panels.against_lambda(by_effective, PANELS, remark)
        common.save(figure, "decay", f"decay_{loss}")


def _effective(history: xr.Dataset) -> np.ndarray:
    return history["effective_decay"].isel(epoch=-1, seed=0).values


if __name__ == "__main__":
    common.start(main, __doc__)
