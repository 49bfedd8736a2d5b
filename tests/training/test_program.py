"""The compiled program: one trace, bitwise chunks, paired and isolated runs, and steps computed
by hand.
"""

import contextlib
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.config import DataConfig
from ncjax.data import preparation
from ncjax.training import compilation, layers, models, parallel, program
from ncjax.training.objective import Objective
from tests.helpers import unmeasured

COLUMNS = {
    "weight_decay": [0.0, 0.0, 1e-3, 1e-3],
    "learning_rate": [0.1] * 4,
    "momentum": [0.9] * 4,
    "init_scale": [1.0] * 4,
    "seed": [0, 1, 0, 1],
}


def setup(
    columns=COLUMNS,
    *,
    dtype=np.float32,
    devices=2,
    batch_size=16,
    head_bias="none",
    schedule="cosine",
    **choices,
):
    """`choices`: fields of the recipe that have a default."""
    raw = preparation.load(DataConfig(name="synthetic", num_classes=3, per_class=20))
    mesh = parallel.make_mesh(4, run=devices)
    model = models.MLP((8, 8), 3, use_head_bias=head_bias != "none", dtype=dtype)
    structure = layers.find(model, raw.center.shape, head_bias, np.dtype(dtype).name)
    recipe = program.Recipe(
        model, structure, head_bias, schedule, batch_size, 6, len(raw.train.labels), **choices
    )
    arrays = program.place_data(raw, mesh, np.dtype(dtype).name)
    return recipe, mesh, arrays, program.start(recipe, mesh, columns, arrays)


def advance(recipe, mesh, arrays, start, *epochs, measured=False):
    states, keys, hyper = start
    step = program.make_advance(recipe, mesh)
    metrics = {}
    with contextlib.nullcontext() if measured else unmeasured():
        for n in epochs:
            states, metrics = step(states, keys, hyper, arrays, n, measured)
    return jax.device_get(states), jax.device_get(metrics)


def leaves_equal(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_chunks_of_any_length_are_bitwise_the_same():
    whole, measured = advance(*setup(), 6, measured=True)
    chunked, again = advance(*setup(), 1, 2, 0, 3, measured=True)
    assert leaves_equal(whole, chunked)
    assert leaves_equal(measured, again)
    assert whole.epoch.tolist() == [6] * 4


def test_one_trace_serves_every_chunk_length_and_measurement(monkeypatch, fresh_metrics):
    traces = []

    def count(name):
        original = getattr(program, name)
        monkeypatch.setattr(program, name, lambda *args: traces.append(name) or original(*args))

    names = ("train_epoch", "sums_of_runs", "metrics_of_runs")
    for name in names:
        count(name)
    recipe, mesh, arrays, (states, keys, hyper) = setup()
    step = program.make_advance(recipe, mesh)
    states, _ = step(states, keys, hyper, arrays, 1, True)
    after_first = len(traces)
    assert set(traces) == set(names)
    for n, measured in ((3, True), (0, True), (2, False)):
        states, _ = step(states, keys, hyper, arrays, n, measured)
    assert len(traces) == after_first


def texts(recipe, mesh, arrays, start):
    """The programs as they are lowered: training, passes, metrics."""
    programs = program.make_advance(recipe, mesh).trace(*start, arrays)
    with jax.enable_x64(True):
        return [traced.lower().as_text() for traced in programs]


@pytest.mark.parametrize("fields", [{"schedule": "constant"}, {"batch_size": 20}, {"epochs": 12}])
def test_recipes_that_differ_in_training_alone_are_measured_by_the_same_programs(fields):
    """To the letter, so that the compile cache has them once."""
    recipe, *others = setup()
    train, *measuring = texts(recipe, *others)
    another, *same = texts(recipe._replace(**fields), *others)
    assert another != train
    assert same == measuring


def test_recipes_of_another_effective_decay_share_the_metrics():
    coupled, decoupled = (texts(*setup(decay=decay)) for decay in ("coupled", "decoupled"))
    assert [a == b for a, b in zip(coupled, decoupled, strict=True)] == [False, False, True]


@pytest.fixture
def fresh_options():
    """What XLA was asked for its options is forgotten, before and afterwards."""
    compilation.fast_compile_options.cache_clear()
    yield
    compilation.fast_compile_options.cache_clear()


def test_options_that_compile_fast_are_left_out_where_xla_has_them_no_more(
    monkeypatch, fresh_options
):
    assert compilation.fast_compile_options("gpu") == compilation.fast_compile_options("tpu") == {}
    jit, gone = jax.jit, {"xla_cpu_that_is_gone": False}
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jit(lambda: 0, compiler_options=gone)()
    monkeypatch.setattr(jax, "jit", lambda f, compiler_options: jit(f, compiler_options=gone))
    assert compilation.fast_compile_options("cpu") == {}


@pytest.mark.slow
def test_what_compiles_fast_measures_the_same_but_for_rounding(monkeypatch, fresh_metrics):
    states, fast = advance(*setup(dtype=np.float64), 1, measured=True)
    monkeypatch.setattr(compilation, "fast_compile_options", lambda platform: {})
    program._make_metrics.cache_clear()
    others, measured = advance(*setup(dtype=np.float64), 1, measured=True)
    assert leaves_equal(states, others)
    for name, values in measured.items():
        np.testing.assert_allclose(fast[name], values, rtol=1e-10, atol=1e-13, err_msg=name)


def test_states_are_donated():
    recipe, mesh, arrays, (states, keys, hyper) = setup()
    program.make_advance(recipe, mesh)(states, keys, hyper, arrays, 1, False)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states))


