"""The host loop: advance, record, checkpoint, report; resume. All files of a WORKDIR are written
from here.
"""

import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import xarray as xr

from ncjax import config as configuration
from ncjax.data import dataset
from ncjax.errors import InputError, listed, printable
from ncjax.metrics import closed_forms, theory
from ncjax.plan import Plan
from ncjax.report import draw, tables
from ncjax.runs import load, processes, provenance, signals, summary
from ncjax.storage import checkpoint, history, journal, lock
from ncjax.storage.files import remove_leftovers, write_atomically
from ncjax.training import compilation, mesh, models, program
from ncjax.training.sweep import Sweep, make_program

# A chunk of training is a visit to the device: long enough to cost nothing, short enough for a live
# progress line.
_CHUNK_SECONDS = 2.0


def run(plan: Plan) -> xr.Dataset:
    """`record`, then draws WORKDIR/figures and says what was found."""
    recorded = record(plan)
    if processes.is_leader():
        draw.draw_all(recorded, plan.workdir / "figures")
        tables.show_results(recorded, tables.make_console())
        _say(f"history.nc, metrics.jsonl, checkpoints/ and figures/ are in {plan.workdir}")
    return recorded


def preview(plan: Plan) -> None:
    """Compiles what a plan would train, and says all there is to know before; writes nothing."""
    _start_jax(plan)
    summary.show(plan, make_program(plan), tables.make_console(quiet=not processes.is_leader()))


def record(plan: Plan) -> xr.Dataset:
    """Trains and measures what is left of a plan and returns the history.

    WORKDIR gets config.json at once, history.nc and a line of metrics.jsonl at every measurement,
    checkpoints/ at `checkpoint.every` and `checkpoint.marked`, when interrupted, and at the end. A
    WORKDIR that holds part of the run is continued. Of several processes each returns the history,
    and the first writes it.

    Raises:
      InputError: WORKDIR is another process's, or nothing in it can be trusted, or its data or PRNG
        were others.
      Interrupted: by SIGINT or SIGTERM, once all that was computed is on disk.
      OSError: WORKDIR can be written no more; what is in it is whole.
    """
    _start_jax(plan)
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
            facts = _facts(sweep)
            recorded = _resume(sweep, saved, facts)
            if processes.is_leader():
                write_atomically(workdir / "config.json", configuration.to_json(config).encode())
            if recorded is not None and sweep.epoch == config.train.epochs:
                _say(f"{workdir} is complete: {sweep.epoch} epochs, nothing is left to train")
            else:
                recorded = _train(sweep, recorded, saved, facts, check_owner, requests)
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


def _start_jax(plan: Plan) -> None:
    """What must be set before JAX computes; then that all processes are to do the same."""
    mesh.use_every_core()
    compilation.use_cache(plan.config.compile.cache)
    processes.check_same(plan)


def _resume(
    sweep: Sweep, saved: checkpoint.Checkpoints, mine: checkpoint.Facts
) -> xr.Dataset | None:
    """Puts the sweep at the newest sound checkpoint and returns the measurements up to there; None:
    there are none.

    A checkpoint counts if its bits are those that were saved and all it had seen measured is in the
    history. One that does not is named and removed; its epochs are computed again.
    """
    workdir, epochs = sweep.plan.workdir, saved.epochs()
    recorded = _load_history(workdir / "history.nc")
    facts = _restore_newest(sweep, saved, mine, recorded)
    processes.check_read(workdir, facts and facts.epoch)  # before anything is removed or written
    if facts is not None and recorded is not None:
        _check_grid(recorded, sweep.plan.grid, workdir / "history.nc")
    if facts is None:
        if epochs:
            way_out = (
                "no checkpoint in it can be trusted; remove its checkpoints and history.nc to "
                "train anew"
            )
            raise InputError("--workdir", str(workdir), way_out)
        if processes.is_leader():
            journal.mend(workdir / "metrics.jsonl", None)
        return None
    recorded = (
        history.up_to(recorded, facts.epoch) if facts.measured and recorded is not None else None
    )
    for later in (e for e in epochs if e > facts.epoch):
        saved.delete(later)
    text = configuration.to_json(sweep.plan.config)
    grown = (
        recorded is not None and recorded.attrs.get("config") != text
    )  # more epochs, or another mesh
    if recorded is not None and grown:
        recorded = recorded.assign_attrs(config=text)
    if processes.is_leader():
        if recorded is not None and grown:
            history.save(recorded, workdir / "history.nc")
        journal.mend(workdir / "metrics.jsonl", recorded)
    return recorded


def _load_history(path: Path) -> xr.Dataset | None:
    """Returns the history to be continued, or None where there is none."""
    if not path.exists():
        return None
    recorded = history.load(path)
    if missing := history.missing(recorded):
        way_out = (
            f"it lacks {missing}: it is damaged, or of another version of ncjax; continue with "
            f"that one"
        )
        raise InputError("history", str(path), f"{way_out}, or choose another WORKDIR")
    return recorded


