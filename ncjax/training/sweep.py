"""Puts a plan on the devices: divides runs into programs, holds their states, advances them."""

import functools
import math
import re
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ncjax import config as configuration
from ncjax import environment
from ncjax.data.preparation import PreparedDataset
from ncjax.errors import InputError, last_line
from ncjax.plan import Plan
from ncjax.training import every_layer, layers, models, parallel, wiring
from ncjax.training.objective import Objective
from ncjax.training.program import (
    Advance,
    Recipe,
    RunState,
    flow_time,
    host_data,
    make_advance,
    nc0_law,
    place_data,
    start,
    start_shapes,
)
from ncjax.training.targets import Target

# The share of a device's memory that a program may take; the rest is left to the allocator.
_USABLE = 0.9


def make_recipe(config: configuration.Config, dataset: PreparedDataset) -> Recipe:
    """Returns the static part of the compiled programs that a config asks for."""
    model = models.make(config.model, dataset.num_classes, config.train.precision)
    shape = dataset.center.shape
    structure = layers.find(model, shape, config.model.head_bias, config.train.precision)
    return Recipe(
        model=model,
        structure=structure,
        head_bias=config.model.head_bias,
        schedule=config.train.schedule,
        batch_size=config.train.batch_size,
        epochs=config.train.schedule_epochs or config.train.epochs,
        train_size=len(dataset.train.labels),
        objective=Objective(config.loss, config.targets),
        optimizer=config.train.optimizer,
        decay=config.train.decay,
        norms=config.model.norms,
        augment=config.train.augment,
        is_balanced=dataset.is_balanced,
        adam_eps=1e-8 * configuration.unit_factors(config, dataset.num_classes).adam_eps,
        wiring=wiring.find(model, structure, shape) if config.log.layers else None,
    )


class Collectives(NamedTuple):
    """Holds what devices exchange, as `collectives_in` returns it: in a step of training, with what
    they do once an epoch, and in a measurement.
    """

    training: dict[str, list[int]]
    measurement: dict[str, list[int]]


