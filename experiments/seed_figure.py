"""What the seed paper's two figures share: four weight decays x three seeds of two networks, and what they show."""

import argparse
import sys
from collections.abc import Callable, Iterator

import xarray as xr

from experiments import common
from ncjax import figures, panels
from ncjax.config import Config
from ncjax.errors import InputError
from ncjax.panels import Panel

NETWORKS = {"homogeneous": "", "batch_norm": "batch_norm"}
# For two CPU cores: fewer images and epochs; smaller batches, so that there are steps enough, which batch
# normalization bears at a lower learning rate.
SUBSET = {"data__per_class": 200, "train__epochs": 150, "train__batch_size": 32}
SUBSET_OF = {"homogeneous": SUBSET, "batch_norm": SUBSET | {"sweep__learning_rate": (0.04,)}}
PANELS = (
    *figures.PANELS,
    Panel("Loss without the penalty", r"mean of $\frac{1}{2}\Vert y-f\Vert^2$", ("fit_loss",)),
    panels.HEAD_EQUILIBRIUM,
)
MEASURES = {
    "NC1": "nc1",
    "NC2 equal norms, means": "nc2_equinorm_means",
    "NC2 equal norms, head": "nc2_equinorm_head",
    "NC2 equal angles, means": "nc2_equiangular_means",
    "NC2 equal angles, head": "nc2_equiangular_head",
    "NC3": "nc3",
    "NC4": "nc4",
    "equilibrium residual, head": "equilibrium_residual",
    "2 lambda t": "relaxation_time",
}


def main(name: str, get_config: Callable[[str], Config], claim: str | None) -> None:
    parser = argparse.ArgumentParser(f"python -m experiments.{name}", description=claim)
    parser.add_argument("--train", action="store_true", help="train in runs/experiments, instead of reading histories/")
    parser.add_argument(
        "--full", action="store_true", help="all images, 350 epochs, batches of 128: with --train, for an accelerator"
    )
    arguments = parser.parse_args()
    try:
        for network, variant in NETWORKS.items():
            stem = f"{name}_{network}" + ("_full" if arguments.full else "")
            if arguments.train:
                config = common.changed(get_config(variant), **({} if arguments.full else SUBSET_OF[network]))
                common.record(stem, config, every_epoch=True)
            report(common.load(stem), name, stem)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def report(history: xr.Dataset, name: str, stem: str) -> None:
    """A table of the last epoch and a figure of all."""
    per_class, epochs = int(history.attrs["per_class"]), int(history["epoch"][-1])
    title = f"{stem}: {per_class:,} images a class, {epochs} epochs"
    decays = [f"wd {wd:g}" for wd in history["weight_decay"].attrs["torch_weight_decay"]]
    common.show(f"{title}; mean±sd over {history.sizes['seed']} seeds", ("at the end", *decays), rows(history))
    factor = history["weight_decay"].values[-1] / history["weight_decay"].attrs["torch_weight_decay"][-1]
    figure = panels.against(panels.one_per_lambda(history), PANELS, rf"{title}; $\lambda$ = {factor:g} wd of PyTorch")
    common.save(figure, name, stem)


def rows(history: xr.Dataset) -> Iterator[list[str]]:
    final = history.isel(epoch=-1)
    for split in final["split"].values:
        yield [f"{split} accuracy", *map(common.over_seeds, final["accuracy"].sel(split=split))]
    for words, measure in MEASURES.items():
        values = final[measure]
        values = values.sel(split="train") if "split" in values.dims else values
        yield [words, *map(common.over_seeds, values.sel(layer="head") if "layer" in values.dims else values)]
