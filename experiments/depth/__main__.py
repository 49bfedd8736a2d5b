"""Does a deeper linear head improve NC2, as Jacot et al. (2024) predict?"""

from collections.abc import Mapping

import xarray as xr

from configs import digits
from experiments import common
from ncjax import panels
from ncjax.panels import Panel

DEPTHS = (1, 2, 3, 4)
MEASURES = {
    "accuracy": "train acc",
    "nc2_equiangular_means": "angles of means",
    "nc2_cosine_std_head": "cosine std of head",
    "nc2_equinorm_means": "norms of means",
    "etf_error": "etf_error",
    "nc3": "nc3",
    "nc1": "nc1",
    "nc1_trace_ratio": "total scatter",
    "nc1_row_space": "share the head sees",
    "relaxation_time": "2 lambda t",
}
PANELS = (
    Panel("NC2: equal angles of means", r"mean of $|\cos+1/(C-1)|$", ("nc2_equiangular_means",)),
    Panel("NC2: distance of means to a simplex ETF", "etf_error", ("etf_error",)),
    Panel("NC2: spread of the head's angles", "std of cos", ("nc2_cosine_std_head",)),
    Panel("NC2: equal norms of means", "std / mean", ("nc2_equinorm_means",)),
    panels.NC1,
    panels.NC3,
)


def histories(train: bool) -> dict[str, xr.Dataset]:
    """Returns histories by depth of the linear head."""
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


def tables(by_depth: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    rows, headings = [], ()
    for name, history in by_depth.items():
        final = history.isel(epoch=-1).sel(split="train")
        columns = [common.per_decay(final[measure]) for measure in MEASURES]
        decays = map(common.number, final["weight_decay"].values)
        rows += [(name.rsplit(" ", 1)[1], *row) for row in zip(decays, *columns, strict=True)]
        headings = (f"linear depth (n = {history.sizes['seed']})", "lambda", *MEASURES.values())
    return {"depth": common.Table("Digits, 64-128x6-10 with a free bias, 2000 epochs; training split", headings, rows)}


def main(train: bool) -> None:
    by_depth = histories(train)
    common.print_tables(tables(by_depth))
    figure, _ = panels.against_lambda(by_depth, PANELS, "64-128-128-128-128-128-128-10, free head bias")
    common.save(figure, "depth")


if __name__ == "__main__":
    common.start(main, __doc__)
