"""Does batch normalization straight before the head bring collapse, with weight decay, as Pan & Cao
(2023) claim?
"""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

import ncjax
from configs import digits
from experiments import common
from ncjax.report import panels
from ncjax.storage import history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
VARIED = {
    "loss": ("cross_entropy", "square"),
    "model.feature_normalization": ("none", "batch"),
}
VARIABLES = (
    "accuracy",
    "finite",
    "loss",
    "fit_loss",
    "nc0",
    "nc1",
    "etf_error",
    "nc3",
    "nc4",
    "epsilon",
    "weight_norm_sq",
    "equilibrium_residual",
)
MEASURES = {
    "train acc": "accuracy",
    "test acc": "test_accuracy",
    "intra": "intra_cosine",
    "least intra": "least_intra_cosine",
    "inter": "inter_cosine",
    "greatest inter": "greatest_inter_cosine",
    "intra, uncentred": "intra_cosine_uncentred",
    "inter, uncentred": "inter_cosine_uncentred",
    "nc1": "nc1",
    "etf_error": "etf_error",
    "nc3": "nc3",
    "equilibrium residual, head": "head_residual",
}


def cosines(features: Float[np.ndarray, "M p"], labels: Int[np.ndarray, " M"]) -> dict[str, float]:
    """Returns means of cosines between features, within classes and between them.

    They are means over all pairs of examples, of one class for `intra_cosine` and of two for
    `inter_cosine`, of the cosine about the mean of the class means and, `_uncentred`, about 0; then
    over classes, or pairs of classes. A simplex ETF that has collapsed has 1 and -1/(C-1).
    """
    found = {}
    classes = np.unique(labels)
    center = np.mean([features[labels == c].mean(0) for c in classes], axis=0)
    for suffix, origin in (("", center), ("_uncentred", 0.0)):
        directions = features.astype(np.float64) - origin
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        # The mean cosine of all pairs is the product of the mean directions.
        means = np.stack([directions[labels == c].mean(0) for c in classes])
        products = means @ means.T
        within = np.diagonal(products)
        between = products[~np.eye(len(classes), dtype=bool)]
        found |= {
            f"intra_cosine{suffix}": float(within.mean()),
            f"least_intra_cosine{suffix}": float(within.min()),
            f"inter_cosine{suffix}": float(between.mean()),
            f"greatest_inter_cosine{suffix}": float(between.max()),
        }
    return found


def histories(train: bool) -> dict[str, xr.Dataset]:
    """Returns by loss the runs with and without the normalization, and their cosines."""
    config = common.changed(
        digits.get_config(), sweep__weight_decay=DECAYS, sweep__seed=common.SEEDS
    )
    recorded = common.recorded("batch_norm", config, train, variables=VARIABLES, vary=VARIED)
    if train:
        recorded = recorded.assign(_cosines_of_runs(recorded).data_vars)
        history.save(recorded, common.HISTORIES / "batch_norm.nc")
    found = recorded.isel(epoch=-1).sel(split="train")
    found = found.assign(
        test_accuracy=recorded["accuracy"].isel(epoch=-1).sel(split="test"),
        head_residual=found["equilibrium_residual"].sel(layer="head", drop=True),
    )
    return {loss: found.sel(loss_function=loss) for loss in VARIED["loss"]}


def _cosines_of_runs(recorded: xr.Dataset) -> xr.Dataset:
    """Returns `cosines` of the training features of every run."""
    dims = ("loss_function", "feature_normalization", "weight_decay", "seed")
    found = []
    for place in itertools.product(*(recorded[dim].values.tolist() for dim in dims)):
        run = ncjax.load_run(
            common.REPO / "runs" / "experiments" / "batch_norm",
            **dict(zip(dims, place, strict=True)),
        )
        images, labels = run.dataset.train
        found.append(cosines(np.asarray(run.features(images)), np.asarray(labels)))
    shape = [recorded.sizes[dim] for dim in dims]
    variables = {
        name: (dims, np.array([one[name] for one in found]).reshape(shape)) for name in found[0]
    }
    return xr.Dataset(variables, {dim: recorded[dim].values for dim in dims})


def tables(found: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    return {
        loss: common.Table(f"Digits, {loss.replace('_', '-')}, at the last epoch", *_rows(final))
        for loss, final in found.items()
    }


def _rows(final: xr.Dataset) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for kind in final["feature_normalization"].values.tolist():
        one = final.sel(feature_normalization=kind)
        decays = map(common.number, one["weight_decay"].values)
        columns = [common.per_decay(one[name]) for name in MEASURES.values()]
        rows += [(kind, *row) for row in zip(decays, *columns, strict=True)]
    return (f"before the head (n = {final.sizes['seed']})", "lambda", *MEASURES), rows


PANELS = {
    panels.Panel("Cosine within classes", r"1 - mean of $\cos$", ()): (
        lambda run: 1 - run["intra_cosine"]
    ),
    panels.Panel("Cosine between classes", r"$|$mean of $\cos + 1/(C-1)|$", ()): (
        lambda run: abs(run["inter_cosine"] + 1 / (run.sizes["label"] - 1))
    ),
    panels.NC1: lambda run: run["nc1"],
    panels.Panel("NC2: distance to a simplex ETF", "etf_error", ()): lambda run: run["etf_error"],
}
# What stands before the head, in the legend.
_KINDS = {"none": "no normalization", "batch": "batch normalization before the head"}


def main(train: bool) -> None:
    found = histories(train)
    common.print_tables(tables(found))
    common.save(_figure(found), "batch_norm")


def _figure(found: Mapping[str, xr.Dataset]) -> "Figure":
    """Draws cosines, NC1 and NC2 against weight decay."""
    figure, all_axes = panels.frame(len(PANELS), r"weight decay $\lambda$", "")
    handles = {}
    for axes, (panel, of) in zip(all_axes, PANELS.items(), strict=True):
        drawn = []
        decays = np.array(DECAYS)
        for (loss, final), style in zip(found.items(), ("-", "--"), strict=True):
            for kind, colour in zip(
                VARIED["model.feature_normalization"], panels.COLOURS, strict=False
            ):
                values = of(final.sel(feature_normalization=kind))
                mean, least, greatest = panels.over_seeds(values)
                look = {"color": colour, "linestyle": style, "linewidth": 1}
                axes.plot(decays, mean, marker="o", markersize=3, **look)
                axes.fill_between(decays, least, greatest, color=colour, alpha=0.15, linewidth=0)
                words = f"{loss.replace('_', '-')}, {_KINDS[kind]}"
                handles[words] = common.legend_line(words, **look)
                drawn += [mean, least, greatest]
        panels.scale_x(axes, decays, broken=True)
        panels.finish(axes, panel, np.concatenate(drawn))
    seeds = next(iter(found.values())).sizes["seed"]
    caption = f"digits, training split; mean over n = {seeds} seeds, band: least to greatest"
    panels.legend(figure, list(handles.values()), caption)
    return figure


if __name__ == "__main__":
    common.start(main, __doc__)
