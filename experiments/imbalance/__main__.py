"""Do small classes collapse onto each other, as Fang et al. (2021) predict?"""

from collections.abc import Mapping

import xarray as xr

from configs import digits
from experiments import common
from ncjax.report import imbalance_figures
from ncjax.storage.history import imbalance_ratio

LARGEST = 140
# Examples of the five small classes: 140 to 2, against 140 of the others.
RATIOS = (1, 2, 5, 14, 28, 70)


def histories(train: bool) -> dict[str, xr.Dataset]:
    fields = {
        "data__per_class": LARGEST,
        "loss": "cross_entropy",
        "model__head_bias": "free",
        "train__epochs": 500,
        "sweep__weight_decay": (1e-3, 3e-3, 1e-2),
        "sweep__seed": common.SEEDS,
    }
    return {
        f"1:{ratio}": common.recorded(
            f"imbalance_{ratio}",
            common.changed(digits.get_config(), data__classes=f"step:{ratio}:5", **fields),
            train,
        )
        for ratio in RATIOS
    }


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    is_small = imbalance_figures.small_classes(histories)
    rows, headings = [], ()
    for history in histories.values():
        final = history.isel(epoch=-1)
        train, test = (final.sel(split=split) for split in ("train", "test"))
        small, large = (dict(label=chosen) for chosen in (is_small, ~is_small))
        norms = final["class_norm_head"]
        shown = {
            "nearest row, small": final["class_cosine_head"].isel(small).mean("label"),
            "large": final["class_cosine_head"].isel(large).mean("label"),
            "nearest mean, small": train["class_cosine_means"].isel(small).mean("label"),
            "norm of rows, small/large": norms.isel(small).mean("label")
            / norms.isel(large).mean("label"),
            "train acc, small": train["class_accuracy"].isel(small).mean("label"),
            "test acc, small": test["class_accuracy"].isel(small).mean("label"),
            "test acc, large": test["class_accuracy"].isel(large).mean("label"),
        }
        ratio = f"{imbalance_ratio(history):g}"
        decays = map(common.number, final["weight_decay"].values)
        columns = map(common.per_decay, shown.values())
        rows += [(ratio, *row) for row in zip(decays, *columns, strict=True)]
        headings = (f"ratio (n = {history.sizes['seed']})", "lambda", *shown)
    caption = f"Digits, five classes of {LARGEST} and five small ones, cross-entropy, 500 epochs"
    return {
        "minority": common.Table(caption, headings, sorted(rows, key=lambda row: float(row[1])))
    }


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    common.save(imbalance_figures.minority_against_ratio(recorded), "imbalance")


if __name__ == "__main__":
    common.start(main, __doc__)