class Program:
    """Compiles a plan to programs that train and measure the grid in equal slices, one after
    another.

    Attributes:
      recipe: what is the same for all runs.
      slices: the slices of the grid's runs, in the order of the grid.
      mesh: the devices.
      target: what they are, if they are not here; else None.
      runs: the number of runs of one slice, padded to the mesh.
      columns: the values of every axis, by run.
    """

    def __init__(self, plan: Plan, most: int, target: Target | None = None):
        """Divides the grid into slices of at most `most` runs, for devices here or of a target."""
        settings, total = plan.config.mesh, plan.grid.size
        size = -(-total // -(-total // most))
        self.recipe = make_recipe(plan.config, plan.dataset)
        self.target, devices = target, target.devices if target else None
        self.mesh = parallel.make_mesh(size, settings.run, settings.data, devices)
        _check_batch(self.recipe, self.mesh)
        self.slices = [slice(first, min(first + size, total)) for first in range(0, total, size)]
        self.runs = parallel.padded(size, self.mesh)
        # A factor that the grid does not name is 1.
        columns = dict.fromkeys(configuration.DECAY_FACTORS, [1.0] * total) | plan.grid.columns()
        self.columns = {name: np.asarray(values) for name, values in columns.items()}
        self._data = host_data(plan.dataset, plan.config.train.precision)
        self.compile_seconds = 0.0

    def columns_of(self, part: slice) -> dict[str, np.ndarray]:
        """Returns `Grid.columns` of a slice, padded so that all slices have the same size."""
        return {
            name: parallel.pad_runs(values[part], self.runs)
            for name, values in self.columns.items()
        }

    @functools.cached_property
    def _started(self) -> tuple[Any, Any, Any]:
        """The shapes of a slice's states, keys and hyperparameters."""
        return start_shapes(self.recipe, self.mesh, self.columns_of(self.slices[0]), self._data)

    @property
    def shapes(self) -> RunState:
        """Returns the shapes of a slice's states."""
        return self._started[0]

    @functools.cached_property
    def compiled(self) -> Advance:
        begin = time.perf_counter()
        compiled = make_advance(self.recipe, self.mesh).compile(*self._started, self._data)
        self.compile_seconds = time.perf_counter() - begin
        return compiled

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Returns the shape of one example."""
        return self._data.center.shape

    @property
    def runs_per_device(self) -> int:
        return self.runs // self.mesh.shape[parallel.RUN]

    @property
    def bytes_per_device(self) -> int:
        """The bytes that XLA reports of data and states, and of what the program that takes the
        most beside them does.
        """
        accounts: list[Any] = [program.memory_analysis() for program in self.compiled]
        train, _, metrics = accounts
        # Donated states are counted as argument and as output.
        train_beside, passes_beside, metrics_beside = (
            a.output_size_in_bytes + a.temp_size_in_bytes - a.alias_size_in_bytes for a in accounts
        )
        sums = metrics.argument_size_in_bytes
        return train.argument_size_in_bytes + max(
            train_beside, passes_beside, sums + metrics_beside
        )

    @property
    def memory(self) -> int | None:
        """The bytes of the smallest device, or None if devices do not tell."""
        return self.target.memory if self.target else parallel.device_memory(self.mesh)

    @property
    def collectives(self) -> Collectives:
        """Returns what the devices exchange."""
        train, *measuring = (program.as_text() for program in self.compiled)
        return Collectives(collectives_in(train), collectives_in("\n".join(measuring)))

    @property
    def bytes_of_data(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._data))

    @property
    def bytes_per_run(self) -> int:
        return (self.bytes_per_device - self.bytes_of_data) // self.runs_per_device

    @property
    def parameters(self) -> int:
        """Returns the number of parameters of one run."""
        return sum(leaf.size // self.runs for leaf in jax.tree.leaves(self.shapes.params))

    @property
    def samples_per_epoch(self) -> int:
        """The number of examples of one epoch over all runs, without padding."""
        batch = self.recipe.batch_size or self.recipe.train_size
        return self.slices[-1].stop * self.recipe.steps_per_epoch * batch

    @property
    def flops_per_epoch(self) -> int:
        """The FLOPs of one epoch's matmuls over all runs; see `training_flops`."""
        return self.samples_per_epoch * training_flops(
            self.recipe.model, self.recipe.structure, self.image_shape
        )


def make_program(plan: Plan, target: Target | None = None) -> Program:
    """Returns the program of a plan, with `sweep.runs_per_program` runs at once.

    By default it has as many runs at once as the memory of the devices holds, which are this
    machine's or a target's.

    Raises:
      InputError: not even one run per device fits, or there are fewer devices than asked for.
    """
    program = make_uncompiled(plan, target)
    limit = program.memory
    # CPUs do not tell their memory, and waiting states would be in the same memory, so all runs are
    # trained at once.
    if plan.config.sweep.runs_per_program or limit is None:
        return program
    widths = tuple(plan.config.model.widths)
    while (fewer := _fewer(program, _USABLE * limit, widths)) is not None:
        if fewer < 1:
            needs, has = program.bytes_per_run + program.bytes_of_data, f"{limit:,} bytes of memory"
            way_out = (
                f"one run needs {needs:,} bytes of a device that has {has}; smaller layers or "
                "batches would do"
            )
            raise InputError("config.model.widths", widths, way_out)
        program = Program(plan, fewer, target)
    return program


def _fewer(program: Program, limit: float, widths: tuple[int, ...]) -> int | None:
    """Returns how many runs at once fit into so many bytes of each device; None if all do.

    Raises:
      InputError: the compiler refuses even one.
    """
    devices = program.mesh.shape[parallel.RUN]
    try:
        needed = program.bytes_per_device
    except jax.errors.JaxRuntimeError as error:
        # The compiler of TPUs refuses what does not fit, so that there is no account of it.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if program.runs_per_device == 1:
            reason = f"one run does not fit a device ({last_line(error)})"
            way_out = f"{reason}; smaller layers or batches would do"
            raise InputError("config.model.widths", widths, way_out) from error
        return program.runs_per_device // 2 * devices
    if needed <= limit:
        return None
    room = (limit - program.bytes_of_data) / program.bytes_per_run
    return min(int(room), program.runs_per_device - 1) * devices


def make_uncompiled(plan: Plan, target: Target | None = None) -> Program:
    """Returns the program that trains all runs of a plan at once, as yet not compiled.

    Raises:
      InputError: its network cannot be made, there are fewer devices than asked for, or the memory
        of a CPU cannot hold its states.
    """
    program = Program(plan, plan.config.sweep.runs_per_program or plan.grid.size, target)
    if program.memory is None:
        _check_host_memory(program, tuple(plan.config.model.widths))
    return program


def _check_host_memory(program: Program, widths: tuple[int, ...]) -> None:
    """Refuses states that a CPU's memory cannot hold, by their shapes, without compiling."""
    states = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.shapes)) * len(
        program.slices
    )
    memory = environment.physical_memory()
    if states > memory:
        way_out = (
            f"weights and momenta of all runs take {states:,} bytes, and there are {memory:,}; "
            "shrink layers"
        )
        raise InputError("config.model.widths", widths, way_out)


