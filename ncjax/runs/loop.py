"""Trains a plan to its last epoch: measures, saves and reports on the way, and resumes.

`runs.schedule` says at which epochs training stops, `runs.listeners` what is done there, and
`runs.resume` where a WORKDIR continues.
"""

import contextlib
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import xarray as xr

from ncjax import config as configuration
from ncjax.plan import Plan
from ncjax.report import draw, page, tables
from ncjax.runs import growth, listeners, processes, signals, summary
from ncjax.runs.resume import make_metadata, resume
from ncjax.runs.schedule import Schedule, make_schedule
from ncjax.storage import checkpoint, lock
from ncjax.storage.files import remove_leftovers, write_atomically
from ncjax.training import compilation, parallel
from ncjax.training.sweep import Sweep, make_program
from ncjax.training.targets import Target

# A chunk of training is a visit to the device: long enough to cost nothing, short enough for a live
# progress line.
_CHUNK_SECONDS = 2.0


def train_and_show(plan: Plan) -> xr.Dataset:
    """Calls `train`, then `show`; returns the history."""
    recorded = train(plan)
    files = ("history.nc", "metrics.jsonl", "checkpoints/")
    show(recorded, plan.workdir, files, reports=plan.config.report.enabled)
    return recorded


def show(recorded: xr.Dataset, workdir: Path, files: Sequence[str], *, reports: bool) -> None:
    """Prints the results of a history, draws WORKDIR/figures and writes the report.

    Args:
      files: what else is in WORKDIR.
      reports: whether a report is wanted.
    """
    if not processes.is_leader():
        return
    draw.draw_all(recorded, workdir / "figures")
    tables.show_results(recorded, tables.make_console())
    if remark := draw.remark(recorded):
        say(remark)
    if reports:
        page.write([page.describe(workdir, recorded)], workdir / page.FILE)
        files = (*files, page.FILE)
    say(f"{', '.join(files)} and figures/ are in {workdir}")


def preview(plan: Plan, target: Target | None = None) -> None:
    """Compiles what a plan would train and prints what is known before training; writes nothing.

    `target` has the devices to compile for, if they are not this machine's.
    """
    describe(plan, target)
    say("nothing was trained and nothing was written")


def describe(plan: Plan, target: Target | None = None) -> None:
    """Compiles what a plan would train and prints what is known of it."""
    start_jax(plan)
    program = make_program(plan, target)
    summary.show(plan, program, tables.make_console(quiet=not processes.is_leader()))


def train(plan: Plan, on_measurement: Callable[[xr.Dataset], object] | None = None) -> xr.Dataset:
    """Trains and measures what is left of a plan and returns the history.

    `on_measurement` is called after every measurement with its epoch of the history; what it
    raises ends the run once the epoch is saved.

    WORKDIR gets config.json at once, history.nc and a line of metrics.jsonl at every measurement,
    checkpoints/ at `checkpoint.every` and `checkpoint.marked`, when interrupted, and at the end. A
    WORKDIR that holds part of the run is continued, and one with fewer runs grows. Of several
    processes each returns the history, and the first writes it.

    Raises:
      InputError: WORKDIR is another process's, or nothing in it can be trusted, or its data or PRNG
        were others.
      Interrupted: by SIGINT or SIGTERM, once all that was computed is on disk.
      OSError: WORKDIR can be written no more; what is in it is whole.
    """
    start_jax(plan)
    if plan.grown_from is not None:
        growth.grow(plan, train, say)
    config, workdir = plan.config, plan.workdir
    owned = lock.owned(workdir) if processes.is_leader() else contextlib.nullcontext(lambda: None)
    with owned as check_owner, signals.Requests() as requests:
        processes.check_shared(workdir)
        if processes.is_leader():
            remove_leftovers(workdir)
        saved = checkpoint.Checkpoints(
            workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.marked
        )
        try:
            sweep = Sweep(plan)
            metadata = make_metadata(sweep)
            recorded = resume(sweep, saved, metadata)
            if processes.is_leader():
                write_atomically(workdir / "config.json", configuration.to_json(config).encode())
            if recorded is not None and sweep.epoch == config.train.epochs:
                say(f"{workdir} is complete: {sweep.epoch} epochs, nothing is left to train")
            else:
                told = _Listeners(
                    listeners.HistoryWriter(sweep, recorded, metadata.versions, check_owner),
                    listeners.CheckpointWriter(sweep, saved, metadata, check_owner),
                    listeners.Callback(on_measurement),
                )
                recorded = _train_rest(sweep, told, requests)
        except signals.Interrupted:
            # It promises that all is on disk; where that is not so, this is the error to report.
            saved.close()
            raise
        except BaseException:
            if jax.process_count() == 1:  # several would wait for each other
                with contextlib.suppress(OSError):  # the first error is the one to report
                    saved.close()
            raise
        saved.close()
    return recorded


