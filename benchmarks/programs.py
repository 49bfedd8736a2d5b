"""What it costs to cut a sweep into programs that take turns: 64 digits runs at once against four
times 16.

    python -m benchmarks.programs

Prints how far the two histories lie apart after three epochs in float64, and the medians of
alternating rounds of three epochs; docs/scaling.md quotes it.
"""

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.machine import Watch
from ncjax.config import Config, default_config
from ncjax.plan import prepare
from ncjax.runs import inspect, loop
from ncjax.training import parallel, sweep

EPOCHS, ROUNDS = 3, 5


def make_config(runs_per_program: int) -> Config:
    config = default_config()
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-4, 1e-3, 1e-2), tuple(range(16))
    config.train.precision, config.train.epochs, config.log.epochs = "float64", EPOCHS, (0, EPOCHS)
    config.sweep.runs_per_program = runs_per_program
    return config


def main(folder: Path) -> None:
    parallel.use_every_core()
    watch = Watch(concludes=True)
    plans = {most: prepare(make_config(most), folder / str(most)) for most in (64, 16)}
    whole, parts = (loop.train(plan) for plan in plans.values())
    deviation = max(
        inspect.deviation(parts[name].values, whole[name].values) for name in whole.data_vars
    )
    sweeps = {most: sweep.Sweep(plan) for most, plan in plans.items()}
    seconds = {most: [] for most in sweeps}
    for number in range(ROUNDS + 1):  # the first compiles
        for most, begun in sweeps.items():
            _, took = begun.advance(EPOCHS if number else 0, measured=False)
            seconds[most] += [took] * bool(number)
    at_once, in_turns = (statistics.median(seconds[most]) for most in (64, 16))
    print(
        f"largest deviation {deviation:.1g}; 64 runs at once {at_once:.2f} s, 16 four times "
        f"{in_turns:.2f} s"
    )
    print(
        f"{in_turns / at_once:.2f} times as long (medians of {ROUNDS} rounds; load "
        f"{os.getloadavg()[0]:.1f})"
    )
    watch.conclude()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