def collectives_in(text: str) -> dict[str, list[int]]:
    """Returns the collectives in the text of a compiled program, as kind -> the bytes of what each
    is said to return, in the order of the text; of asynchronous ones but all-reduces that names
    their operands, too.
    """
    found = re.findall(
        r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\(",
        text,
    )
    moved: dict[str, list[int]] = {}
    for shapes, kind in found:
        sizes = [
            int(bits) // 8 * math.prod(int(side) for side in sides.split(",") if side)
            for bits, sides in re.findall(r"[a-z](\d+)\[([\d,]*)\]", shapes)
        ]
        moved.setdefault(kind, []).append(sum(sizes))
    return moved


def training_flops(model: nn.Module, structure: layers.Structure, image: tuple[int, ...]) -> int:
    """Counts the FLOPs of one example in one training step from shapes.

    Each weight takes 6 FLOPs at every position where its kernel is applied: 2 forward, 2 for the
    gradient of the weights and 2 for that of the inputs, which the first layer does not need.
    Weights that no module of their own applies count as if applied once.
    """

    def outputs(x: jax.Array) -> Any:
        variables = layers.init(model, jax.random.key(0), x)
        _, noted = model.apply(
            variables,
            x,
            method=models.outputs,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        return noted["intermediates"]

    with jax.enable_x64(True):
        noted = jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, *image), jnp.float32))
    returned = layers.by_path(noted)
    total = 0
    for number, layer in enumerate(structure.layers):
        calls = returned.get((*layer.path[:-1], "__call__"), ())
        positions = sum(math.prod(call.shape[1:-1]) for call in calls) or 1
        total += (4 if number == 0 else 6) * math.prod(layer.shape) * positions
    return total


def _check_batch(recipe: Recipe, mesh: Mesh) -> None:
    """Refuses batches that would need padding in a network with batch normalization.

    Padding has no weight in a gradient, but it would count in batch statistics.
    """
    devices, batch = mesh.shape[parallel.DATA], recipe.batch_size or recipe.train_size
    if devices == 1 or not recipe.structure.has_statistics:
        return
    if not hasattr(recipe.model, "batch_axis"):
        name = type(recipe.model).__name__
        way_out = (
            f"{name} notes statistics of a batch; give it an attribute batch_axis, its axis_name, "
            "or leave this 1"
        )
        raise InputError("config.mesh.data", devices, way_out)
    if batch % devices:
        raise InputError(
            "config.mesh.data",
            devices,
            f"batch normalization needs a divisor of the batch of {batch}",
        )


