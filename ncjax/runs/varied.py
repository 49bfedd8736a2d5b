"""Trains the variants of a config one after another and joins their histories.

Each variant is trained in WORKDIR/DIMENSION=LABEL as any sweep is: it resumes, grows and is
verified there. WORKDIR itself has config.json, which names the fields that vary, and, once all
variants are trained, the history of all.
"""

import contextlib
import json
from collections.abc import Callable, Mapping

import xarray as xr

from ncjax import variation
from ncjax.errors import InputError
from ncjax.plan import VariedPlan
from ncjax.runs import loop, processes
from ncjax.storage import history, lock, varied
from ncjax.storage.files import remove_leftovers, write_atomically
from ncjax.training.sweep import make_uncompiled
from ncjax.training.targets import Target
from ncjax.variation import Label

Callback = Callable[[xr.Dataset], object]


def train_and_show(plan: VariedPlan) -> xr.Dataset:
    """Calls `train`, then `loop.show`; returns the history."""
    recorded = train(plan)
    reports = plan.plans[0].config.report.enabled
    loop.show(recorded, plan.workdir, ("history.nc",), reports=reports)
    loop.say(f"checkpoints/ are in the folders of variants, as in {plan.plans[0].workdir}")
    return recorded


def preview(plan: VariedPlan, target: Target | None = None) -> None:
    """Does what `loop.preview` does for every variant, each under its name."""
    for labels, one in plan.named:
        loop.start_jax(one)
        loop.say(f"variant {variation.words_of(labels)}")
        loop.describe(one, target)
    loop.say("nothing was trained and nothing was written")


def train(plan: VariedPlan, on_measurement: Callback | None = None) -> xr.Dataset:
    """Trains what is left of every variant and returns the history of all.

    `on_measurement` is called as by `loop.train`, with the labels of the variant as coordinates.

    Raises:
      InputError: as by `loop.train`, and where a network cannot be made, before any is trained.
      Interrupted: by SIGINT or SIGTERM, once all that was computed is on disk.
    """
    loop.start_jax(plan.plans[0])
    owned = lock.owned(plan.workdir) if processes.is_leader() else contextlib.nullcontext()
    with owned:
        _check_programs(plan)
        config = _config_text(plan)
        if processes.is_leader():
            remove_leftovers(plan.workdir)
            write_atomically(plan.workdir / "config.json", config.encode())
        histories = []
        for number, (labels, one) in enumerate(plan.named):
            loop.say(f"variant {number + 1} of {len(plan.plans)}: {variation.words_of(labels)}")
            if processes.is_leader():
                one.workdir.mkdir(exist_ok=True)
            histories.append(loop.train(one, _labelling(on_measurement, labels)))
        joined = varied.join(histories, plan.variation.labels, config)
        if processes.is_leader():
            history.save(joined, plan.workdir / "history.nc")
    return joined


def _check_programs(plan: VariedPlan) -> None:
    """Raises InputError if the network of a variant cannot be made or does not fit."""
    for labels, one in plan.named:
        try:
            make_uncompiled(one)
        except InputError as error:
            raise variation.of_variant(error, variation.words_of(labels)) from error


def _labelling(function: Callback | None, labels: Mapping[str, Label]) -> Callback | None:
    """Returns a callback that gives a measurement the labels of its variant."""
    if function is None:
        return None
    return lambda measured: function(measured.assign_coords(labels))


def _config_text(plan: VariedPlan) -> str:
    stored = variation.to_stored(plan.plans[0].config, plan.variation)
    return json.dumps(stored, indent=2, sort_keys=True) + "\n"
