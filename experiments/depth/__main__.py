"""Does a deeper linear head improve NC2, as Jacot et al. (2024) predict?"""

from collections.abc import Mapping

import xarray as xr

from configs import digits
from experiments import common
from ncjax.report import panels
from ncjax.report.panels import Panel

DEPTHS = (1, 2, 3, 4)
PANELS = (
    Panel("NC2: equal angles of means", r"mean of $|\cos+1/(C-1)|$", ("nc2_equiangular_means",)),
    Panel("NC2: distance of means to a simplex ETF", "etf_error", ("etf_error",)),
    Panel("NC2: spread of the head's angles", "std of cos", ("nc2_cosine_std_head",)),
    Panel("NC2: equal norms of means", "std / mean", ("nc2_equinorm_means",)),
    panels.NC1,
    panels.NC3,
)


MEASURES = {
    "train acc": "accuracy",
    "angles of means": "nc2_equiangular_means",
    "etf_error": "etf_error",
    "norms of means": "nc2_equinorm_means",
    "nc1": "nc1",
    "total scatter": "nc1_trace_ratio",
    "nc3": "nc3",
    "cosine std of head": "nc2_cosine_std_head",
    "2 lambda t": "relaxation_time",
}


def histories(train: bool) -> dict[str, xr.Dataset]:
    fields = {
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
            common.changed(digits.get_config(), model__linear_head_depth=depth, **fields),
            train,
        )
        for depth in DEPTHS
    }


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    rows = []
    for name, history in histories.items():
        final = history.isel(epoch=-1).sel(split="train")
        columns = [common.per_decay(final[measure]) for measure in MEASURES.values()]
        decays = map(common.number, final["weight_decay"].values)
        rows += [(name.rsplit(" ", 1)[1], *row) for row in zip(decays, *columns, strict=True)]
    seeds = {history.sizes["seed"] for history in histories.values()}
    headings = (f"linear depth (n = {', '.join(map(str, seeds))})", "lambda", *MEASURES)
    caption = (
        "Digits, 64-128x6-10 with a free bias, 2000 epochs, mean ± sd over seeds; training split"
    )
    return {
        "collapse": common.Table(caption, headings, sorted(rows, key=lambda row: float(row[1])))
    }


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    figure, _ = panels.against_lambda(
        recorded, PANELS, "64-128-128-128-128-128-128-10, free head bias"
    )
    common.save(figure, "depth")


if __name__ == "__main__":
    common.start(main, __doc__)