def test_runs_of_one_seed_are_paired_across_lambda():
    _, _, _, (states, keys, _) = setup()
    kernel = np.asarray(states.params["layer_1"]["kernel"])
    assert np.array_equal(kernel[0], kernel[2])
    assert not np.array_equal(kernel[0], kernel[1])
    data_of_keys = np.asarray(jax.random.key_data(keys))
    assert np.array_equal(data_of_keys[0], data_of_keys[2])


def test_batches_partition_the_epoch_and_change_with_epoch_and_seed():
    recipe, *_ = setup(batch_size=20)
    with jax.enable_x64(True):
        order = [
            np.asarray(program.batch_indices(jax.random.key(seed), jnp.int32(epoch), recipe))
            for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
    assert order[0].shape == (3, 20)
    assert sorted(order[0].ravel()) == list(range(60))
    assert np.array_equal(order[0], order[1])
    assert not np.array_equal(order[0], order[2])
    assert not np.array_equal(order[0], order[3])


def test_first_place_of_a_batch_is_uniform_over_examples():
    recipe, *_ = setup(batch_size=20)
    with jax.enable_x64(True):
        first = jax.vmap(
            lambda epoch: program.batch_indices(jax.random.key(3), epoch, recipe)[0, 0]
        )(jnp.arange(6000))
    counts = np.bincount(np.asarray(first), minlength=60)
    # Chi-squared with 59 degrees of freedom exceeds 110 with probability 6e-5.
    assert ((counts - 100) ** 2 / 100).sum() < 110


def test_a_diverged_run_is_marked_and_leaves_its_neighbours_bitwise_alone():
    tame, _ = advance(*setup(), 3, measured=True)
    wild_columns = COLUMNS | {"learning_rate": [0.1, 1e6, 0.1, 0.1]}
    wild, metrics = advance(*setup(wild_columns), 3, measured=True)
    for run in (0, 2, 3):
        assert leaves_equal(
            *(jax.tree.map(operator.itemgetter(run), states) for states in (tame, wild))
        )
    assert metrics["finite"].tolist() == [1, 0, 1, 1]
    for name, values in metrics.items():
        if name != "finite":
            assert np.isnan(values[1]).all(), name
            assert np.isfinite(values[3]).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_grouping_and_mesh_change_nothing_but_rounding(devices, monkeypatch):
    two, expected = advance(*setup(dtype=np.float64), 2, measured=True)
    monkeypatch.setattr(
        parallel, "group_sizes", lambda runs, platform, convolves: (1, 2 if devices == 1 else 1)
    )
    other, metrics = advance(*setup(dtype=np.float64, devices=devices), 2, measured=True)
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    for name, values in metrics.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-7, atol=1e-10, err_msg=name)


def test_a_group_of_one_gives_products_no_batch_dimension():
    """Four runs of two vectors each, one or two side by side: the same products, batched in
    the latter alone.
    """
    kernels, inputs = jnp.arange(24.0).reshape(4, 2, 3), jnp.arange(32.0).reshape(4, 4, 2)

    def products(group):
        return lambda: program._in_groups(
            lambda kernel, x: {"outputs": x @ kernel}, group, kernels, inputs
        )

    for group, batch_axes in ((1, ((), ())), (2, ((0,), (0,)))):
        (loop,) = (
            eqn for eqn in jax.make_jaxpr(products(group))().eqns if eqn.primitive.name == "scan"
        )
        (product,) = (
            eqn for eqn in loop.params["jaxpr"].eqns if eqn.primitive.name == "dot_general"
        )
        assert product.params["dimension_numbers"][1] == batch_axes
        np.testing.assert_allclose(
            products(group)()["outputs"], np.asarray(inputs) @ np.asarray(kernels), rtol=1e-6
        )


SQUARE = Objective()
CHOICES = {
    "plain": {},
    "decoupled": {"decay": "decoupled"},
    "centered": {"objective": Objective(targets="centered")},
    "cross_entropy": {"objective": Objective("cross_entropy"), "decay": "decoupled"},
}


