"""The critical weight decay: where modes of the UFM and of a perceptron on digits die, from
large and small starts.
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from configs import digits, ufm
from experiments import common
from ncjax.metrics import closed_forms
from ncjax.report import figures, panels, theory_figures
from ncjax.storage.history import DEAD

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.03)


def histories(train: bool) -> dict[str, xr.Dataset]:
    named = {}
    for depth in (2, 3, 4):
        fields = {"model__widths": (64,) * (depth - 1), "sweep__init_scale": (0.3, 1.5)}
        decays = tuple(float(f"{ratio * _spinodal(depth):.6g}") for ratio in RATIOS)
        config = common.changed(ufm.get_config(), sweep__weight_decay=decays, **fields)
        named[f"L = {depth}"] = common.recorded(f"phase_ufm_{depth}", config, train)
    decays = tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 0.3, 13))
    fields = {"sweep__weight_decay": decays, "sweep__init_scale": (0.3, 1.0)}
    named["digits"] = common.recorded(
        "phase_digits", common.changed(digits.get_config(), **fields), train
    )
    return named


def _spinodal(depth: int) -> float:
    """Returns the weight decay where the collapsed state of the unconstrained-feature model
    ends.
    """
    setting = closed_forms.Setting(10)
    return closed_forms.critical_decays(
        closed_forms.unconstrained_gamma(depth, 5, setting), depth, setting
    )[1]


def tables(histories: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    title = f"Modes (of 10) with an eigenvalue above {DEAD}, mean over seeds"
    features = [(name, one) for name, one in _by_start(histories) if name != "digits"]
    perceptrons = [one for name, one in _by_start(histories) if name == "digits"]
    laws = [theory_figures.fitted_law(one) for one in perceptrons]
    return {
        "ufm": common.Table(
            f"{title}, at lambda / spinodal lambda",
            (
                f"UFM (n = {features[0][1].sizes['seed']})",
                "spinodal",
                "init_scale",
                *map(str, RATIOS),
            ),
            [
                (
                    name,
                    f"{_spinodal(one.sizes['layer']):.3g}",
                    f"{one['init_scale'].item():g}",
                    *_alive(one),
                )
                for name, one in features
            ],
        ),
        "digits": common.Table(
            f"{title}, at lambda; the spinodal is that of the law with the measured gamma",
            (
                f"init_scale (n = {perceptrons[0].sizes['seed']})",
                "spinodal",
                *map(common.number, perceptrons[0]["weight_decay"].values),
            ),
            [
                (
                    f"{one['init_scale'].item():g}",
                    f"{law.greatest:.3g}" if law else "-",
                    *_alive(one),
                )
                for one, law in zip(perceptrons, laws, strict=True)
            ],
        ),
    }


def main(train: bool) -> None:
    recorded = histories(train)
    common.print_tables(tables(recorded))
    named = _by_start(recorded)
    figure = theory_figures.modes_against_lambda([one for _, one in named])
    for axes, (name, one) in zip(figure.axes, named, strict=True):
        network = name if name == "digits" else f"UFM, {name}"
        axes.set_title(f"{network}, init_scale = {one['init_scale'].item():g}", size=panels.SIZE)
    common.save(figure, "phase")


def _by_start(histories: Mapping[str, xr.Dataset]) -> list[tuple[str, xr.Dataset]]:
    return [(name, one) for name, history in histories.items() for one in figures.settings(history)]


def _alive(history: xr.Dataset) -> list[str]:
    """Formats the number of living modes at every weight decay, mean over seeds."""
    alive = (history["mode_eigenvalues"].isel(epoch=-1) > DEAD).sum("mode").mean("seed")
    return [f"{count:.2g}" for count in alive.values]


if __name__ == "__main__":
    common.start(main, __doc__)
