"""Listeners of a training run: each does one thing when the loop measures, trains or saves.

The loop (`runs.loop`) knows when something happens. Only what is written here touches WORKDIR while
a sweep trains, and `check_owner` is called before each write: it raises OSError once the lock of
WORKDIR is lost.
"""

import json
import statistics
from collections.abc import Callable

import numpy as np
import xarray as xr

from ncjax import config as configuration
from ncjax.report import tables
from ncjax.runs import processes, provenance, summary
from ncjax.runs.derived import derived_metrics
from ncjax.storage import history, journal
from ncjax.storage.checkpoint import CheckpointMetadata, Checkpoints
from ncjax.training.sweep import Sweep


class Timing:
    """Adds up the time that this process has spent.

    Attributes:
      epochs: epochs trained.
      trained: seconds of training.
      measured: seconds of each measurement.
    """

    def __init__(self):
        self.epochs, self.trained = 0, 0.0
        self.measured: list[float] = []

    @property
    def seconds_per_epoch(self) -> float:
        """Returns the mean over the epochs trained, or infinity before the first."""
        return self.trained / self.epochs if self.epochs else float("inf")

    def on_measured(self, seconds: float) -> None:
        """Adds a measurement."""
        self.measured.append(seconds)

    def on_trained(self, epochs: int, seconds: float) -> None:
        """Adds a chunk of training."""
        self.epochs += epochs
        self.trained += seconds

    def __str__(self) -> str:
        measuring = sum(self.measured)
        share = measuring / (measuring + self.trained)
        line = (
            f"trained {self.trained:.1f} s; {len(self.measured)} measurements took "
            f"{measuring:.1f} s, {share:.0%} of both"
        )
        if self.measured and self.epochs:
            cost = statistics.median(self.measured) / self.seconds_per_epoch
            line += f"; the median one costs {cost:.2f} training epochs"
        return line


class HistoryWriter:
    """Writes history.nc and metrics.jsonl at every measurement.

    Attributes:
      recorded: the history so far, the same in every process; None before the first measurement.
    """

    def __init__(
        self,
        sweep: Sweep,
        recorded: xr.Dataset | None,
        versions: dict[str, str],
        check_owner: Callable[[], None],
    ):
        self.recorded = recorded
        self._sweep, self._check_owner = sweep, check_owner
        self._attrs = _provenance(sweep, versions)

    @property
    def epochs(self) -> list[int]:
        """Returns the epochs that the history holds."""
        return [] if self.recorded is None else self.recorded["epoch"].values.tolist()

    def on_measured(self, metrics: dict[str, np.ndarray], timing: Timing) -> None:
        """Adds the metrics of the current epoch; the first process writes both files."""
        measured = {k: v for k, v in metrics.items() if k != "class_mean_logits"}
        metrics = measured | derived_metrics(self._sweep, metrics["class_mean_logits"])
        self.recorded = history.append(self.recorded, self._label(metrics))
        if not processes.is_leader():
            return
        workdir = self._sweep.plan.workdir
        self._check_owner()
        history.save(self.recorded, workdir / "history.nc")
        times = {"train_seconds": timing.trained, "measure_seconds": sum(timing.measured)}
        journal.append(workdir / "metrics.jsonl", self._sweep.epoch, times, metrics)

    def _label(self, metrics: dict[str, np.ndarray]) -> xr.Dataset:
        """Returns the metrics of the current epoch as a history of one epoch."""
        sweep = self._sweep
        config, structure = sweep.plan.config, sweep.recipe.structure
        newest = history.one_epoch(
            sweep.epoch,
            metrics,
            grid=sweep.plan.grid,
            layers=tuple(layer.name for layer in structure.layers),
            label_names=sweep.plan.dataset.label_names,
            attrs=self._attrs,
        )
        if any(degree != 1 for degree in structure.degrees):
            newest["layer"].attrs["degree"] = list(structure.degrees)
        if (wiring := sweep.recipe.wiring) is not None:
            newest["layer"].attrs["pairs"] = " ".join(wiring.between)
        if config.units == "torch":
            newest["weight_decay"].attrs["torch_weight_decay"] = list(config.sweep.weight_decay)
        return newest


class Callback:
    """Calls a function of the user's at every measurement.

    Attributes:
      error: what the function raised; None: nothing.
    """

    def __init__(self, function: Callable[[xr.Dataset], object] | None):
        self.error: BaseException | None = None
        self._function = function

    def on_measured(self, recorded: xr.Dataset) -> None:
        """Calls it, in the first process alone, with the newest epoch of a history."""
        if self._function is None or not processes.is_leader():
            return
        try:
            self._function(recorded.isel(epoch=-1))
        except BaseException as error:
            self.error = error


class CheckpointWriter:
    """Writes checkpoints of a sweep, each with its own metadata."""

    def __init__(
        self,
        sweep: Sweep,
        saved: Checkpoints,
        metadata: CheckpointMetadata,
        check_owner: Callable[[], None],
    ):
        self._sweep, self._saved = sweep, saved
        self._metadata, self._check_owner = metadata, check_owner

    def on_save(self, measured: list[int]) -> None:
        """Starts to save the current epoch; `measured` are the epochs in the history."""
        self._check_owner()
        metadata = self._metadata._replace(epoch=self._sweep.epoch, measured=measured)
        self._saved.save(self._sweep.states, metadata)


class Reporter:
    """Prints how training goes.

    Args:
      least: seconds; what is left is said only of a run that takes longer.
    """

    def __init__(self, sweep: Sweep, progress: tables.Progress, least: float):
        self._sweep, self._progress, self._least = sweep, progress, least

    def on_compiled(self, continues: bool) -> None:
        """Says what was compiled, and where training continues."""
        self._progress.say(summary.summary(self._sweep.program))
        if self._sweep.recipe.wiring is not None:
            self._progress.say(summary.LAYERS)
        if remark := self._sweep.recipe.structure.remark():
            self._progress.say(remark)
        if continues:
            self._progress.say(f"continuing from epoch {self._sweep.epoch}")

    def on_measured(self, nc1: np.ndarray) -> None:
        """Shows NC1 of the training split of every run."""
        self._progress.measured(self._sweep.epoch, nc1)

    def on_trained(self, epochs: int, timing: Timing) -> None:
        """Moves the progress line, and after the first chunk says how long the rest will take."""
        sweep, pace = self._sweep, timing.seconds_per_epoch
        self._progress.trained(sweep.epoch, pace)
        left = sweep.plan.config.train.epochs - sweep.epoch
        if timing.epochs == epochs and pace * (left + epochs) > self._least:
            self._progress.say(summary.remaining(sweep.program, pace, left))

    def on_finished(self, timing: Timing) -> None:
        """Says what training and measuring cost."""
        self._progress.say(str(timing))


def _provenance(sweep: Sweep, versions: dict[str, str]) -> dict[str, str]:
    """Returns the attributes of a history that say where it comes from."""
    return {
        "config": configuration.to_json(sweep.plan.config),
        "versions": json.dumps(versions),
        # Of the largest class; that of every one where they are balanced.
        "per_class": str(max(sweep.plan.dataset.class_sizes)),
        "class_sizes": json.dumps(sweep.plan.dataset.class_sizes),
        "device": f"{sweep.mesh.size} x {summary.device()}",
        "git_revision": provenance.git_revision(),
    }
