"""Does the theorem's own class of networks collapse on all of MNIST, from the smallest weight decay
to one that nearly kills it, and what holds it back?
"""

from collections.abc import Mapping

import xarray as xr

from configs import mnist
from experiments import common
from experiments.bounds import __main__ as bounds
from experiments.clock import __main__ as clock
from ncjax.config import Config
from ncjax.metrics.vocabulary import BUDGET_TERMS
from ncjax.report import figures, panels, theory_figures

# Heading: the variable, and what selects one number a run of it.
COLLAPSE = {
    "train acc": ("accuracy", {"split": "train"}),
    "test acc": ("accuracy", {"split": "test"}),
    "nc1": ("nc1", {"split": "train"}),
    "nc2 etf_error": ("etf_error", {"split": "train"}),
    "nc3": ("nc3", {"split": "train"}),
    "nc4": ("nc4", {"split": "train"}),
    "residual, head": ("equilibrium_residual", {"layer": "head"}),
    "2 lambda t": ("relaxation_time", {}),
}
THEOREM = {
    "error": ("theorem_residual", {}),
    **{term: (f"budget_{term}", {}) for term in BUDGET_TERMS},
}


def _lambdas() -> Config:
    """Returns the sweep over lambda: 2 lambda t is 3.2 at 3e-4, and in proportion elsewhere."""
    return common.changed(
        mnist.get_config(),
        train__epochs=25,
        log__epochs=(0, 1, 3, 8, 16, 25),
        sweep__weight_decay=(0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        sweep__seed=common.SEEDS,
    )


def _clock() -> Config:
    """Returns learning rates x momenta at a constant learning rate; two of the four have one
    lr/(1 - momentum).
    """
    return common.changed(
        mnist.get_config(),
        train__epochs=8,
        train__schedule="constant",
        log__epochs=(0, 1, 2, 3, 5, 8),
        sweep__weight_decay=1e-3,
        sweep__learning_rate=(0.05, 0.1),
        sweep__momentum=(0.8, 0.9),
    )


def histories(train: bool) -> dict[str, xr.Dataset]:
    return {
        name: common.recorded(
            f"mnist_mlp_{name}", config, train, every_epoch=True, variables=variables
        )
        for name, config, variables in (
            ("lambda", _lambdas(), common.NOT_BY_CLASS),
            ("clock", _clock(), clock.VARIABLES),
        )
    }


def tables(found: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    final = found["lambda"].isel(epoch=-1)
    decayed = {"MNIST": final.isel(weight_decay=final["weight_decay"].values > 0)}
    return {
        "collapse": common.by_decay(
            "At the last epoch; mean ± sd over seeds, in bold the least",
            final,
            COLLAPSE,
            least_in_bold=True,
        ),
        "theorem": common.by_decay(
            "The theorem's error, and the budget as shares of lambda W_L",
            decayed["MNIST"],
            THEOREM,
        ),
        "bounds": common.Table(
            "Measured, and what it is proved to be at most and at least; means over seeds",
            *bounds.rows_of(decayed, bounds.measured_and_bound),
        ),
        "causes": common.Table(
            "Shares of causes in the bounds; mean ± sd over seeds",
            *bounds.rows_of(decayed, bounds.shares_of_causes),
        ),
        "clock": _by_factor(found["clock"]),
    }


def _by_factor(history: xr.Dataset) -> common.Table:
    rows = []
    for measure in clock.MEASURES:
        logs = clock.at_clock(history, measure, clock.POINTS).mean("seed")
        rows += clock.rows_by_factor(measure, logs)
    return common.Table(
        "Largest over least at equal 2 lambda t, mean (largest) over groups",
        (
            f"measure (n = {history.sizes['seed']})",
            "what differs",
            *(f"{point:g}" for point in clock.POINTS),
        ),
        rows,
    )


def main(train: bool) -> None:
    found = histories(train)
    common.print_tables(tables(found))
    history = found["lambda"]
    images, epochs = int(history.attrs["per_class"]), int(history["epoch"][-1])
    title = f"MNIST, 784-512-512-512-10: {images:,} images a class, {epochs} epochs"
    curves = panels.one_per_lambda(history)
    common.save(panels.against(curves, figures.PANELS, title), "mnist_mlp")
    figure = theory_figures.bounds_against_lambda_and_epoch(history, 1e-3)
    common.save(figure, "mnist_mlp", "mnist_mlp_bounds")


if __name__ == "__main__":
    common.start(main, __doc__)
