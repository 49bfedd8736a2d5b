"""A plan on the devices: which runs share a program, their states, and what advances them."""

import functools
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ncjax import config as configuration
from ncjax import environment
from ncjax.data.preparation import PreparedDataset
from ncjax.errors import InputError
from ncjax.plan import Plan
from ncjax.training import mesh as parallel
from ncjax.training import models
from ncjax.training import program as train
from ncjax.training.objective import Objective

# Of a device's memory, what a program may take; the rest is the allocator's.
_USABLE = 0.9


def make_recipe(config: configuration.Config, dataset: PreparedDataset) -> train.Recipe:
    """Returns the static part of the compiled program that a config asks for."""
    return train.Recipe(
        model=models.make(config.model, dataset.num_classes, config.train.precision),
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
    )


class Program:
    """Compiles a plan to one program, which takes the runs of the grid in equal slices, one after
    another.

    Attributes:
      slices: of the grid, in its order.
      mesh: the devices.
      runs: of one slice, padded to the mesh.
    """

    def __init__(self, plan: Plan, most: int):
        """`most`: runs at once."""
        settings, total = plan.config.mesh, plan.grid.size
        size = -(-total // -(-total // most))
        self.recipe = make_recipe(plan.config, plan.dataset)
        self.mesh = parallel.make_mesh(size, settings.run, settings.data)
        _check_batch(self.recipe, self.mesh)
        self.slices = [slice(first, min(first + size, total)) for first in range(0, total, size)]
        self.runs = parallel.padded(size, self.mesh)
        self.columns = {name: np.asarray(values) for name, values in plan.grid.columns().items()}
        self._data = train.host_data(plan.dataset, plan.config.train.precision)
        self.compile_seconds = 0.0

    def columns_of(self, part: slice) -> dict[str, np.ndarray]:
        """`Grid.columns` of a slice, filled up so that all slices are of one size."""
        return {
            name: parallel.pad_runs(values[part], self.runs)
            for name, values in self.columns.items()
        }

    @functools.cached_property
    def _started(self) -> tuple:
        """Returns the shapes of a slice's states, keys and hyperparameters."""
        return train.start_shapes(
            self.recipe, self.mesh, self.columns_of(self.slices[0]), self._data
        )

    @property
    def shapes(self) -> train.RunState:
        """Returns the shapes of a slice's states."""
        return self._started[0]

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        begin = time.perf_counter()
        compiled = train.make_advance(self.recipe, self.mesh).compile(
            *self._started, self._data, 0, False
        )
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
        """Data, states, and what the program needs for itself: XLA's own account of the compiled
        program.
        """
        memory: Any = self.compiled.memory_analysis()
        shared = memory.alias_size_in_bytes  # donated states are counted as argument and as output
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - shared
        )

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
        """Returns the examples of one epoch over all runs, without padding."""
        batch = self.recipe.batch_size or self.recipe.train_size
        return self.slices[-1].stop * self.recipe.steps_per_epoch * batch

    @property
    def flops_per_epoch(self) -> int:
        """Returns the FLOPs of one epoch's matmuls over all runs, see `training_flops`."""
        return self.samples_per_epoch * training_flops(self.recipe.model, self.image_shape)


def make_program(plan: Plan) -> Program:
    """With `sweep.runs_per_program` runs at once; by default with as many as the devices' memory
    holds.

    Raises:
      InputError: not even one run a device fits, or there are not so many devices.
    """
    program = Program(plan, plan.config.sweep.runs_per_program or plan.grid.size)
    limit = parallel.device_memory(program.mesh)
    # A CPU says nothing of its memory, and states that wait would lie in it all the same: all runs
    # at once.
    if limit is None:
        _check_host_memory(program, tuple(plan.config.model.widths))
    if plan.config.sweep.runs_per_program or limit is None:
        return program
    while program.bytes_per_device > _USABLE * limit:
        room = (_USABLE * limit - program.bytes_of_data) / program.bytes_per_run
        fewer = min(int(room), program.runs_per_device - 1) * program.mesh.shape[parallel.RUN]
        if fewer < 1:
            needs, has = program.bytes_per_run + program.bytes_of_data, f"{limit:,} bytes of memory"
            way_out = (
                f"one run needs {needs:,} bytes of a device that has {has}; smaller layers or "
                "batches would do"
            )
            raise InputError("config.model.widths", tuple(plan.config.model.widths), way_out)
        program = Program(plan, fewer)
    return program


def _check_host_memory(program: Program, widths: tuple[int, ...]) -> None:
    """Refuses states that a CPU's memory cannot hold, by their shapes alone: nothing is compiled
    to find out.
    """
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


