"""Describes a run before it trains: its headline, its plan, and the output of a dry run."""

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ncjax import config as configuration
from ncjax.errors import listed, printable
from ncjax.plan import Plan
from ncjax.report import tables
from ncjax.runs.schedule import make_schedule
from ncjax.training import layers, parallel
from ncjax.training.sweep import Program
from ncjax.training.targets import Target

# What is said of `log.layers`; benchmarks/layers.py measures it.
LAYERS = "every layer is measured: up to one training epoch more per measurement"


def headline(plan: Plan, program: Program) -> str:
    grid, dataset = plan.grid, plan.dataset
    shape = " x ".join(f"{len(grid.axes[name])} {name}" for name in grid.dims)
    devices, kind = program.mesh.size, program.mesh.devices.flat[0].device_kind
    return (
        f"{grid.size} runs ({shape}) of {_network(plan)} on {plan.config.data.name}: "
        f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test examples, "
        f"{devices} {kind} device{'s' * (devices > 1)}"
    )


def summary(program: Program) -> str:
    """Returns one line about compiled programs: their size, memory and FLOPs."""
    return (
        f"compiled in {program.compile_seconds:.1f} s: {_programs(program)} on {_mesh(program)}; "
        f"a run has {program.parameters:,} parameters and takes {_bytes(program.bytes_per_run)}; "
        f"{_flops(program.flops_per_epoch)} an epoch"
    )


def remaining(program: Program, seconds_per_epoch: float, epochs: int) -> str:
    """Returns one line on the training time that is left, without measurements."""
    rate = program.flops_per_epoch / seconds_per_epoch
    return (
        f"about {tables.duration(seconds_per_epoch * epochs)} of training left, at {_flops(rate)}/s"
    )


def show(plan: Plan, program: Program, console: Console) -> None:
    """Prints all that is known about a run before training."""
    config, recipe = plan.config, program.recipe
    table = Table(title=printable(headline(plan, program)), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for name in plan.grid.dims:
        table.add_row(name, listed(plan.grid.axes[name]))
    params = layers.by_path(program.shapes.params)
    for path in recipe.structure.leaves:
        table.add_row(".".join(path), " x ".join(map(str, params[path].shape[1:])))
    rows = {
        "parameters": f"{program.parameters:,} a run, {program.parameters * plan.grid.size:,} in "
        "all",
        "epochs": f"{config.train.epochs:,} of {recipe.steps_per_epoch:,} steps",
        "measured at": listed(sorted(make_schedule(config).measured)),
        "mesh": _mesh(program),
        "programs": _programs(program),
        "memory": f"{_bytes(program.bytes_per_run)} a run, {_bytes(program.bytes_of_data)} of "
        "data and so "
        f"{_bytes(program.bytes_per_device)} on each device, {_room(program)}",
        "FLOPs": f"{_flops(program.flops_per_epoch)} an epoch, "
        f"{_flops(program.flops_per_epoch * config.train.epochs)} to train (matmuls, counted from "
        "shapes)",
    }
    if program.target is not None:
        rows |= _target(program, program.target)
    if recipe.wiring is not None:
        rows["layers"] = LAYERS
    if plan.grown_from is not None:
        held = configuration.make_grid(plan.grown_from, plan.dataset.num_classes).size
        rows["growth"] = (
            f"{held} runs are in {plan.workdir}; the other {plan.grid.size - held} train"
        )
    if remark := recipe.structure.remark():
        rows["homogeneity"] = remark
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def device() -> str:
    return jax.devices()[0].device_kind


def _network(plan: Plan) -> str:
    """Returns the network as in "784-512-512-10" or "32x32x3-32-64-10 (conv, batch norm)"."""
    model, image = plan.config.model, plan.dataset.center.shape
    if model.network:
        return model.network
    convolves = model.kind in ("conv", "resnet18")
    inputs = "x".join(map(str, image)) if convolves else int(np.prod(image))
    words = [model.kind] * (model.kind != "mlp")
    words += [f"{model.normalization} norm"] * (model.normalization != "none")
    before = model.feature_normalization
    words += [f"{before} norm before the head"] * (before != "none")
    layers = "-".join(map(str, (inputs, *model.widths, plan.dataset.num_classes)))
    return layers + (f" ({', '.join(words)})" if words else "")


def _mesh(program: Program) -> str:
    run, data = (program.mesh.shape[axis] for axis in (parallel.RUN, parallel.DATA))
    processes = jax.process_count()
    return f"{run} x {data} devices (run x data)" + (
        f" of {processes} processes" if processes > 1 else ""
    )


def _programs(program: Program) -> str:
    count, runs = len(program.slices), program.slices[0].stop
    filling = program.runs * count - program.slices[-1].stop
    words = (
        f"{runs} runs at once"
        if count == 1
        else f"{count} programs of {runs} runs, one after another"
    )
    return words + (f" (and {filling} repeated, to fill the mesh)" if filling else "")


def _room(program: Program) -> str:
    limit = program.memory
    return f"which has {_bytes(limit)}" if limit else "which does not say how much it has"


def _target(program: Program, target: Target) -> dict[str, str]:
    """Returns the rows about devices that are not here."""
    training, measurement = program.collectives
    return {
        "compiled for": f"{target.words}, in {program.compile_seconds:.0f} s",
        "collectives": f"in a training step {_exchanged(training)}; in a measurement "
        f"{_exchanged(measurement)}",
    }


def _exchanged(collectives: dict[str, list[int]]) -> str:
    return (
        ", ".join(
            f"{len(sizes)} {kind}{'s' * (len(sizes) > 1)} of {_bytes(sum(sizes))}"
            + " in all" * (len(sizes) > 1)
            for kind, sizes in collectives.items()
        )
        or "none"
    )


def _bytes(number: float | int) -> str:
    return _scaled(number, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def _flops(number: float | int) -> str:
    return _scaled(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(number: float | int, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if round(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= base
    return f"{number:.3g} {units[-1]}"
