"""How tight are the proved bounds on NC1 to NC4, which cause holds each of them back, and what of
it do the data decide before training?
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from jaxtyping import Float

from configs import digits, fig1_cifar10, mnist
from experiments import common
from experiments.depth import __main__ as depth
from experiments.theorem import __main__ as theorem
from ncjax.config import Config
from ncjax.data import preparation
from ncjax.metrics import closed_forms
from ncjax.metrics.vocabulary import BUDGET_TERMS, GRAM_CAUSES
from ncjax.report import figures, theory_figures

# A measure and the bound on it.
BOUNDS = {
    "nc1": ("nc1", "nc1_bound"),
    "nc2 etf_error": ("etf_error", "nc2_bound_etf"),
    "nc2 norms": ("nc2_equinorm_means", "nc2_bound_equinorm"),
    "nc2 angles": ("nc2_equiangular_means", "nc2_bound_equiangular"),
    "nc3": ("nc3", "nc3_bound"),
    "nc3 centered": ("nc3_centered", "nc3_centered_bound"),
}
_OTHERS = {"nc4": ("nc4", "nc4_bound"), "floor of nc3": ("nc3_floor", "nc3")}
DATA_SETS = ("digits", "MNIST", "CIFAR-10")
# Depths of the linear networks whose collapse the data alone decide.
LINEAR = (2, 3, 4)


def histories(train: bool) -> dict[str, xr.Dataset]:
    """Returns digits over ten seeds, and of MNIST and CIFAR-10 what two CPU cores can."""
    of_mnist = common.changed(
        mnist.get_config(),
        data__per_class=300,
        train__epochs=60,
        train__batch_size=64,
        sweep__weight_decay=(1e-4, 5e-4, 2.5e-3),
        sweep__seed=common.SEEDS,
    )
    of_cifar10 = common.changed(
        fig1_cifar10.get_config(),
        units="ours",
        data__per_class=100,
        model__widths=(16, 32, 64, 128),
        train__epochs=150,
        train__batch_size=32,
        sweep__learning_rate=0.1,
        sweep__weight_decay=(5e-4, 2.5e-3, 1e-2),
        sweep__seed=common.SEEDS,
    )
    found = (
        common.demo(train),
        *(
            common.recorded(name, config, train, every_epoch=True, variables=common.NOT_BY_CLASS)
            for name, config in (("bounds_mnist", of_mnist), ("bounds_cifar10", of_cifar10))
        ),
    )
    linear = {
        f"linear {layers}": common.recorded(
            f"bounds_linear_{layers}", _linear(layers), train, variables=common.NOT_BY_CLASS
        )
        for layers in LINEAR
    }
    return dict(zip(DATA_SETS, found, strict=True)) | linear


def _relaxed() -> dict[str, xr.Dataset]:
    """Returns digits near equilibrium, of other experiments."""
    longer = theorem.histories(False)["longer"]["free bias"]
    return {
        **{f"digits, {name}": one for name, one in common.relaxed_digits(False).items()},
        "digits, free bias, longer": longer,
        **{f"digits, {name}": one for name, one in depth.histories(False).items()},
    }


def _linear(layers: int) -> Config:
    """Returns a linear network on the first image of every digit, with centred targets."""
    return common.changed(
        digits.get_config(),
        data__per_class=1,
        targets="centered",
        model__activation="linear",
        model__widths=(64,) * (layers - 1),
        train__precision="float64",
        train__batch_size=0,
        train__schedule="constant",
        train__epochs=20_000,
        log__epochs=(0, 20_000),
        checkpoint__every=0,
        sweep__learning_rate=0.03,
        sweep__weight_decay=(1e-3, 3e-3, 1e-2),
        sweep__seed=common.SEEDS,
    )


def tables(found: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    trained = {name: found[name] for name in DATA_SETS}
    finals = {
        name: history.isel(epoch=-1, weight_decay=history["weight_decay"].values > 0)
        for name, history in trained.items()
    }
    relaxed = {name: one.isel(epoch=-1) for name, one in _relaxed().items()}
    return {
        "tightness": common.Table(
            "Bound over measured at the last epoch, training split; mean ± sd over seeds",
            *rows_of(finals, _tightness),
        ),
        "values": common.Table(
            "Measured, and what it is proved to be at most and at least; means over seeds",
            *rows_of(finals, measured_and_bound),
        ),
        "causes": common.Table(
            "Shares of causes in the bounds; mean ± sd over seeds",
            *rows_of(finals, shares_of_causes),
        ),
        "nc4": common.Table(
            "NC4, its bound, and the runs whose NC4 is proved to be 0", *rows_of(finals, _certified)
        ),
        "violations": _violations(trained),
        "duality": common.Table(
            "Centred NC3 beside the square of NC2's etf_error; mean ± sd over seeds",
            *rows_of(finals | relaxed, _duality),
        ),
        "a_priori": _a_priori(found),
    }


def rows_of(finals: Mapping[str, xr.Dataset], columns) -> tuple[tuple[str, ...], list[tuple]]:
    """Returns headings, and a row for every data set and weight decay."""
    rows, headings = [], ()
    for name, final in finals.items():
        shown = columns(final.sel(split="train"))
        decays = map(common.number, final["weight_decay"].values)
        first = f"{name} (n = {final.sizes['seed']})"
        rows += [(first, *row) for row in zip(decays, *shown.values(), strict=True)]
        headings = ("data", "lambda", *shown)
    return headings, rows


def _tightness(run: xr.Dataset) -> dict[str, list[str]]:
    return {
        heading: common.per_decay(run[bound] / run[measured])
        for heading, (measured, bound) in BOUNDS.items()
    }


def measured_and_bound(run: xr.Dataset) -> dict[str, list[str]]:
    columns = {
        heading: _joined(*(run[name] for name in names)) for heading, names in BOUNDS.items()
    }
    return columns | {"nc3": _joined(run["nc3_floor"], run["nc3"], run["nc3_bound"])}


def _joined(*values: xr.DataArray) -> list[str]:
    """Returns means over seeds at every weight decay, as in 0.248 ≤ 0.276."""
    means = zip(*(value.mean("seed").values for value in values), strict=True)
    return [" ≤ ".join(f"{mean:.3g}" for mean in row) for row in means]


def shares_of_causes(run: xr.Dataset) -> dict[str, list[str]]:
    """Returns shares: in the root of nc1_bound, in nc2_bound_* by squares, and in the sum of the
    norms across the head that bounds nc3 (18b).
    """
    across = {term: _across(run, term) for term in BUDGET_TERMS if term != "theorem"}
    shares = {
        "nc1: outputs": run["nc1_bound_outputs"],
        "nc1: deviations": 1 - run["nc1_bound_outputs"],
        **{f"nc2: {cause}": run[f"nc2_share_{cause}"] for cause in GRAM_CAUSES},
        **{f"nc3: {term}": norm / sum(across.values()) for term, norm in across.items()},
    }
    return {name: common.per_decay(value) for name, value in shares.items()}


def _across(run: xr.Dataset, term: str) -> xr.DataArray:
    """Returns the norm of what of a term of the budget is orthogonal to the head."""
    along = (
        run[f"budget_{term}"]
        * run["effective_decay"]
        * run["weight_norm_sq"].sel(layer="head") ** 0.5
    )
    return (run[f"budget_{term}_norm"] ** 2 - along**2).clip(min=0) ** 0.5


def _certified(run: xr.Dataset) -> dict[str, list[str]]:
    seeds = run.sizes["seed"]
    are_zero, are_proved = ((run[name] == 0).sum("seed").values for name in ("nc4", "nc4_bound"))
    return {
        "nc4": common.per_decay(run["nc4"]),
        "nc4_bound": common.per_decay(run["nc4_bound"]),
        "nc4_bound_nc1": common.per_decay(run["nc4_bound_nc1"]),
        "nc4 is 0": [f"{count} of {seeds}" for count in are_zero],
        "proved to be": [f"{count} of {seeds}" for count in are_proved],
    }


def _violations(found: Mapping[str, xr.Dataset]) -> common.Table:
    """Counts the measurements of all epochs that lie outside their bounds, but for rounding."""
    rows = []
    for heading, (least, most) in {**BOUNDS, **_OTHERS}.items():
        cells = []
        for history in found.values():
            run = history.sel(split="train")
            compared = run[least].notnull() & run[most].notnull()
            broken = compared & (run[least] > run[most] * (1 + 1e-5) + 1e-6)
            cells.append(f"{int(broken.sum())} of {int(compared.sum())}")
        rows.append((heading, *cells))
    return common.Table("Violations, of all runs at all epochs", ("bound", *found), rows)


def _duality(run: xr.Dataset) -> dict[str, list[str]]:
    square = run["etf_error"] ** 2
    return {
        "nc3 centered": common.per_decay(run["nc3_centered"]),
        "etf_error^2": common.per_decay(square),
        "ratio": common.per_decay(run["nc3_centered"] / square),
        "budget: within": common.per_decay(run["budget_within"]),
        "budget: gradient": common.per_decay(run["budget_gradient"]),
        "nc1": common.per_decay(run["nc1"]),
    }


def _scales() -> Float[np.ndarray, " modes"]:
    """Returns the singular values of what the linear networks are trained on."""
    data = preparation.load(_linear(2).data, None)
    inputs = (data.train.images - data.center) * data.scale
    scales = np.linalg.svd(inputs.reshape(len(inputs), -1).astype(np.float64), compute_uv=False)
    return scales[: data.num_classes - 1]


def _a_priori(found: Mapping[str, xr.Dataset]) -> common.Table:
    """Compares what the data say of a linear network with training."""
    scales, rows = _scales(), []
    for layers in LINEAR:
        final = found[f"linear {layers}"].isel(epoch=-1).sel(split="train")
        limit, _ = closed_forms.linear_collapse(scales, 0.0, layers, scales.size + 1)
        # Kantorovich: mean(x) mean(1/x) <= (r + 1)^2/(4 r) with r the largest x over the least.
        ratio = (scales.max() / scales.min()) ** (2 / layers)
        most = 2 - 4 * np.sqrt(ratio) / (ratio + 1)
        for decay in final["weight_decay"].values:
            one = final.sel(weight_decay=decay)
            trained = [one[name].values for name in ("nc3", "etf_error")]
            by_data = closed_forms.linear_collapse(scales, float(decay), layers, scales.size + 1)
            deviations = [
                np.abs(values / expected - 1).max()
                for values, expected in zip(trained, by_data, strict=True)
            ]
            rows.append(
                (
                    f"{layers} (n = {one.sizes['seed']})",
                    common.number(decay),
                    f"{one['relaxation_time'].mean().item():.3g}",
                    f"{by_data[0]:.5f}",
                    f"{trained[0].mean():.5f}",
                    f"{by_data[1]:.5f}",
                    f"{trained[1].mean():.5f}",
                    f"{max(deviations):.0e}",
                    f"{limit:.5f}",
                    f"{most:.5f}",
                )
            )
    headings = (
        "layers",
        "lambda",
        "2 lambda t",
        "nc3 by the data",
        "trained",
        "etf_error by the data",
        "trained",
        "largest deviation",
        "nc3 as lambda -> 0",
        "at most, by the condition",
    )
    return common.Table("Linear networks: collapse by the data alone", headings, rows)


def main(train: bool) -> None:
    found = histories(train)
    common.print_tables(tables(found))
    for name in DATA_SETS:
        history = found[name]
        decayed = history.isel(weight_decay=history["weight_decay"].values > 0)
        decay = float(decayed["weight_decay"].values[figures.most_collapsed(decayed)])
        figure = theory_figures.bounds_against_lambda_and_epoch(history, decay)
        common.save(figure, "bounds", f"bounds_{name.lower().replace('-', '')}")


if __name__ == "__main__":
    common.start(main, __doc__)
