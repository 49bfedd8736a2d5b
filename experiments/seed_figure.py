"""What the seed paper's two figures share: four weight decays x three seeds of two networks, and
what they show.
"""

import argparse
import sys
from collections.abc import Callable, Mapping

import xarray as xr

from experiments import common
from ncjax.config import Config
from ncjax.errors import InputError
from ncjax.report import figures, panels
from ncjax.report.panels import Panel

GetConfig = Callable[[str], Config]

NETWORKS = {"homogeneous": "", "batch_norm": "batch_norm"}
# For two CPU cores: fewer images and epochs; smaller batches, so that there are steps enough, which
# batch normalization bears at a lower learning rate.
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


def histories(
    train: bool, name: str, get_config: GetConfig, *, full: bool = False
) -> dict[str, xr.Dataset]:
    """Returns the history of each network, on a subset of the data or on all."""
    return {
        network: common.recorded(
            f"{name}_{network}" + ("_full" if full else ""),
            common.changed(get_config(variant), **({} if full else SUBSET_OF[network])),
            train,
            every_epoch=True,
        )
        for network, variant in NETWORKS.items()
    }


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    return {network: _table(network, history) for network, history in histories.items()}


def _table(network: str, history: xr.Dataset) -> common.Table:
    final = history.isel(epoch=-1)
    rows = [
        (f"{split} accuracy", *common.per_decay(final["accuracy"].sel(split=split)))
        for split in final["split"].values
    ]
    for words, measure in MEASURES.items():
        values = final[measure]
        values = values.sel(split="train") if "split" in values.dims else values
        values = values.sel(layer="head") if "layer" in values.dims else values
        rows.append((words, *common.per_decay(values, least_in_bold=words.startswith("NC"))))
    decays = [f"wd {common.number(decay)}" for decay in _of_pytorch(history)]
    headings = (f"at the end, training split (n = {history.sizes['seed']})", *decays)
    return common.Table(
        f"{_title(network, history)}; mean ± sd over seeds, in bold the least", headings, rows
    )


def main(name: str, get_config: GetConfig, claim: str | None) -> None:
    parser = argparse.ArgumentParser(f"python -m experiments.{name}", description=claim)
    parser.add_argument(
        "--train",
        action="store_true",
        help="train in runs/experiments, instead of reading histories/",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all images, 350 epochs, batches of 128: with --train, for an accelerator",
    )
    arguments = parser.parse_args()
    try:
        named = histories(arguments.train, name, get_config, full=arguments.full)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    common.print_tables(tables(named))
    for network, history in named.items():
        decays, of_pytorch = history["weight_decay"].values, _of_pytorch(history)
        title = (
            rf"{_title(network, history)}; $\lambda$ = {decays[-1] / of_pytorch[-1]:g} wd of "
            rf"PyTorch"
        )
        figure = panels.against(panels.one_per_lambda(history), PANELS, title)
        common.save(figure, name, f"{name}_{network}" + ("_full" if arguments.full else ""))


def _title(network: str, history: xr.Dataset) -> str:
    return (
        f"{network}: {int(history.attrs['per_class']):,} images a class, "
        f"{int(history['epoch'][-1])} epochs"
    )


def _of_pytorch(history: xr.Dataset) -> list[float]:
    return history["weight_decay"].attrs["torch_weight_decay"]