class Sweep:
    """Holds the states of a plan's runs and advances them.

    States are on the devices. If there are several slices, those that are not being advanced may be
    in the host's memory.
    """

    def __init__(self, plan: Plan):
        self.plan, self.epoch = plan, 0
        self.program = make_program(plan)
        self.recipe, self.mesh, self.columns = (
            self.program.recipe,
            self.program.mesh,
            self.program.columns,
        )
        self.data = place_data(plan.dataset, self.mesh, plan.config.train.precision)
        self._states, self._fixed = [], []
        for part in self.program.slices:
            states, *fixed = start(self.recipe, self.mesh, self.program.columns_of(part), self.data)
            self._states.append(self._set_aside(states))
            self._fixed.append(fixed)

    @functools.cached_property
    def flow_time(self) -> np.ndarray:
        """The flow time of every run, by epoch, see `program.flow_time`."""
        return flow_time(self.recipe, self.columns, self.plan.config.train.epochs)

    @functools.cached_property
    def nc0_law(self) -> np.ndarray:
        """NC0 of every run over its initial value, by epoch, see `program.nc0_law`."""
        return nc0_law(self.recipe, self.columns, self.plan.config.train.epochs)

    def compile(self) -> None:
        """Compiles the program, unless `make_program` already has, to learn its memory."""
        _ = self.program.compiled

    def advance(self, epochs: int, measured: bool) -> tuple[dict[str, np.ndarray], float]:
        """Trains, then measures if asked; returns (R, ...) measurements, or {}, and the seconds."""
        begin, measurements = time.perf_counter(), []
        for i, (part, (keys, hyper)) in enumerate(
            zip(self.program.slices, self._fixed, strict=True)
        ):
            states = jax.device_put(self._states[i], parallel.by_run(self.mesh))
            states, metrics = self.program.compiled(
                states, keys, hyper, self.data, epochs, measured
            )
            if measured:
                values: Any = parallel.fetch(metrics)  # NumPy arrays
                values |= self._weight_metrics(states, values["finite"])
                measurements.append(_first(values, part.stop - part.start))
            self._states[i] = self._set_aside(jax.block_until_ready(states))
        self.epoch += epochs
        return _join(measurements) if measured else {}, time.perf_counter() - begin

    def _weight_metrics(self, states: RunState, finite: np.ndarray) -> dict[str, np.ndarray]:
        if self.recipe.wiring is None:
            return {}
        params = parallel.fetch(states.params)
        return every_layer.weight_metrics(params, finite, self.recipe.structure, self.recipe.wiring)

    @property
    def states(self) -> RunState:
        """The states of all runs in the order of the grid.

        They are on the devices if the runs fill one program without padding, else NumPy arrays.
        """
        slices = self.program.slices
        if len(slices) == 1 and slices[0].stop == self.program.runs:
            return self._states[0]
        parts = zip(slices, self._states, strict=True)
        return _join(
            [_first(parallel.fetch(states), part.stop - part.start) for part, states in parts]
        )

    @property
    def shapes(self) -> RunState:
        """Returns the shapes of `states`."""
        runs = self.program.slices[-1].stop
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((runs, *s.shape[1:]), s.dtype), self.program.shapes
        )

    def restore(self, states: RunState, epoch: int) -> None:
        """Continues from the `states` of all runs, NumPy arrays, at an epoch."""
        self.epoch = epoch
        with jax.enable_x64(True):
            for i, part in enumerate(self.program.slices):
                mine = jax.tree.map(lambda leaf, part=part: leaf[part], states)
                padded = parallel.pad_runs(mine, self.program.runs)
                self._states[i] = self._set_aside(
                    parallel.place(padded, parallel.by_run(self.mesh))
                )

    def _set_aside(self, states: RunState) -> RunState:
        """Moves states to the host if slices take turns on devices that have their own memory."""
        if len(self.program.slices) == 1 or _shares_memory(self.mesh):
            return states
        return jax.device_put(states, parallel.by_run(self.mesh).with_memory_kind("pinned_host"))


def _shares_memory(mesh: Mesh) -> bool:
    """Returns whether the devices use the memory of the host."""
    return parallel.platform(mesh) == "cpu"


def _first(tree: parallel.T, runs: int) -> parallel.T:
    return jax.tree.map(lambda leaf: leaf[:runs], tree)


def _join(parts: list[parallel.T]) -> parallel.T:
    return (
        parts[0]
        if len(parts) == 1
        else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    )
