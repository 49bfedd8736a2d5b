"""The compiled program: every run of a grid, trained and measured at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from ncjax.config import Augmentation, Decay, HeadBias, NormDecay, Optimizer, Schedule
from ncjax.data.preparation import PreparedDataset
from ncjax.training import mesh as parallel
from ncjax.training import models, optim
from ncjax.training.augment import augment
from ncjax.training.evaluate import Data, Split, evaluate
from ncjax.training.mesh import DATA, RUN, Share
from ncjax.training.objective import Objective


class Hyper(NamedTuple):
    """The numbers a grid sweeps: one value per run, traced, so that all runs share one program."""

    weight_decay: Float[Array, ""]
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    init_scale: Float[Array, ""]


class RunState(NamedTuple):
    """Holds what training changes. Stacked over runs, every leaf gains a leading axis."""

    params: dict
    model_state: dict  # other collections of the network: `batch_stats` of batch normalization
    opt_state: optax.OptState
    epoch: Int[Array, ""]

    @property
    def variables(self) -> dict:
        """Returns what flax applies the network to."""
        return {"params": self.params, **self.model_state}


class Recipe(NamedTuple):
    """Holds what is the same for every run of a program: comparing two of these takes two programs.

    Attributes:
      model: the network.
      head_bias: none, free or decayed.
      norms: scales and shifts of batch normalization: decayed or free.
      objective: loss and targets.
      optimizer, decay, adam_eps: see `optim.make_optimizer`.
      schedule: of the learning rate, see `optim.schedule_shape`.
      batch_size: examples per step; 0 is full batch. A partial last batch is dropped.
      epochs: length of the schedule.
      train_size: NC.
      augment: none, crop or crop_flip.
      is_balanced: whether all classes have as many training examples.
    """

    model: models.Network
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
            decayed=self.decayed(params),
            schedule=self.schedule,
            total_steps=self.epochs * self.steps_per_epoch,
            adam_eps=self.adam_eps,
        )

    def decayed(self, params: dict) -> dict:
        return models.is_decayed(params, self.head_bias, self.norms)

    def effective_decay(
        self, weight_decay: optim.Numbers, momentum: optim.Numbers
    ) -> optim.Numbers:
        return optim.effective_decay(self.optimizer, self.decay, weight_decay, momentum)


def init_run(
    key: Key[Array, ""], hyper: Hyper, recipe: Recipe, inputs: Float[Array, "1 *image"]
) -> RunState:
    """A fresh run. The weights depend on the key and, by a factor, on `hyper.init_scale`; never
    on lambda.
    """
    model_state = dict(recipe.model.init(key, inputs))
    params = model_state.pop("params")
    # Flax begins running statistics in float32 whatever becomes of them.
    model_state = jax.tree.map(lambda leaf: leaf.astype(recipe.model.dtype), model_state)
    for layer in models.layer_names(params):
        kernel = params[layer]["kernel"]
        params[layer] |= {"kernel": kernel * hyper.init_scale.astype(kernel.dtype)}
    return RunState(
        params, model_state, recipe.make_tx(hyper, params).init(params), jnp.zeros((), jnp.int32)
    )


def batch_indices(
    key: Key[Array, ""], epoch: Int[Array, ""], recipe: Recipe
) -> Int[Array, "steps B"]:
    """The batches of an epoch, a function of key and epoch alone: nothing random is carried."""
    size, steps = recipe.train_size, recipe.steps_per_epoch
    if not recipe.batch_size:
        return jnp.arange(size)[None]
    # One sort of single words, much faster on a CPU than jax.random.permutation's sorts of pairs.
    # The index in the low half makes the words distinct.
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
    """One step of the optimizer on the examples `index`; `key` decides how they are augmented.

    Of a batch that is spread over devices each computes its share, and gradients are summed: one
    all-reduce.
    """
    mine, is_mine = share.part(index)
    images, labels = data.train.images[mine], data.train.labels[mine]
    images = augment(recipe.augment, key, images, len(index), lambda drawn: share.part(drawn)[0])

    def fit(params: dict) -> tuple[Float[Array, ""], dict]:
        variables, noted = {"params": params, **state.model_state}, list(state.model_state)
        outputs, model_state = recipe.model.apply(
            variables, data.normalize(images), train=True, mutable=noted
        )
        outputs = jnp.asarray(outputs)
        y = recipe.objective.target(labels, outputs.shape[1], outputs.dtype)
        losses = jnp.where(is_mine, recipe.objective.fit(outputs, y), 0)
        return jnp.sum(losses) / len(index), dict(model_state)

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
    # The epoch itself makes the key of the batches.
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
    share: Share = Share(),  # noqa: B008 (immutable)
) -> dict[str, Array]:
    """`evaluate` of one run, at the lambda that its optimizer seeks the critical points of."""
    return evaluate(
        variables,
        recipe.effective_decay(hyper.weight_decay, hyper.momentum),
        data,
        model=recipe.model,
        decayed=recipe.decayed(variables["params"]),
        objective=recipe.objective,
        is_balanced=recipe.is_balanced,
        share=share,
    )


class Advance:
    """The one program of a sweep: advance(states, keys, hyper, data, n_epochs, measured) ->
    (states, metrics).
    """

    def __init__(self, jitted: Any):
        self._jitted = jitted

    # Small sums of a measurement are float64 and batches are sorted as 64-bit words, whatever the
    # precision of training. The whole trace must stand in the context: vmap batches the bodies of
    # loops after tracing them.
    def __call__(self, *arguments: Any) -> tuple[RunState, dict[str, Array]]:
        with jax.enable_x64(True):
            return self._jitted(*arguments)

    def compile(self, *arguments: Any) -> jax.stages.Compiled:
        """For arguments of these shapes, which need not exist."""
        with jax.enable_x64(True):
            return self._jitted.lower(*arguments).compile()


def make_advance(recipe: Recipe, mesh: Mesh) -> Advance:
    """Compiles to the one program of a sweep.

    Returns:
      advance(states, keys, hyper, data, n_epochs, measured) -> (states, metrics). `states`, `keys`
      and `hyper` are stacked over runs and sharded over the mesh; `states` is donated. `n_epochs`
      and `measured` are traced, so chunks of any length share one trace. Metrics are those of
      `evaluate`, each with a leading run axis; NaN where not measured.
    """
    share = Share(mesh.shape[DATA])
    model = models.over_devices(recipe.model, DATA if share.devices > 1 else None)
    recipe = recipe._replace(model=model)

    def on_one_device(states, keys, hyper, data, n_epochs, measured):
        def train_run(state: RunState, key: Array, hyper: Hyper) -> RunState:
            def epoch(_: Array, state: RunState) -> RunState:
                return train_epoch(state, key, hyper, data, recipe, share)

            return lax.fori_loop(0, n_epochs, epoch, state)

        def measure_run(variables: dict, hyper: Hyper) -> dict[str, Array]:
            return measure(variables, hyper, data, recipe, share)

        convolves = isinstance(recipe.model, models.HomogeneousConvNet)
        train_group, measure_group = parallel.group_sizes(
            len(keys), mesh.devices.flat[0].platform, convolves
        )
        states = _in_groups(train_run, train_group, states, keys, hyper)

        def measure_all(variables: dict) -> dict[str, Array]:
            return _in_groups(measure_run, measure_group, variables, hyper)

        def skip(variables: dict) -> dict[str, Array]:
            return jax.tree.map(
                lambda s: jnp.full(s.shape, jnp.nan, s.dtype),
                jax.eval_shape(measure_all, variables),
            )

        return states, lax.cond(measured, measure_all, skip, states.variables)

    by_run, everywhere = PartitionSpec(RUN), PartitionSpec()
    specs = (by_run, by_run, by_run, everywhere, everywhere, everywhere)
    # Gradients and sums are added up over `data` where they arise, in one explicit all-reduce each.
    # The replication checker would add its own to every gradient.
    sharded = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=specs, out_specs=by_run, check_vma=False
    )
    placed = tuple(NamedSharding(mesh, spec) for spec in specs)
    return Advance(jax.jit(sharded, in_shardings=placed, out_shardings=placed[0], donate_argnums=0))


def _in_groups(f: Callable, group: int, *runs):
    """f over stacked runs: `group` of them side by side, group after group.

    A group of one is mapped without vmap, which would give every product a batch dimension of 1: on
    CPUs that costs homogeneous convolutions an eighth of their speed and wide dense layers a third
    (docs/performance.md).
    """
    if group == 1:
        return lax.map(lambda run: f(*run), runs)
    grouped = jax.tree.map(lambda a: a.reshape(-1, group, *a.shape[1:]), runs)
    outputs = lax.map(lambda side_by_side: jax.vmap(f)(*side_by_side), grouped)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)


def host_data(dataset: PreparedDataset, precision: str) -> Data:
    """A data set as the program takes it, to be normalized in `precision`; NumPy arrays."""
    splits: Any = (dataset.train, dataset.test)
    statistics = [np.asarray(a, precision) for a in (dataset.center, dataset.scale)]
    fields: Any = [*(Split(split.images, split.labels) for split in splits), *statistics]
    return Data(*fields)


def place_data(dataset: PreparedDataset, mesh: Mesh, precision: str) -> Data:
    """`host_data` on every device of the mesh."""
    with jax.enable_x64(True):
        return parallel.place(host_data(dataset, precision), parallel.replicated(mesh))


def start(
    recipe: Recipe, mesh: Mesh, columns: Mapping[str, Sequence | np.ndarray], data: Data
) -> tuple[RunState, Key[Array, " R"], Hyper]:
    """Fresh states, keys and hyperparameters of a grid's runs (`Grid.columns`), padded and
    sharded over the mesh.
    """
    begin, seeds, hyper = _beginning(recipe, mesh, columns, data)
    with jax.enable_x64(True):
        placed = jax.jit(begin, out_shardings=parallel.by_run(mesh))
        return placed(seeds, hyper, data)


def start_shapes(
    recipe: Recipe, mesh: Mesh, columns: Mapping[str, Sequence | np.ndarray], data: Data
) -> tuple:
    """Returns what `start` does, as shapes and types; `data` may be `host_data`."""
    begin, seeds, hyper = _beginning(recipe, mesh, columns, data)
    with jax.enable_x64(True):
        return jax.eval_shape(begin, seeds, hyper, data)


def _beginning(
    recipe: Recipe, mesh: Mesh, columns: Mapping[str, Sequence | np.ndarray], data: Data
) -> tuple:
    """(function of seeds, hyper and data; seeds; hyper), the latter padded NumPy arrays."""
    numbers: Any = [np.asarray(columns[name], data.center.dtype) for name in Hyper._fields]
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


def flow_time(
    recipe: Recipe, learning_rate: np.ndarray, momentum: np.ndarray, epochs: np.ndarray
) -> np.ndarray:
    """t = sum over steps of lr/(1 - momentum), float64: (R,) runs by (E,) epochs -> (R, E). Adam
    has none: NaN.
    """
    steps = np.arange(max(epochs) * recipe.steps_per_epoch)
    with jax.enable_x64(True):
        total = recipe.epochs * recipe.steps_per_epoch
        shape = np.asarray(optim.schedule_shape(recipe.schedule, jnp.asarray(steps), total))
    elapsed = np.concatenate([[0.0], np.cumsum(shape)])[np.asarray(epochs) * recipe.steps_per_epoch]
    pace = np.asarray(learning_rate) / (1 - np.asarray(momentum))
    return (pace if recipe.optimizer == "sgd" else np.full_like(pace, np.nan))[:, None] * elapsed
