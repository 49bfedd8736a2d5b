"""What the seed paper's two figures share: four weight decays x three seeds of two networks, and
what they show.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from experiments import common
from experiments.clock import __main__ as clock
from ncjax.config import Config
from ncjax.report import figures, panels
from ncjax.report.panels import Panel

GetConfig = Callable[[str], Config]

SIZES = ("whole", "subset")
NETWORKS = {"batch_norm": "batch_norm", "homogeneous": ""}
DATA_SETS = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
# For two CPU cores: fewer images and epochs; smaller batches, so that there are steps enough, which
# batch normalization bears at a lower learning rate.
SUBSET = {"data__per_class": 200, "train__epochs": 150, "train__batch_size": 32}
SUBSET_OF = {"homogeneous": SUBSET, "batch_norm": SUBSET | {"sweep__learning_rate": (0.04,)}}
# Measured closer together where the learning rate falls, after epochs 116 and 233.
WHOLE = {"log__epochs": (0, 1, 2, 4, 8, 16, 32, 64, 116, 140, 190, 233, 260, 300, 350)}
PANELS = (
    *figures.PANELS,
    Panel("Loss without the penalty", r"mean of $\frac{1}{2}\Vert y-f\Vert^2$", ("fit_loss",)),
    panels.HEAD_EQUILIBRIUM,
)
# What README.md begins with.
HEADLINE = tuple(
    panel
    for panel in figures.PANELS
    if panel.drawn[0] in ("nc1", "nc2_equiangular_means", "nc3", "nc4")
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
# Whether the subset collapses less because its runs are shorter is asked of these.
COMPARED = {"NC1": "nc1", "NC2": "etf_error", "NC3": "nc3"}
# Epochs at which the test split is shown: before and after the learning rate falls, and the end.
SHOWN = (16, 116, 140, 190, 350)


def histories(
    train: bool, name: str, get_config: GetConfig, *, sizes: Sequence[str] = SIZES
) -> dict[str, xr.Dataset]:
    """Returns the history of each network on the whole data set, then on the subset."""
    found = {}
    for size in sizes:
        for network, variant in NETWORKS.items():
            fields = WHOLE if size == "whole" else SUBSET_OF[network]
            key = network if size == "whole" else f"{network}_{size}"
            config = common.changed(get_config(variant), **fields)
            found[key] = common.recorded(f"{name}_{key}", config, train, every_epoch=True)
    return found


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    found = {network: _table(network, history) for network, history in histories.items()}
    if all(f"{network}_subset" in histories and network in histories for network in NETWORKS):
        found["time"] = _at_equal_time(histories)
        found["test"] = _of_test(histories["batch_norm"])
    return found


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
    epoch, seeds = int(final["epoch"]), history.sizes["seed"]
    headings = (f"at epoch {epoch}, training split (n = {seeds})", *decays)
    return common.Table(
        f"{_title(network, history)}; mean ± sd over seeds, in bold the least", headings, rows
    )


def _at_equal_time(histories: Mapping[str, xr.Dataset]) -> common.Table:
    """Compares the end of the subset's runs with the whole at the same t, and as last measured.

    At one weight decay equal flow time t is equal 2 lambda t; without decay there is t alone. The
    whole is interpolated between the epochs at which it was measured.
    """
    rows, seeds = [], next(iter(histories.values())).sizes["seed"]
    for network in NETWORKS:
        whole, subset = histories[network], histories[f"{network}_subset"]
        for decay, of_pytorch in zip(whole["weight_decay"].values, _of_pytorch(whole), strict=True):
            run = whole.sel(weight_decay=decay)
            subset_end = subset.sel(weight_decay=decay, split="train").isel(epoch=-1)
            time = subset_end["flow_time"].mean().item()
            cells = []
            for measure in COMPARED.values():
                logs = clock.at_clock(run, measure, np.array([time]), "flow_time").isel(point=0)
                then = logs.copy(data=np.exp(logs.values))
                end = run[measure].sel(split="train").isel(epoch=-1)
                cells += map(common.over_seeds, (subset_end[measure], then, end))
            rows.append((network, common.number(of_pytorch), f"{time:.3g}", *cells))
    columns = [
        f"{words}: {what}"
        for words in COMPARED
        for what in ("subset, at its end", "whole, then", "whole, last measured")
    ]
    return common.Table(
        "The end of the subset's runs, the whole at the same flow time t, and as last measured",
        (f"network (n = {seeds})", "wd", "t", *columns),
        rows,
    )


def _of_test(history: xr.Dataset) -> common.Table:
    """Compares both splits during training."""
    epochs = [epoch for epoch in SHOWN if epoch in history["epoch"].values]
    rows = []
    for decay, of_pytorch in zip(history["weight_decay"].values, _of_pytorch(history), strict=True):
        for words, measure, split in (
            ("test accuracy", "accuracy", "test"),
            ("NC1, test", "nc1", "test"),
            ("NC1, training", "nc1", "train"),
        ):
            values = history[measure].sel(split=split, weight_decay=decay)
            cells = [common.over_seeds(values.sel(epoch=epoch)) for epoch in epochs]
            rows.append((common.number(of_pytorch), words, *cells))
    headings = (f"wd (n = {history.sizes['seed']})", "", *(f"epoch {e}" for e in epochs))
    return common.Table("Training and test split during training", headings, rows)


def main(name: str, get_config: GetConfig, claim: str | None) -> None:
    parser = argparse.ArgumentParser(f"python -m experiments.{name}", description=claim)
    parser.add_argument(
        "--train",
        choices=SIZES,
        help="train in runs/experiments, instead of reading histories/; the whole data set is for "
        "an accelerator, the subset for two CPU cores",
    )
    train = parser.parse_args().train
    sizes = (train,) if train else SIZES
    common.run(lambda: _show(name, histories(bool(train), name, get_config, sizes=sizes)))


def _show(name: str, found: Mapping[str, xr.Dataset]) -> None:
    common.print_tables(tables(found))
    for network, history in found.items():
        decays, of_pytorch = history["weight_decay"].values, _of_pytorch(history)
        title = (
            rf"{_title(network, history)}; $\lambda$ = {decays[-1] / of_pytorch[-1]:g} wd of "
            rf"PyTorch"
        )
        curves = panels.one_per_lambda(history)
        common.save(panels.against(curves, PANELS, title), name, f"{name}_{network}")
        if network == "batch_norm":
            common.save(panels.against(curves, HEADLINE, title), name)


def _title(network: str, history: xr.Dataset) -> str:
    config = json.loads(history.attrs["config"])
    last, epochs = int(history["epoch"][-1]), config["train"]["epochs"]
    length = f"{last} epochs" if last == epochs else f"{last} of {epochs} epochs"
    words = "batch normalization" if network.startswith("batch_norm") else "homogeneous"
    images = f"{int(history.attrs['per_class']):,} images a class"
    return f"{DATA_SETS[config['data']['name']]}, {words}: {images}, {length}"


def _of_pytorch(history: xr.Dataset) -> list[float]:
    return history["weight_decay"].attrs["torch_weight_decay"]
