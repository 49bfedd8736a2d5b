"""Coupled, decoupled, Adam, AdamW: who reaches which equilibrium?"""

from configs import digits
from experiments import common
from ncjax import panels
from ncjax.panels import Panel

DECAYS = (1e-4, 3e-4, 1e-3, 3e-3)
OPTIMIZERS = {
    "SGD, coupled": {"sweep__weight_decay": DECAYS},
    # Decoupled, SGD with momentum 0.9 seeks lambda (1 - 0.9): ten times the number for the same equilibrium.
    "SGD, decoupled": {"sweep__weight_decay": tuple(10 * x for x in DECAYS), "train__decay": "decoupled"},
    "Adam, coupled": {"sweep__weight_decay": DECAYS, "train__optimizer": "adam", "sweep__learning_rate": 1e-3},
    "AdamW": {"sweep__weight_decay": (0.01, 0.1, 1.0, 3.0), "train__optimizer": "adamw", "sweep__learning_rate": 1e-3},
}
PANELS = (
    panels.HEAD_EQUILIBRIUM,
    Panel("Norm of the head (open: what balance asks)", r"$\Vert W_L\Vert_F^2$", ("head_norm_sq", "norm_target")),
    panels.NC3,
    panels.NC1,
)


def main(train: bool) -> None:
    histories = {
        name: common.recorded(
            "decay_" + name.lower().replace(", ", "_"),
            common.changed(digits.get_config(), train__epochs=1000, **fields),
            train,
        )
        for name, fields in OPTIMIZERS.items()
    }
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