@pytest.mark.parametrize(
    ("head_bias", "batch_size", "choice"),
    [
        ("decayed", 16, "plain"),
        *(
            pytest.param(head_bias, batch_size, "plain", marks=pytest.mark.slow)
            for head_bias, batch_size in (
                ("none", 0),
                ("none", 16),
                ("free", 0),
                ("free", 16),
                ("decayed", 0),
            )
        ),
        *(
            pytest.param("free", 16, choice, marks=pytest.mark.slow)
            for choice in ("decoupled", "centered", "cross_entropy")
        ),
    ],
)
def test_two_epochs_equal_numpy_by_hand(head_bias, batch_size, choice):
    """SGD with momentum on the seed's loss, written out with explicit gradients in float64."""
    options = {
        "dtype": np.float64,
        "batch_size": batch_size,
        "head_bias": head_bias,
        "schedule": "cosine",
    }
    recipe, mesh, arrays, start = setup(**options, **CHOICES[choice])
    weights = {name: np.asarray(leaf)[3] for name, leaf in _flat(start[0].params).items()}
    with jax.enable_x64(True):
        batches = [
            np.asarray(program.batch_indices(jax.random.key(1), jnp.int32(epoch), recipe))
            for epoch in range(2)
        ]
    states, _ = advance(recipe, mesh, arrays, start, 2)
    expected = _by_hand(
        weights,
        batches,
        arrays,
        weight_decay=1e-3,
        bias_decays=head_bias == "decayed",
        **CHOICES[choice],
    )
    for name, leaf in _flat(states.params).items():
        np.testing.assert_allclose(leaf[3], expected[name], rtol=1e-10, atol=1e-13, err_msg=name)


def _flat(params):
    return {
        f"{layer}/{leaf}": value
        for layer, leaves in params.items()
        for leaf, value in leaves.items()
    }


def _by_hand(
    weights, batches, arrays, *, weight_decay, bias_decays, objective=SQUARE, decay="coupled"
):
    images, center, scale = (
        np.asarray(a, np.float64) for a in (arrays.train.images, arrays.center, arrays.scale)
    )
    x_all = (images - center) * scale
    y_all = np.eye(3)[np.asarray(arrays.train.labels)] - (
        1 / 3 if objective.targets == "centered" else 0
    )
    weights = dict(weights)
    momenta = {name: np.zeros_like(w) for name, w in weights.items()}
    total = 6 * len(batches[0])
    for step, index in enumerate(np.concatenate(batches)):
        x, y = x_all[index], y_all[index]
        z1 = x @ weights["layer_1/kernel"]
        h1 = np.maximum(z1, 0)
        z2 = h1 @ weights["layer_2/kernel"]
        h2 = np.maximum(z2, 0)
        f = h2 @ weights["head/kernel"] + weights.get("head/bias", 0)
        if objective.loss == "cross_entropy":
            f = np.exp(f) / np.exp(f).sum(1, keepdims=True)
        residual = (f - y) / len(index)
        back2 = (residual @ weights["head/kernel"].T) * (z2 > 0)
        back1 = (back2 @ weights["layer_2/kernel"].T) * (z1 > 0)
        gradients = {
            "layer_1/kernel": x.T @ back1,
            "layer_2/kernel": h1.T @ back2,
            "head/kernel": h2.T @ residual,
        }
        if "head/bias" in weights:
            gradients["head/bias"] = residual.sum(0)
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * step / total))
        for name, gradient in gradients.items():
            shrink = weight_decay * weights[name] if name != "head/bias" or bias_decays else 0
            coupled = decay == "coupled"
            momenta[name] = 0.9 * momenta[name] + gradient + (shrink if coupled else 0)
            weights[name] = weights[name] - rate * (momenta[name] + (0 if coupled else shrink))
    return weights


def test_flow_time_is_the_sum_of_learning_rates():
    recipe, *_ = setup(schedule="step", batch_size=16)
    assert recipe.steps_per_epoch == 3
    columns = {"learning_rate": np.array([0.1, 0.2]), "momentum": np.array([0.0, 0.5])}
    times = program.flow_time(recipe, columns, 6)
    assert times.shape == (2, 7)
    # 18 steps: six at the full rate, six at a tenth, six at a hundredth.
    np.testing.assert_allclose(times[:, [0, 1, 6]], [[0, 0.3, 0.666], [0, 1.2, 2.664]], rtol=1e-12)


def test_adam_has_no_flow_time():
    recipe, *_ = setup(optimizer="adam")
    columns = {"learning_rate": np.array([0.1, 0.2]), "momentum": np.array([0.9, 0.9])}
    np.testing.assert_array_equal(program.flow_time(recipe, columns, 6), np.full((2, 7), np.nan))


@pytest.mark.slow
def test_parameters_keep_their_type():
    for dtype in (np.float32, np.float64):
        states, metrics = advance(*setup(dtype=dtype), 1, measured=True)
        assert {leaf.dtype for leaf in jax.tree.leaves(states.params)} == {np.dtype(dtype)}
        assert {value.dtype for value in metrics.values()} == {np.dtype(dtype)}