def _check_grid(recorded: xr.Dataset, grid: configuration.Grid, path: Path) -> None:
    """Raises InputError where a history is not of the grid whose checkpoints lie beside it."""
    for name, values in grid.dim_values.items():
        found = recorded[name].values.tolist() if name in recorded.indexes else []
        if found != values:
            way_out = (
                f"its {name} is {listed(found)} and not {listed(values)}: it is damaged; remove it"
            )
            raise InputError("history", str(path), f"{way_out}, and the same command trains anew")


def _restore_newest(
    sweep: Sweep, saved: checkpoint.Checkpoints, mine: checkpoint.Facts, recorded: xr.Dataset | None
) -> checkpoint.Facts | None:
    """Puts the sweep at the newest sound checkpoint and returns what that says of itself; None:
    there is none.
    """
    workdir = sweep.plan.workdir
    known = set() if recorded is None else set(recorded["epoch"].values.tolist())
    for epoch in reversed(saved.epochs()):
        try:
            # First: nothing can be loaded into a program of another config, and that is no damage.
            _check_facts(sweep.plan, mine, checkpoint.read_facts(workdir / "checkpoints", epoch))
            with jax.enable_x64(True):
                states, facts = saved.load(epoch, sweep.shapes)
            lost = sorted(set(facts.measured) - known)
            if lost:
                raise checkpoint.Damaged(f"history.nc lacks epoch {lost[0]}, measured before it")
        except checkpoint.Damaged as damage:
            _warn(f"checkpoint {epoch} in {workdir} is not used: {damage}")
            continue
        sweep.restore(states, epoch)
        changed = provenance.differences(mine.arithmetic, facts.arithmetic)
        if changed and epoch < sweep.plan.config.train.epochs:
            _warn(f"{workdir} continues to rounding, not to the same bits: {'; '.join(changed)}")
        return facts
    return None


def _check_facts(plan: Plan, mine: checkpoint.Facts, theirs: checkpoint.Facts) -> None:
    """Raises InputError where a checkpoint is of another run: of other config, random bits or data.

    config.json may be gone or changed: the checkpoint itself says what it is of.
    """
    if differences := configuration.differences(plan.config, theirs.config):
        way_out = (
            f"its checkpoints are of another config: {'; '.join(differences)}; choose another "
            f"WORKDIR"
        )
        raise InputError("--workdir", str(plan.workdir), way_out)
    if differences := provenance.differences(mine.random_bits, theirs.random_bits):
        way_out = (
            f"its checkpoints are of other random bits: {'; '.join(differences)}; set them back "
            f"(as environment "
        )
        way_out += "variables, in capitals), or choose another WORKDIR"
        raise InputError("--workdir", str(plan.workdir), way_out)
    load.check_data(plan.config.data.name, mine.data, theirs.data)