def training_flops(model: models.Network, image: tuple[int, ...]) -> int:
    """Counts the FLOPs of one example in one step from shapes: 6 a weight and position (where a
    kernel is applied), 2 of them forward, 2 for the gradient of the weights and 2 for that of the
    inputs, which the first layer does not need.
    """

    def outputs(x: jax.Array) -> tuple[Any, Any]:
        variables = model.init(jax.random.key(0), x)
        _, noted = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        return variables["params"], noted["intermediates"]

    with jax.enable_x64(True):
        params, noted = jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, *image), model.dtype))
    total = 0
    for number, layer in enumerate(models.layer_names(params)):
        positions = math.prod(noted[layer]["__call__"][0].shape[1:-1])
        total += (4 if number == 0 else 6) * params[layer]["kernel"].size * positions
    return total


def _check_batch(recipe: train.Recipe, mesh: Mesh) -> None:
    """Rows that fill up a device's share have no weight in a gradient, but would count in batch
    statistics.
    """
    devices, batch = mesh.shape[parallel.DATA], recipe.batch_size or recipe.train_size
    if isinstance(recipe.model, models.BatchNormConvNet) and batch % devices:
        raise InputError(
            "config.mesh.data",
            devices,
            f"batch normalization needs a divisor of the batch of {batch}",
        )


class Sweep:
    """The runs of a plan: their states on the devices, or, but for the slice that is advanced,
    beside them.
    """

    def __init__(self, plan: Plan):
        self.plan, self.epoch = plan, 0
        self.program = make_program(plan)
        self.recipe, self.mesh, self.columns = (
            self.program.recipe,
            self.program.mesh,
            self.program.columns,
        )
        self.data = train.place_data(plan.dataset, self.mesh, plan.config.train.precision)
        self._states, self._fixed = [], []
        for part in self.program.slices:
            states, *fixed = train.start(
                self.recipe, self.mesh, self.program.columns_of(part), self.data
            )
            self._states.append(self._set_aside(states))
            self._fixed.append(fixed)

    def compile(self) -> None:
        """Compiles the program, unless `make_program` had to in order to know its memory."""
        _ = self.program.compiled

    def advance(self, epochs: int, measured: bool) -> tuple[dict[str, np.ndarray], float]:
        """Trains, then measures; returns (R, ...) measurements ({} if not measured) and the
        seconds it took.
        """
        begin, measurements = time.perf_counter(), []
        for i, (part, fixed) in enumerate(zip(self.program.slices, self._fixed, strict=True)):
            states = jax.device_put(self._states[i], parallel.by_run(self.mesh))
            with jax.enable_x64(True):
                states, metrics = self.program.compiled(states, *fixed, self.data, epochs, measured)
            if measured:
                measurements.append(_first(parallel.fetch(metrics), part.stop - part.start))
            self._states[i] = self._set_aside(jax.block_until_ready(states))
        self.epoch += epochs
        return _join(measurements) if measured else {}, time.perf_counter() - begin

    @property
    def states(self) -> train.RunState:
        """Returns the states of all runs in the order of the grid: on the devices where they fill
        one program, else NumPy arrays.
        """
        slices = self.program.slices
        if len(slices) == 1 and slices[0].stop == self.program.runs:
            return self._states[0]
        parts = zip(slices, self._states, strict=True)
        return _join(
            [_first(parallel.fetch(states), part.stop - part.start) for part, states in parts]
        )

    @property
    def shapes(self) -> train.RunState:
        """Returns the shapes of `states`."""
        runs = self.program.slices[-1].stop
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((runs, *s.shape[1:]), s.dtype), self.program.shapes
        )

    def restore(self, states: train.RunState, epoch: int) -> None:
        """Takes up `states` (NumPy arrays, of all runs) of an epoch."""
        self.epoch = epoch
        with jax.enable_x64(True):
            for i, part in enumerate(self.program.slices):
                mine = jax.tree.map(lambda leaf, part=part: leaf[part], states)
                padded = parallel.pad_runs(mine, self.program.runs)
                self._states[i] = self._set_aside(
                    parallel.place(padded, parallel.by_run(self.mesh))
                )

    def _set_aside(self, states: train.RunState) -> train.RunState:
        """To the host's memory, where several slices take turns on devices that have their own."""
        if len(self.program.slices) == 1 or _shares_memory(self.mesh):
            return states
        return jax.device_put(states, parallel.by_run(self.mesh).with_memory_kind("pinned_host"))


def _shares_memory(mesh: Mesh) -> bool:
    """Returns whether the devices use the memory of the host."""
    return mesh.devices.flat[0].platform == "cpu"


def _first(tree: parallel.T, runs: int) -> parallel.T:
    return jax.tree.map(lambda leaf: leaf[:runs], tree)


def _join(parts: list[parallel.T]) -> parallel.T:
    return (
        parts[0]
        if len(parts) == 1
        else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    )
