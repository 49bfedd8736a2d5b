"""Coupled, decoupled, Adam, AdamW: who reaches which equilibrium?"""

import xarray as xr

from configs import digits
from experiments import common
from ncjax import panels
from ncjax.panels import Panel

DECAYS = (3e-4, 1e-3, 3e-3)
ADAM = {"train__optimizer": "adam", "sweep__learning_rate": 1e-3}
OPTIMIZERS = {
    "SGD, coupled": {"sweep__weight_decay": (0.0, *DECAYS)},
    # Decoupled, SGD with momentum 0.9 seeks lambda (1 - 0.9): ten times the number for the same equilibrium.
    "SGD, decoupled": {"sweep__weight_decay": tuple(10 * x for x in DECAYS), "train__decay": "decoupled"},
    "Adam, coupled": {"sweep__weight_decay": (0.0, *DECAYS), **ADAM},
    "AdamW": {"sweep__weight_decay": (0.0, 0.01, 0.1, 1.0, 3.0), **ADAM, "train__optimizer": "adamw"},
}
LOSSES = {"square": "", "cross_entropy": "cross_entropy_"}
PANELS = (
    panels.HEAD_EQUILIBRIUM,
    Panel("Norm of the head (open: what balance asks)", r"$\Vert W_L\Vert_F^2$", ("head_norm_sq", "norm_target")),
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


def main(train: bool) -> None:
    rows = []
    for name, history in histories.items():
        final = history.isel(epoch=-1).sel(split="train")
        for weight_decay in final["weight_decay"].values:
            run = final.sel(weight_decay=weight_decay)
            norms = run["weight_norm_sq"]
            cells = (
                run["accuracy"],
                run["equilibrium_residual"].sel(layer="head"),
                norms.min("layer") / norms.max("layer"),
                norms.sel(layer="head") / run["norm_target"],
                run["nc1"],
                run["nc3"],
                run["epsilon"],
            )
            effective = f"{float(run['effective_decay'][0]):.3g}"
            rows.append((name, f"{weight_decay:g}", effective, *map(common.over_seeds, cells)))
    headings = ("optimizer", "lambda", "effective", "train acc", "head eq. residual", "least/greatest ||W_k||^2")
    common.show(
        "Digits, 1000 epochs, mean±sd over 3 seeds",
        (*headings, "||W_L||^2/target", "nc1", "nc3", "epsilon"),
        rows,
    )
    by_effective = {name: h.assign_coords(weight_decay=_effective(h)) for name, h in histories.items()}
    figure, _ = panels.against_lambda(
        by_effective, PANELS, "weight decay: the effective one; AdamW has none, hence as given"
    )
    common.save(figure, "decay")


def _effective(history):
    return history["effective_decay"].isel(epoch=-1, seed=0).values


if __name__ == "__main__":
    common.start(main, __doc__)
