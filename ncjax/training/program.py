"""Defines the compiled programs that train and measure all runs of a grid at once."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from ncjax.config import OPTIMIZERS, Augmentation, Decay, HeadBias, NormDecay, Optimizer, Schedule
from ncjax.data.preparation import PreparedDataset
from ncjax.metrics import closed_forms
from ncjax.training import compilation, evaluate, every_layer, layers, models, optim, parallel
from ncjax.training.augment import augment
from ncjax.training.evaluate import Data, RunSums, Split
from ncjax.training.objective import Objective
from ncjax.training.parallel import DATA, RUN, Share
from ncjax.training.wiring import Wiring


class Hyper(NamedTuple):
    """Holds the numbers a grid sweeps, one per run, traced so that all runs share one program."""

    weight_decay: Float[Array, ""]
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    init_scale: Float[Array, ""]
    # Factors on weight decay; of a grid that has none, 1.
    decay_hidden: Float[Array, ""]
    decay_head: Float[Array, ""]
    decay_bias: Float[Array, ""]


class RunState(NamedTuple):
    """Holds what training changes; the leaves of stacked runs have a leading run axis."""

    params: dict
    model_state: dict  # other collections of the network: `batch_stats` of batch normalization
    opt_state: optax.OptState
    epoch: Int[Array, ""]

    @property
    def variables(self) -> dict:
        """The variables that flax applies the network with."""
        return {"params": self.params, **self.model_state}


class Recipe(NamedTuple):
    """Holds what is the same for every run of a sweep; two different recipes take two sweeps.

    Attributes:
      model: the network.
      structure: the layers of the network.
      head_bias: `none`, `free` or `decayed`.
      norms: whether scales and shifts of batch normalization are `decayed` or `free`.
      objective: the loss and its targets.
      optimizer, decay, adam_eps: the arguments of `optim.make_optimizer`.
      schedule: the schedule of the learning rate, see `optim.schedule_shape`.
      batch_size: the number of examples per step, 0 for all; a partial last batch is dropped.
      epochs: the length of the schedule in epochs.
      train_size: the number of training examples.
      augment: `none`, `crop` or `crop_flip`.
      is_balanced: whether all classes have the same number of training examples.
      wiring: how layers follow one another, if every layer is measured.
    """

    model: nn.Module
    structure: layers.Structure
    head_bias: HeadBias
    schedule: Schedule
    batch_size: int
    epochs: int
    train_size: int
    objective: Objective = Objective()
    optimizer: Optimizer = "sgd"
    decay: Decay = "coupled"
    adam_eps: float = 1e-8
    norms: NormDecay = "decayed"
    augment: Augmentation = "none"
    is_balanced: bool = True
    wiring: Wiring | None = None

    @property
    def probe(self) -> every_layer.Probe | None:
        """Returns what is measured of every layer, or None."""
        if self.wiring is None:
            return None
        return every_layer.Probe(self.model, self.structure, self.wiring)

    @property
    def meaning(self) -> evaluate.Meaning:
        """Returns what decides which metrics have a meaning."""
        return evaluate.Meaning(self.structure, self.objective, self.is_balanced, self.probe)

    @property
    def steps_per_epoch(self) -> int:
        return self.train_size // self.batch_size if self.batch_size else 1

    def make_tx(self, hyper: Hyper, params: dict) -> optax.GradientTransformation:
        return optim.make_optimizer(
            self.optimizer,
            self.decay,
            hyper.weight_decay,
            hyper.learning_rate,
            hyper.momentum,
            decayed=self.decayed(params, hyper),
            schedule=self.schedule,
            total_steps=self.epochs * self.steps_per_epoch,
            adam_eps=self.adam_eps,
        )

    def decayed(self, params: dict, hyper: Hyper) -> dict:
        """Returns the factor on lambda of every leaf, see `layers.decay_factors`."""
        factors = (hyper.decay_hidden, hyper.decay_head, hyper.decay_bias)
        return layers.decay_factors(params, *factors, self.head_bias, self.norms)

    def effective_decay(
        self, weight_decay: optim.Numbers, momentum: optim.Numbers
    ) -> optim.Numbers:
        return optim.effective_decay(self.optimizer, self.decay, weight_decay, momentum)


def init_run(
    key: Key[Array, ""], hyper: Hyper, recipe: Recipe, inputs: Float[Array, "1 *image"]
) -> RunState:
    """Initializes a run.

    The weights depend on the key and are scaled by `hyper.init_scale`; they do not depend on
    lambda.
    """
    model_state = layers.init(recipe.model, key, inputs)
    params = layers.by_path(model_state.pop("params"))
    for layer in recipe.structure.layers:
        weights = params[layer.path]
        params[layer.path] = weights * hyper.init_scale.astype(weights.dtype)
    params = layers.nest(params)
    return RunState(
        params, model_state, recipe.make_tx(hyper, params).init(params), jnp.zeros((), jnp.int32)
    )


def batch_indices(
    key: Key[Array, ""], epoch: Int[Array, ""], recipe: Recipe
) -> Int[Array, "steps B"]:
    """Draws the batches of an epoch from the key and the epoch, without carrying random state."""
    size, steps = recipe.train_size, recipe.steps_per_epoch
    if not recipe.batch_size:
        return jnp.arange(size)[None]
    # One sort of single words is much faster on a CPU than the sorts of pairs that
    # jax.random.permutation does. The index in the low half makes the words distinct.
    bits = jax.random.bits(jax.random.fold_in(key, epoch), (size,), jnp.uint32)
    words = (bits.astype(jnp.uint64) << 32) | jnp.arange(size, dtype=jnp.uint64)
    order = (jnp.sort(words) & 0xFFFFFFFF).astype(jnp.int32)
    return order[: steps * recipe.batch_size].reshape(steps, recipe.batch_size)


def train_step(
    state: RunState,
    index: Int[Array, " B"],
    key: Key[Array, ""],
    hyper: Hyper,
    data: Data,
    recipe: Recipe,
    share: Share = Share(),  # noqa: B008 (immutable)
) -> RunState:
    """Takes one step of the optimizer on the examples `index`.

    The key decides how they are augmented, and what dropout drops.

    If devices share the batch, each computes the gradient of its part, and one all-reduce sums the
    gradients.
    """
    mine, is_mine = share.part(index)
    images, labels = data.train.images[mine], data.train.labels[mine]
    images = augment(recipe.augment, key, images, len(index), lambda drawn: share.part(drawn)[0])

    def fit(params: dict) -> tuple[Float[Array, ""], dict]:
        outputs, model_state = layers.train_outputs(
            recipe.model,
            {"params": params, **state.model_state},
            data.normalize(images),
            jax.random.fold_in(key, 1),
        )
        y = recipe.objective.target(labels, outputs.shape[1], outputs.dtype)
        losses = jnp.where(is_mine, recipe.objective.fit(outputs, y), 0)
        return jnp.sum(losses) / len(index), model_state

    gradients, model_state = jax.grad(fit, has_aux=True)(state.params)
    gradients = share.sum(gradients)
    updates, opt_state = recipe.make_tx(hyper, state.params).update(
        gradients, state.opt_state, state.params
    )
    params: Any = optax.apply_updates(state.params, updates)
    return RunState(params, model_state, opt_state, state.epoch)


def train_epoch(
    state: RunState, key: Key[Array, ""], hyper: Hyper, data: Data, recipe: Recipe, share: Share
) -> RunState:
    # The batches use fold_in(key, epoch). The complement of the epoch keeps the random stream of
    # augmentation apart from theirs.
    views = jax.random.fold_in(key, ~state.epoch)

    def step(state: RunState, batch: tuple[Array, Array]) -> tuple[RunState, None]:
        number, index = batch
        return train_step(
            state, index, jax.random.fold_in(views, number), hyper, data, recipe, share
        ), None

    indices = batch_indices(key, state.epoch, recipe)
    state, _ = lax.scan(step, state, (jnp.arange(len(indices), dtype=jnp.uint32), indices))
    return state._replace(epoch=state.epoch + 1)


def measure(
    variables: dict,
    hyper: Hyper,
    data: Data,
    recipe: Recipe,
    platform: str,
    share: Share = Share(),  # noqa: B008 (immutable)
) -> dict[str, Array]:
    """Measures stacked runs, each at the lambda whose critical points its optimizer seeks.

    Returns:
      The metrics of `evaluate.metrics`, each with a leading run axis.
    """
    found = sums_of_runs(variables, hyper, data, recipe, platform, share)
    return metrics_of_runs(*found, recipe.meaning, platform)


def sums_of_runs(
    variables: dict, hyper: Hyper, data: Data, recipe: Recipe, platform: str, share: Share
) -> tuple[RunSums, Float[Array, " R"]]:
    """Passes over the examples with stacked runs, few at a time; returns what `evaluate.collect`
    finds, and the lambda of each run.
    """

    weight_decay = recipe.effective_decay(hyper.weight_decay, hyper.momentum)
    _, group = parallel.group_sizes(len(weight_decay), platform, recipe.structure.has_convolutions)

    def collect(variables: dict, hyper: Hyper, weight_decay: Array) -> RunSums:
        return evaluate.collect(
            variables,
            weight_decay,
            data,
            model=recipe.model,
            structure=recipe.structure,
            decayed=recipe.decayed(variables["params"], hyper),
            objective=recipe.objective,
            share=share,
            probe=recipe.probe,
            most_held=parallel.held_bytes(group, platform),
        )

    return _in_groups(collect, group, variables, hyper, weight_decay), weight_decay


def metrics_of_runs(
    sums: RunSums, weight_decay: Float[Array, " R"], meaning: evaluate.Meaning, platform: str
) -> dict[str, Array]:
    """Computes the metrics of stacked runs: many small steps, which cost the same for many runs as
    for one.
    """
    group = parallel.side_by_side(len(weight_decay), sums.head[0].size, platform)

    def metrics(sums: RunSums, weight_decay: Array) -> dict[str, Array]:
        return evaluate.metrics(sums, weight_decay, meaning)

    return _in_groups(metrics, group, sums, weight_decay)


class Advance(NamedTuple):
    """Trains, then measures if asked, with float64 enabled; see `make_advance`.

    Small sums of a measurement are float64 and batches are sorted as 64-bit words, whatever the
    precision of training. The whole trace must be made with it, because vmap batches the bodies of
    loops after tracing them.

    Attributes:
      train: the program that trains. The others do not depend on its schedule, batches and
        augmentation, so that sweeps which differ in these alone share them in the compile cache.
      passes: the program that passes over the examples.
      metrics: the program that computes metrics from what the passes leave. It knows neither data
        nor optimizer, so that recipes of one `meaning` whose sums have the same shapes share it.
    """

    train: Any
    passes: Any
    metrics: Any

    def __call__(
        self, states: RunState, keys: Array, hyper: Hyper, data: Data, epochs: int, measured: bool
    ) -> tuple[RunState, dict[str, Array]]:
        with jax.enable_x64(True):
            if epochs:
                states = self.train(states, keys, hyper, data, epochs)
            if not measured:
                return states, {}
            return states, self.metrics(*self.passes(states.variables, hyper, data))

    def trace(self, states: Any, keys: Any, hyper: Any, data: Data) -> Iterator[jax.stages.Traced]:
        """Traces the programs, one after another, for arguments of these shapes, which may be
        `jax.ShapeDtypeStruct`s in their places.
        """
        # A generator that waits would leave float64 enabled in its caller.
        with jax.enable_x64(True):
            train = self.train.trace(states, keys, hyper, data, 0)
        yield train
        with jax.enable_x64(True):
            passes = self.passes.trace(states.variables, hyper, data)
        yield passes
        with jax.enable_x64(True):
            metrics = self.metrics.trace(*passes.out_info)
        yield metrics

    def compile(self, states: Any, keys: Any, hyper: Any, data: Data) -> "Advance":
        """Compiles the programs, each while the next is traced; arguments are those of `trace`."""
        # Lowering needs float64, too; compiling, in the threads, does not.
        with jax.enable_x64(True), ThreadPoolExecutor(len(self)) as threads:
            compiled = [
                threads.submit(traced.lower().compile)
                for traced in self.trace(states, keys, hyper, data)
            ]
            return Advance(*(one.result() for one in compiled))


def make_advance(recipe: Recipe, mesh: Mesh) -> Advance:
    """Builds the programs of a sweep, which are compiled at their first call or by `compile`.

    Returns:
      advance(states, keys, hyper, data, n_epochs, measured) -> (states, metrics). `states`, `keys`
      and `hyper` are stacked over runs and sharded over the mesh; `states` is donated. `n_epochs`
      is traced, so chunks of any length share one trace. Metrics are those of `evaluate.metrics`,
      each with a leading run axis; {} if not measured.
    """
    share = Share(mesh.shape[DATA])
    platform = parallel.platform(mesh)
    model = models.placed(recipe.model, platform, DATA if share.devices > 1 else None)
    recipe = recipe._replace(model=model)

    def train(states, keys, hyper, data, n_epochs):
        def train_run(state: RunState, key: Array, hyper: Hyper) -> RunState:
            def epoch(_: Array, state: RunState) -> RunState:
                return train_epoch(state, key, hyper, data, recipe, share)

            return lax.fori_loop(0, n_epochs, epoch, state)

        group, _ = parallel.group_sizes(len(keys), platform, recipe.structure.has_convolutions)
        return _in_place(train_run, group, states, keys, hyper)

    def passes(variables, hyper, data):
        return sums_of_runs(variables, hyper, data, recipe, platform, share)

    runs, everywhere = PartitionSpec(RUN), PartitionSpec()
    arguments = (runs, runs, runs, everywhere, everywhere)
    return Advance(
        # Unused arguments are kept, so that XLA's account of memory has all data.
        _on_mesh(train, mesh, *arguments, donate_argnums=0, keep_unused=True),
        _on_mesh(
            passes, mesh, runs, runs, everywhere, compiler_options=_fast_compile_options(mesh)
        ),
        _make_metrics(recipe.meaning, mesh),
    )


@functools.lru_cache(maxsize=64)
def _make_metrics(meaning: evaluate.Meaning, mesh: Mesh) -> Any:
    """Returns the jitted program (sums, weight_decay) -> metrics of the runs on a mesh."""
    platform, runs = parallel.platform(mesh), PartitionSpec(RUN)

    def metrics(sums, weight_decay):
        return metrics_of_runs(sums, weight_decay, meaning, platform)

    return _on_mesh(metrics, mesh, runs, runs, compiler_options=_fast_compile_options(mesh))


def _on_mesh(f: Callable, mesh: Mesh, *specs: PartitionSpec, **options: Any) -> Any:
    """Returns the jitted program that does f on each device of a mesh, with arguments divided as
    `specs` say and results by runs.
    """
    by_run = PartitionSpec(RUN)
    # Gradients and sums have one explicit all-reduce over `data` each. The replication checker
    # would add another one to every gradient.
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=by_run, check_vma=False)
    placed = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(
        sharded, in_shardings=placed, out_shardings=NamedSharding(mesh, by_run), **options
    )


def _fast_compile_options(mesh: Mesh) -> dict[str, bool]:
    """Returns the compiler options of what begins runs and measures them; training has none."""
    return compilation.fast_compile_options(parallel.platform(mesh))


def _in_groups(f: Callable, group: int, *runs):
    """Applies f to stacked runs, `group` of them at a time under vmap, group after group.

    A group of one is mapped without vmap, which would give every product a batch dimension of 1. On
    CPUs that costs homogeneous convolutions an eighth of their speed and wide dense layers a third
    (docs/performance.md).
    """
    if group == 1:
        return lax.map(lambda run: f(*run), runs)
    if group == len(jax.tree.leaves(runs)[0]):
        return jax.vmap(f)(*runs)
    grouped = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), runs)
    outputs = lax.map(lambda side_by_side: jax.vmap(f)(*side_by_side), grouped)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def _in_place(f: Callable, group: int, states: RunState, *others) -> RunState:
    """Does what `_in_groups` does where f returns a state for a state, and puts it in its place.

    Stacked states are then in memory once: results of their own would be as much memory again,
    which the system has to clear at every call.
    """
    runs = len(jax.tree.leaves(states)[0])
    if group == runs:
        return _in_groups(f, group, states, *others)

    def advance(i: Array, states: RunState) -> RunState:
        mine = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, i * group, group), (states, *others)
        )
        ended = _in_groups(f, group, *mine)
        return jax.tree.map(
            lambda a, new: lax.dynamic_update_slice_in_dim(a, new, i * group, 0), states, ended
        )

    return lax.fori_loop(0, runs // group, advance, states)


def host_data(dataset: PreparedDataset, precision: str) -> Data:
    """Returns a data set in NumPy arrays for the program, which normalizes it in `precision`."""
    splits: Any = (dataset.train, dataset.test)
    statistics = [np.asarray(a, precision) for a in (dataset.center, dataset.scale)]
    fields: Any = [*(Split(split.images, split.labels) for split in splits), *statistics]
    return Data(*fields)


def place_data(dataset: PreparedDataset, mesh: Mesh, precision: str) -> Data:
    """Places `host_data` on every device of the mesh."""
    with jax.enable_x64(True):
        return parallel.place(host_data(dataset, precision), parallel.replicated(mesh))


def start(
    recipe: Recipe, mesh: Mesh, columns: Mapping[str, Sequence | np.ndarray], data: Data
) -> tuple[RunState, Key[Array, " R"], Hyper]:
    """Returns the initial states, keys and hyperparameters of a grid's runs (`Grid.columns`).

    They are padded and sharded over the mesh.
    """
    begin, seeds, hyper = _beginning(recipe, mesh, columns, data)
    with jax.enable_x64(True):
        placed = jax.jit(
            begin,
            out_shardings=parallel.by_run(mesh),
            compiler_options=_fast_compile_options(mesh),
        )
        return placed(seeds, hyper, data)


def start_shapes(
    recipe: Recipe, mesh: Mesh, columns: Mapping[str, Sequence | np.ndarray], data: Data
) -> tuple:
    """Returns the shapes and types of what `start` returns; `data` may be `host_data`."""
    begin, seeds, hyper = _beginning(recipe, mesh, columns, data)
    with jax.enable_x64(True):
        return jax.eval_shape(begin, seeds, hyper, data)


def _beginning(
    recipe: Recipe, mesh: Mesh, columns: Mapping[str, Sequence | np.ndarray], data: Data
) -> tuple:
    """Returns a function that initializes runs from (seeds, hyper, data), then seeds and hyper.

    The latter two are padded NumPy arrays.
    """
    one = np.ones(len(columns["seed"]))
    numbers: Any = [np.asarray(columns.get(name, one), data.center.dtype) for name in Hyper._fields]
    hyper = Hyper(*numbers)
    seeds = np.asarray(columns["seed"], np.uint32)
    seeds, hyper = parallel.pad_runs((seeds, hyper), parallel.padded(len(seeds), mesh))

    def begin(seeds: Array, hyper: Hyper, data: Data) -> tuple[RunState, Array, Hyper]:
        keys = jax.vmap(jax.random.key)(seeds)
        inputs = data.normalize(data.train.images[:1])
        return (
            jax.vmap(lambda key, hyper: init_run(key, hyper, recipe, inputs))(keys, hyper),
            keys,
            hyper,
        )

    return begin, seeds, hyper


@functools.lru_cache(maxsize=8)
def _schedule_shape(recipe: Recipe, epochs: int) -> np.ndarray:
    """Returns the learning rate at each step of so many epochs, as a share of its initial value, in
    float64.
    """
    steps = np.arange(epochs * recipe.steps_per_epoch)
    total = recipe.epochs * recipe.steps_per_epoch
    with jax.enable_x64(True):
        shape = jax.jit(lambda steps: optim.schedule_shape(recipe.schedule, steps, total))
        return np.asarray(shape(steps))


def flow_time(recipe: Recipe, columns: Mapping[str, np.ndarray], epochs: int) -> np.ndarray:
    """Returns the flow time t = sum over steps of lr/(1 - momentum) at the end of each epoch,
    (R, epochs + 1), in float64.

    It is NaN for Adam, which has no flow time.
    """
    shape = _schedule_shape(recipe, epochs)
    elapsed = np.concatenate([[0.0], np.cumsum(shape)])[:: recipe.steps_per_epoch]
    pace = columns["learning_rate"] / (1 - columns["momentum"])
    has_clock = OPTIMIZERS[recipe.optimizer].follows_flow
    return (pace if has_clock else np.full_like(pace, np.nan))[:, None] * elapsed


def nc0_law(recipe: Recipe, columns: Mapping[str, np.ndarray], epochs: int) -> np.ndarray:
    """Returns NC0 over its initial value at the end of each epoch, (R, epochs + 1), in float64.

    It is NaN unless the loss is cross-entropy and the optimizer SGD, see `closed_forms.head_sum`.
    """
    runs = len(columns["weight_decay"])
    follows_flow = OPTIMIZERS[recipe.optimizer].follows_flow
    if recipe.objective.loss != "cross_entropy" or not follows_flow:
        return np.full((runs, epochs + 1), np.nan)
    share = closed_forms.head_sum(
        columns["weight_decay"] * columns["decay_head"],
        np.outer(columns["learning_rate"], _schedule_shape(recipe, epochs)),
        columns["momentum"],
        is_coupled=recipe.decay == "coupled",
    )
    return np.abs(share[:, :: recipe.steps_per_epoch])