def start_jax(plan: Plan) -> None:
    """Sets what must be set before JAX computes, and checks that all processes do the same."""
    parallel.use_every_core()
    compilation.use_cache(plan.config.compile.cache)
    processes.check_same(plan)


def say(line: str) -> None:
    """Prints a line, in the first of several processes alone."""
    if processes.is_leader():
        tables.say(tables.make_console(), line)


class _Listeners(NamedTuple):
    """Holds what WORKDIR and the user get of a training run."""

    history: listeners.HistoryWriter
    checkpoints: listeners.CheckpointWriter
    callback: listeners.Callback


def _train_rest(sweep: Sweep, told: _Listeners, requests: signals.Requests) -> xr.Dataset:
    """Compiles, and trains from where the sweep stands to its last epoch; returns the history."""
    config, leads = sweep.plan.config, processes.is_leader()
    with tables.Progress(
        config.train.epochs, sweep.program.samples_per_epoch, quiet=not leads
    ) as progress:
        profile = compilation.Profile(config.profile.dir if leads else "", progress.say)
        reporter = listeners.Reporter(sweep, progress, _CHUNK_SECONDS)
        progress.say(summary.headline(sweep.plan, sweep.program))
        sweep.compile()
        reporter.on_compiled(continues=told.history.recorded is not None)
        _follow(make_schedule(config), sweep, told, reporter, profile, requests)
    assert told.history.recorded is not None  # some epoch up to the last is always measured
    return told.history.recorded


def _follow(
    schedule: Schedule,
    sweep: Sweep,
    told: _Listeners,
    reporter: listeners.Reporter,
    profile: compilation.Profile,
    requests: signals.Requests,
) -> None:
    """Trains from stop to stop of a schedule and tells the listeners what happens.

    Raises:
      Interrupted: by SIGINT or SIGTERM, once the epoch it stopped at is saved.
      BaseException: the callback's own, then too.
    """
    timing = listeners.Timing()
    chunk_seconds = _CHUNK_SECONDS * len(sweep.program.slices)
    while True:
        epoch = sweep.epoch
        if epoch in schedule.measured and epoch > max(told.history.epochs, default=-1):
            metrics, seconds = sweep.advance(0, measured=True)
            timing.on_measured(seconds)
            told.history.on_measured(metrics, timing)
            assert told.history.recorded is not None
            told.callback.on_measured(told.history.recorded)
            reporter.on_measured(metrics["nc1"][:, 0])
        is_warm = timing.epochs > 0 or epoch + 1 == schedule.last
        tracing = profile.is_wanted and is_warm
        wanted = schedule.chunk(epoch, 0.0 if tracing else chunk_seconds, timing.seconds_per_epoch)
        # All processes stop, and go on, alike. The signal is read once: what stops here is also
        # saved here.
        stop = signal.SIGINT if told.callback.error else requests.signum
        signum, chunk = processes.agree(stop, wanted)
        is_new = timing.epochs > 0 or epoch == 0  # no checkpoint of a resumed epoch is written anew
        if is_new and (epoch in schedule.saved or signum):
            told.checkpoints.on_save(told.history.epochs)
        if told.callback.error:
            raise told.callback.error
        if epoch == schedule.last:
            break
        if signum:
            raise signals.Interrupted(signum)
        with profile.traced() if tracing else contextlib.nullcontext():
            _, seconds = sweep.advance(chunk, measured=False)
        timing.on_trained(chunk, seconds)
        reporter.on_trained(chunk, timing)
    reporter.on_finished(timing)
