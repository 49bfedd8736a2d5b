"""NC0, the norm of the sum of the head's rows: the exact law of cross-entropy with SGD, against
published numbers and against training.
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from configs import digits
from experiments import common
from ncjax.metrics import closed_forms

# Zhao et al., "Optimizer choice matters for the emergence of neural collapse" (ICLR 2026, arXiv
# 2602.16642), figure 5: NC0 of a ResNet9 on Fashion-MNIST at the end of training, by momentum and
# weight decay. None: the number was not read.
DECAYS = (0.0, 2.5e-5, 5e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3)
PUBLISHED: dict[float, tuple[float | None, ...]] = {
    0.0: (1.75, 1.75, 1.75, 1.75, 1.72, 1.69, 1.61, 1.48),
    0.5: (1.75, 1.75, 1.75, 1.74, 1.69, 1.64, 1.48, 1.24),
    0.7: (None, None, None, None, 1.66, 1.56, 1.32, 0.99),
    0.9: (1.75, 1.74, 1.72, 1.69, 1.48, 1.24, 0.74, 0.31),
    0.95: (1.75, 1.72, 1.69, 1.64, 1.24, 0.88, 0.31, 0.06),
    0.97: (None, None, None, None, 0.99, 0.56, 0.10, 0.01),
    0.98: (1.75, 1.68, 1.61, 1.48, 0.74, 0.31, 0.02, 0.00),
}
START = 1.75  # theirs, at weight decay 0
# Their training: learning rate 0.001, a tenth of it from epochs 67 and 134 of 200 on, 469 steps an
# epoch.
THEIR_RATES = np.repeat([1e-3, 1e-4, 1e-5], [66 * 469, 67 * 469, 67 * 469])

EPOCHS, BATCH_SIZE = 200, 64
OPTIMIZERS = {
    "SGD, coupled": {},
    "SGD, decoupled": {"train__decay": "decoupled"},
    "Adam, coupled": {"train__optimizer": "adam", "sweep__learning_rate": 1e-3},
    "AdamW": {"train__optimizer": "adamw", "sweep__learning_rate": 1e-3},
}


def histories(train: bool) -> dict[str, xr.Dataset]:
    """Returns digits at their weight decays and momenta, and by optimizer."""
    config = {
        "loss": "cross_entropy",
        "train__precision": "float64",
        "train__epochs": EPOCHS,
        "train__schedule": "step",
        "log__epochs": (0, EPOCHS),
    }
    found = {
        "momenta": common.recorded(
            "nc0_momenta",
            common.changed(
                digits.get_config(),
                **config,
                sweep__weight_decay=DECAYS,
                sweep__momentum=tuple(PUBLISHED),
                sweep__learning_rate=_rate_for_their_time(),
                sweep__seed=(0, 1),
            ),
            train,
            every_epoch=True,
        )
    }
    for name, fields in OPTIMIZERS.items():
        changes = {**config, "sweep__weight_decay": (1e-3, 1e-2), "sweep__seed": common.SEEDS}
        found[name] = common.recorded(
            f"nc0_{name.lower().replace(', ', '_')}",
            common.changed(digits.get_config(), **changes, **fields),
            train,
            every_epoch=True,
        )
    return found


def _rate_for_their_time() -> float:
    """Returns the learning rate whose steps add up to the sum of theirs."""
    config = digits.get_config()
    steps = EPOCHS * (1450 // config.train.batch_size)
    step = np.arange(steps) / steps
    shape = np.where(step < 1 / 3, 1.0, np.where(step < 2 / 3, 0.1, 0.01))
    return float(f"{THEIR_RATES.sum() / shape.sum():.6g}")


def published_law() -> np.ndarray:
    """Returns NC0 at the end of their training by the law, (momentum, weight decay)."""
    momenta, decays = (grid.ravel() for grid in np.meshgrid(list(PUBLISHED), DECAYS, indexing="ij"))
    rates = np.broadcast_to(THEIR_RATES, (momenta.size, THEIR_RATES.size))
    share = closed_forms.head_sum(decays, rates, momenta, is_coupled=True)[:, -1]
    return START * np.abs(share.reshape(len(PUBLISHED), len(DECAYS)))


def _ratio(history: xr.Dataset) -> xr.DataArray:
    """Returns NC0 at the last epoch over that at epoch 0."""
    return history["nc0"].sel(epoch=EPOCHS) / history["nc0"].sel(epoch=0)


def tables(found: Mapping[str, xr.Dataset]) -> dict[str, common.Table]:
    history = found["momenta"]
    law = published_law()
    trained = START * _ratio(history).squeeze().transpose("momentum", "weight_decay", "seed")
    rows = []
    for place, (momentum, numbers) in enumerate(PUBLISHED.items()):
        for what, values in (
            ("published", numbers),
            ("law of their steps", law[place]),
            ("trained, digits", trained.isel(momentum=place).mean("seed").values),
        ):
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            rows.append((f"{momentum:g}", what, *cells))
    headings = (f"momentum (n = {history.sizes['seed']})", "NC0", *map(common.number, DECAYS))
    return {
        "published": common.Table("NC0 at the end, by weight decay", headings, rows),
        "deviations": common.Table("Largest deviations", *_deviations(found, law)),
        "optimizers": common.Table(
            f"Digits, cross-entropy, {EPOCHS} epochs", *_by_optimizer(found)
        ),
    }


def _deviations(
    found: Mapping[str, xr.Dataset], law: np.ndarray
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    numbers = np.array(list(PUBLISHED.values()), float)
    apart = np.abs(law - numbers)
    rows = [("published numbers, law", f"{np.isfinite(numbers).sum()}", f"{np.nanmax(apart):.4f}")]
    for name in ("momenta", "SGD, coupled", "SGD, decoupled"):
        history = found[name]
        relative = np.abs(_ratio(history) / history["nc0_law"].sel(epoch=EPOCHS) - 1)
        what = "SGD at their momenta" if name == "momenta" else name
        rows.append((f"{what}, law (relative)", f"{relative.size}", f"{float(relative.max()):.0e}"))
    return ("compared", "runs", "largest deviation"), rows


def _by_optimizer(
    found: Mapping[str, xr.Dataset],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows, headings = [], ()
    for name in OPTIMIZERS:
        history = found[name]
        final = history.sel(epoch=EPOCHS, split="train")
        shown = {
            "NC0, end/start": _ratio(history),
            "by the law": final["nc0_law"],
            "exp(-lambda t)": np.exp(-final["relaxation_time"] / 2),
            "nc0": final["nc0"],
            "nc1": final["nc1"],
            "nc2 etf_error": final["etf_error"],
            "nc3": final["nc3"],
            "train acc": final["accuracy"],
        }
        decays = map(common.number, final["weight_decay"].values)
        rows += [
            (name, *row) for row in zip(decays, *map(common.per_decay, shown.values()), strict=True)
        ]
        headings = (f"optimizer (n = {history.sizes['seed']})", "lambda", *shown)
    return headings, rows


def main(train: bool) -> None:
    common.print_tables(tables(histories(train)))


if __name__ == "__main__":
    common.start(main, __doc__)
