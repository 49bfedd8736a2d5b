"""The critical weight decay: where modes of the UFM and of a perceptron on digits die, from large and small starts."""

import numpy as np
import xarray as xr

from configs import digits, ufm
from experiments import common
from ncjax import closed_forms, figures, panels, theory_figures

DEAD = 0.01  # an eigenvalue below this: the mode is gone
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.03)


def main() -> None:
    histories = {}
    for depth in (2, 3, 4):
        setting = closed_forms.Setting(10)
        gamma = closed_forms.unconstrained_gamma(depth, 5, setting)
        spinodal = closed_forms.critical_decays(gamma, depth, setting)[1]
        fields = {"model__widths": (64,) * (depth - 1), "sweep__init_scale": (0.3, 1.5)}
        decays = tuple(float(f"{ratio * spinodal:.6g}") for ratio in RATIOS)
        config = common.changed(ufm.get_config(), sweep__weight_decay=decays, **fields)
        histories[f"UFM, L = {depth}"] = common.record(f"phase_ufm_{depth}", config)
    decays = tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 0.3, 13))
    fields = {"sweep__weight_decay": decays, "sweep__init_scale": (0.3, 1.0), "sweep__seed": (0, 1, 2)}
    histories["digits"] = common.record("phase_digits", common.changed(digits.get_config(), **fields))
    title = f"Modes (of 10) with an eigenvalue above {DEAD}, mean over 3 seeds"
    features = [(name, one) for name, one in _by_start(histories) if name != "digits"]
    common.show(
        f"{title}, at lambda / spinodal lambda",
        ("network", "init_scale", *map(str, RATIOS)),
        [(name, f"{one['init_scale'].item():g}", *_alive(one)) for name, one in features],
    )
    perceptrons = [one for name, one in _by_start(histories) if name == "digits"]
    law = [theory_figures.fitted_law(one) for one in perceptrons]
    common.show(
        f"{title}, of digits at lambda; spinodal of the law {', '.join(f'{one.greatest:.3g}' for one in law if one)}",
        ("init_scale", *(f"{decay:g}" for decay in perceptrons[0]["weight_decay"].values)),
        [(f"{one['init_scale'].item():g}", *_alive(one)) for one in perceptrons],
    )
    named = _by_start(histories)
    figure = theory_figures.modes_against_lambda([one for _, one in named])
    for axes, (name, one) in zip(figure.axes, named, strict=True):
        axes.set_title(f"{name}, init_scale = {one['init_scale'].item():g}", size=panels.SIZE)
    common.save(figure, "phase")


def _by_start(histories: dict[str, xr.Dataset]) -> list[tuple[str, xr.Dataset]]:
    return [(name, one) for name, history in histories.items() for one in figures.settings(history)]


def _alive(history: xr.Dataset) -> list[str]:
    """Number of living modes per weight decay, mean over seeds."""
    alive = (history["mode_eigenvalues"].isel(epoch=-1) > DEAD).sum("mode").mean("seed")
    return [f"{count:.2g}" for count in alive.values]


if __name__ == "__main__":
    common.start(main, __doc__)