def _warn(line: str) -> None:
    if processes.is_leader():
        print(f"warning: {printable(line)}", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    if processes.is_leader():
        tables.say(tables.make_console(), line)


def _train(
    sweep: Sweep,
    recorded: xr.Dataset | None,
    saved: checkpoint.Checkpoints,
    facts: checkpoint.Facts,
    check_owner: Callable[[], None],
    requests: signals.Requests,
) -> xr.Dataset:
    """The loop from where the sweep stands to its last epoch. `check_owner` before anything is
    written.
    """
    config, workdir, leads = sweep.plan.config, sweep.plan.workdir, processes.is_leader()
    last, every, due = (
        config.train.epochs,
        config.checkpoint.every,
        set(summary.measured_epochs(config)),
    )
    kept = {last, *config.checkpoint.marked, *(range(every, last, every) if every else ())}
    stops = sorted(due | kept)
    attrs = _attrs(sweep, facts)
    trained, costs = 0.0, []
    first = sweep.epoch
    with tables.Progress(last, sweep.program.samples_per_epoch, quiet=not leads) as progress:
        profile = compilation.Profile(config.profile.dir if leads else "", progress.say)
        progress.say(summary.headline(sweep.plan, sweep.program))
        sweep.advance(0, measured=False)
        progress.say(summary.summary(sweep.program))
        if recorded is not None:
            progress.say(f"continuing from epoch {sweep.epoch}")
        while True:
            epoch = sweep.epoch
            if epoch in due and (recorded is None or epoch > int(recorded["epoch"][-1])):
                values, seconds = sweep.advance(0, measured=True)
                costs.append(seconds)
                values |= _derived(sweep, values.pop("class_mean_logits"))
                recorded = history.append(recorded, _label(sweep, values, attrs))
                if leads:
                    check_owner()
                    history.save(recorded, workdir / "history.nc")
                    times = {"train_seconds": trained, "measure_seconds": sum(costs)}
                    journal.append(workdir / "metrics.jsonl", epoch, times, values)
                progress.measured(epoch, values["nc1"][:, 0])
            is_new = epoch > first or epoch == 0
            pace = trained / (epoch - first) if epoch > first else float("inf")
            tracing = profile.is_wanted and (
                epoch > first or epoch + 1 == last
            )  # the first epoch warms up
            most = 1 if tracing else max(1, int(_CHUNK_SECONDS * len(sweep.program.slices) / pace))
            stop = min((stop for stop in stops if stop > epoch), default=last)
            # Asked once: what stops here is also saved here. All processes stop, and go on, alike.
            signum, chunk = processes.agree(requests.signum, min(stop - epoch, most))
            if is_new and (epoch in kept or signum):
                check_owner()
                measured = [] if recorded is None else recorded["epoch"].values.tolist()
                saved.save(sweep.states, facts._replace(epoch=epoch, measured=measured))
            if epoch == last:
                break
            if signum:
                raise signals.Interrupted(signum)
            with profile.traced() if tracing else contextlib.nullcontext():
                _, seconds = sweep.advance(chunk, measured=False)
            trained += seconds
            progress.trained(sweep.epoch, trained / (sweep.epoch - first))
            if epoch == first and seconds / chunk * (last - first) > _CHUNK_SECONDS:
                progress.say(summary.remaining(sweep.program, seconds / chunk, last - sweep.epoch))
        progress.say(_cost(trained, last - first, costs))
    assert recorded is not None  # some epoch up to the last is always measured
    return recorded


def _cost(trained: float, epochs: int, costs: list[float]) -> str:
    """Seconds of training and of each measurement -> what measuring cost."""
    share = sum(costs) / (sum(costs) + trained)
    line = (
        f"trained {trained:.1f} s; {len(costs)} measurements took {sum(costs):.1f} s, {share:.0%} "
        f"of both"
    )
    if costs and epochs:
        line += (
            f"; the median one costs {statistics.median(costs) / (trained / epochs):.2f} training "
            f"epochs"
        )
    return line


def _facts(sweep: Sweep) -> checkpoint.Facts:
    """Returns what every checkpoint of a sweep says of itself, but for its epoch and what was
    measured up to it.
    """
    return checkpoint.Facts(
        epoch=0,
        config=json.loads(configuration.to_json(sweep.plan.config)),
        axes={name: list(values) for name, values in sweep.plan.grid.axes.items()},
        measured=[],
        versions=provenance.versions(),
        crc32={},
        data=dataset.checksums(sweep.plan.dataset),
        random_bits=provenance.random_bits(),
        arithmetic=provenance.arithmetic(sweep.mesh, sweep.program.runs),
    )


def _derived(sweep: Sweep, class_mean_logits: np.ndarray) -> dict[str, np.ndarray]:
    """What no device needs to measure: the clocks, the modes, and the closed form where the
    network has one.
    """
    columns, recipe, config = sweep.columns, sweep.recipe, sweep.plan.config
    weight_decay = recipe.effective_decay(columns["weight_decay"], columns["momentum"])
    flow_time = program.flow_time(
        recipe, columns["learning_rate"], columns["momentum"], np.array([sweep.epoch])
    )[:, 0]
    num_classes, depth = sweep.plan.dataset.num_classes, len(config.model.widths) + 1
    per_class = recipe.train_size // num_classes
    setting = closed_forms.Setting(num_classes, recipe.head_bias, config.targets)
    gamma = closed_forms.unconstrained_gamma(depth, per_class, setting)
    solution = closed_forms.homogeneous_solution(weight_decay, gamma, depth, setting)
    known = (weight_decay > 0) & _is_unconstrained(config)
    return {
        "effective_decay": weight_decay,
        "flow_time": flow_time,
        "relaxation_time": theory.relaxation_time(flow_time, weight_decay),
        "mode_eigenvalues": theory.mode_eigenvalues(class_mean_logits),
        "closed_form_epsilon": np.where(known, solution.epsilon, np.nan),
        "closed_form_nc3": np.where(known, solution.nc3, np.nan),
        "closed_form_norm_sq": np.where(known, solution.weight_norm_sq, np.nan),
    }


def _is_unconstrained(config: configuration.Config) -> bool:
    """Whether a config is the unconstrained-feature model, wide enough for all its modes, and
    seeks critical points.
    """
    return (
        (config.data.name, config.model.activation, config.loss) == ("identity", "linear", "square")
        and config.train.optimizer != "adamw"
        and min(config.model.widths) >= (config.data.num_classes or 10)
    )


def _label(sweep: Sweep, values: dict[str, np.ndarray], attrs: dict[str, str]) -> xr.Dataset:
    """A measurement as one epoch of history."""
    newest = history.one_epoch(
        sweep.epoch,
        values,
        grid=sweep.plan.grid,
        layers=models.layer_names(sweep.shapes.params),
        label_names=sweep.plan.dataset.label_names,
        attrs=attrs,
    )
    if sweep.plan.config.units == "torch":
        newest["weight_decay"].attrs["torch_weight_decay"] = list(
            sweep.plan.config.sweep.weight_decay
        )
    return newest


def _attrs(sweep: Sweep, facts: checkpoint.Facts) -> dict[str, str]:
    """Returns what a history says of where it comes from."""
    return {
        "config": configuration.to_json(sweep.plan.config),
        "versions": json.dumps(facts.versions),
        "per_class": str(len(sweep.plan.dataset.train.labels) // sweep.plan.dataset.num_classes),
        "device": f"{sweep.mesh.size} x {summary.device()}",
        "git_revision": provenance.git_revision(),
    }
