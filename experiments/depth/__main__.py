"""Does a deeper linear head improve NC2, as Jacot et al. (2024) predict?"""

import xarray as xr

from configs import digits
from experiments import common
from ncjax import panels
from ncjax.panels import Panel

DEPTHS = (1, 2, 3, 4)
PANELS = (
    Panel("NC2: equal angles of means", r"mean of $|\cos+1/(C-1)|$", ("nc2_equiangular_means",)),
    Panel("NC2: distance of means to a simplex ETF", "etf_error", ("etf_error",)),
    Panel("NC2: spread of the head's angles", "std of cos", ("nc2_cosine_std_head",)),
    Panel("NC2: equal norms of means", "std / mean", ("nc2_equinorm_means",)),
    panels.NC1,
    panels.NC3,
)


def histories(train: bool) -> dict[str, xr.Dataset]:
    common_fields = {
        "model__widths": (128,) * 6,
        "model__head_bias": "free",
        "train__epochs": 2000,
        "sweep__learning_rate": 0.01,  # deep linear heads diverge at more
        "sweep__weight_decay": (1e-3, 3e-3),
        "sweep__seed": common.SEEDS,
    }
    return {
        f"linear head of depth {depth}": common.recorded(
            f"depth_{depth}",
            common.changed(digits.get_config(), model__linear_head_depth=depth, **common_fields),
            train,
        )
        for depth in DEPTHS
    }


def main(train: bool) -> None:
    measures = ("accuracy", "nc2_equiangular_means", "etf_error", "nc2_equinorm_means", "nc1", "nc3")
    rows = []
    for name, history in histories.items():
        final = history.isel(epoch=-1).sel(split="train")
        for weight_decay in final["weight_decay"].values:
            run = final.sel(weight_decay=weight_decay)
            cells = (*(run[m] for m in measures), run["nc2_cosine_std_head"], run["relaxation_time"])
            rows.append((name.rsplit(" ", 1)[1], f"{weight_decay:g}", *map(common.over_seeds, cells)))
    common.show(
        "Digits, 64-128x6-10 with a free bias, 2000 epochs, mean±sd over 3 seeds; training split",
        ("linear depth", "lambda", *measures, "cosine std head", "2 lambda t"),
        rows,
    )
    figure, _ = panels.against_lambda(histories, PANELS, "64-128-128-128-128-128-128-10, free head bias")
    common.save(figure, "depth")


if __name__ == "__main__":
    common.start(main, __doc__)
