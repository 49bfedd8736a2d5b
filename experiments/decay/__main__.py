"""Coupled, decoupled, Adam, AdamW: who reaches which equilibrium?"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from configs import digits
from experiments import common
from ncjax.report import panels
from ncjax.report.panels import Panel

DECAYS = (1e-4, 3e-4, 1e-3, 3e-3)
OPTIMIZERS = {
    "SGD, coupled": {"sweep__weight_decay": DECAYS},
    # Decoupled, SGD with momentum 0.9 seeks lambda (1 - 0.9): ten times the number for the same
    # equilibrium.
    "SGD, decoupled": {
        "sweep__weight_decay": tuple(10 * x for x in DECAYS),
        "train__decay": "decoupled",
    },
    "Adam, coupled": {
        "sweep__weight_decay": DECAYS,
        "train__optimizer": "adam",
        "sweep__learning_rate": 1e-3,
    },
    "AdamW": {
        "sweep__weight_decay": (0.01, 0.1, 1.0, 3.0),
        "train__optimizer": "adamw",
        "sweep__learning_rate": 1e-3,
    },
}
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


def histories(train: bool) -> dict[str, xr.Dataset]:
    return {
        name: common.recorded(
            "decay_" + name.lower().replace(", ", "_"),
            common.changed(digits.get_config(), train__epochs=1000, **fields),
            train,
        )
        for name, fields in OPTIMIZERS.items()
    }


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    rows, headings = [], ()
    for name, history in histories.items():
        final = history.isel(epoch=-1).sel(split="train")
        norms = final["weight_norm_sq"]
        shown = {
            "train acc": final["accuracy"],
            "head eq. residual": final["equilibrium_residual"].sel(layer="head"),
            "least/greatest norm^2": norms.min("layer") / norms.max("layer"),
            "norm^2/target": norms.sel(layer="head") / final["norm_target"],
            "nc1": final["nc1"],
            "nc3": final["nc3"],
            "epsilon": final["epsilon"],
        }
        effective = [
            "-" if np.isnan(value) else common.number(value) for value in _effective(history)
        ]
        columns = [
            map(common.number, final["weight_decay"].values),
            effective,
            *map(common.per_decay, shown.values()),
        ]
        rows += [(name, *row) for row in zip(*columns, strict=True)]
        headings = (f"optimizer (n = {history.sizes['seed']})", "lambda", "effective", *shown)
    return {
        "equilibria": common.Table(
            "Digits, 1000 epochs, mean ± sd over seeds; training split", headings, rows
        )
    }


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    by_effective = {
        name: h.assign_coords(weight_decay=_effective(h)) for name, h in recorded.items()
    }
    figure, _ = panels.against_lambda(
        by_effective, PANELS, "weight decay: the effective one; AdamW has none, hence as given"
    )
    common.save(figure, "decay")


def _effective(history):
    return history["effective_decay"].isel(epoch=-1, seed=0).values


if __name__ == "__main__":
    common.start(main, __doc__)
