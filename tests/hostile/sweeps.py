"""Values that a run cannot hold, or only just: what is trained must be what the history says it
is.
"""

import functools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests import chaos
from tests.hostile import engine
from tests.hostile.engine import Failure, Ran

_TINY = (
    *chaos.SMALL[:4],
    "--config.train.epochs=1",
    "--config.train.batch_size=16",
    "--config.sweep.weight_decay=1e-3",
    "--config.sweep.seed=0",
)
_VALUES: dict[str, tuple[str, ...]] = {
    "weight_decay": ("1e-50", "1e-46", "1e-42", "1e-30", "1e10", "1e38", "1e39", "1e300", "5e-324"),
    "learning_rate": ("1e-50", "1e-46", "1e-42", "1e-37", "1e10", "1e38", "1e39", "1e300"),
    "momentum": (
        "0.9999999999",
        "0.99999999",
        "0.9999999",
        "0.999999999999999999",
        "1e-50",
        "0.99999",
    ),
    "init_scale": (
        "1e-50",
        "1e-46",
        "1e-42",
        "1e-30",
        "1e-20",
        "1e10",
        "1e30",
        "1e38",
        "1e39",
        "1e300",
    ),
    "seed": ("2147483647", "2147483648", "4294967296", "-1", "9007199254740993", "0.0"),
}
# Values that are two here and one in the run's precision.
_PAIRS: dict[str, tuple[str, ...]] = {
    "weight_decay": ("1e-3,1.00000000001e-3", "0,1e-50", "1e-50,2e-50", "1e-3,1e300"),
    "learning_rate": ("0.1,0.1000000001",),
    "momentum": ("0.9,0.90000000001", "0.9999999999,0.99999999999"),
    "init_scale": ("1,1.00000000001",),
}
_OTHERS = (
    *("--config.data.input_scale=1e-50", "--config.data.input_scale=1e39"),
    *("--config.data.input_scale=1e300",),
    *("--config.data.input_scale=1e-300", "--config.data.input_scale=1e18"),
    *("--config.units=torch --config.sweep.weight_decay=1e308",),
    *("--config.train.schedule_epochs=2147483647",),
    *(f"--config.units=torch --config.sweep.learning_rate={x}" for x in ("1e-323", "1e38")),
)  # fmt: skip


def _is_held(name: str, value: float, precision: str) -> bool:
    """Whether a number of this precision is the value to six digits; of momentum, what it lacks
    of 1 counts too.
    """
    with np.errstate(all="ignore"):
        held = float(np.dtype(precision).type(value))
    near = math.isclose(held, value, rel_tol=1e-6) and (
        value == 0 or abs(held) >= np.finfo(precision).tiny
    )
    return near and (name != "momentum" or math.isclose(1 - held, 1 - value, rel_tol=1e-2))


def _is_honest(workdir: Path, asked: dict[str, list[float]], precision: str, ran: Ran) -> None:
    """Every value is held by the run's precision, apart from its neighbours; a run that diverged
    says so.
    """
    from ncjax.storage import history

    if engine.is_said(ran):
        return
    for name, values in asked.items():
        lost = [value for value in values if not _is_held(name, value, precision)]
        if lost:
            raise Failure("silent", f"{name} {lost} is not what was trained in {precision}: {ran}")
        with np.errstate(all="ignore"):
            if len({float(np.dtype(precision).type(value)) for value in values}) < len(values):
                raise Failure("silent", f"{name} {values} are one number in {precision}: {ran}")
    recorded = history.load(workdir / "history.nc")
    finite = recorded["finite"].values.astype(bool)
    loss = recorded["loss"].values
    if not np.isfinite(loss[finite]).all():
        raise Failure("silent", f"a loss that is not finite, of a run that is called so: {ran}")


def _sweep(name: str, values: str, precision: str, draw: bool, folder: Path) -> None:
    flags = (f"--config.sweep.{name}={values}", f"--config.train.precision={precision}")
    # A field given twice has the values of both.
    others = (flag for flag in _TINY if name not in flag)
    ran = engine.run_here("train", *others, *flags, f"--workdir={folder / 'run'}", draw=draw)
    asked = {name: [float(value) for value in values.split(",")]}
    engine.check(ran, lambda ran: _is_honest(folder / "run", asked, precision, ran))
    if ran.code == 0:
        engine.check(engine.run_here("show", folder / "run"), refuses=False)
        engine.check(engine.run_here("show", folder / "run", "--json"), refuses=False)


def _other(flags: str, folder: Path) -> None:
    ran = engine.run_here("train", *_TINY, *flags.split(), f"--workdir={folder / 'run'}")
    engine.check(ran, lambda ran: _is_honest(folder / "run", {}, "float32", ran))


def cases(_: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for name, values in _VALUES.items():
        for value in values:
            yield f"{name}={value}", functools.partial(_sweep, name, value, "float32", False)
    for name in ("weight_decay", "momentum", "init_scale"):
        for value in (_VALUES[name][0], _VALUES[name][-1]):
            yield (
                f"{name}={value}, float64",
                functools.partial(_sweep, name, value, "float64", False),
            )
    for name, pairs in _PAIRS.items():
        for pair in pairs:
            yield f"{name}={pair}", functools.partial(_sweep, name, pair, "float32", "e300" in pair)
    for flags in _OTHERS:
        yield flags, functools.partial(_other, flags)
