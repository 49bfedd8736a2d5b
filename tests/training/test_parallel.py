"""The mesh: runs and batches spread over devices give one device's numbers, by one collective a
step or none.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ncjax import config as configuration
from ncjax.errors import InputError
from ncjax.plan import prepare
from ncjax.runs import loop
from ncjax.training import layers, models, parallel, sweep
from tests import chaos, meshes
from tests.helpers import unmeasured


@pytest.fixture(scope="module")
def measured():
    """What `meshes` prints: four devices need a process of their own."""
    command = [sys.executable, "-m", "tests.meshes"]
    cache = chaos.ROOT / ".jax_cache"
    with chaos.tempfile.TemporaryDirectory() as folder:
        environment = chaos.environment(
            cache, JAX_NUM_CPU_DEVICES="4", JAX_COMPILATION_CACHE_DIR=str(cache)
        )
        done = subprocess.run(
            [*command, folder], capture_output=True, text=True, cwd=chaos.ROOT, env=environment
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["4x1", "2x2", "1x4", "4 programs", "batch normalization, 2x2", "4x1, then 1x4"]
)
def test_histories_equal_those_of_one_device(measured, case):
    """After three epochs in float64; four devices do not divide the batch of 18."""
    assert measured["deviations"][case] < 1e-9


@pytest.mark.slow
def test_runs_of_their_own_need_no_collective(measured):
    assert measured["collectives"]["4x1"] == {"training": {}, "measurement": {}}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x2", "1x4"])
def test_a_spread_batch_needs_one_all_reduce_a_step(measured, mesh):
    """Of the gradients of two runs that train together: 32-8-8-3 and a head bias, in float64."""
    parameters = 32 * 8 + 8 * 8 + 8 * 3 + 3
    assert measured["collectives"][mesh]["training"] == {"all-reduce": [2 * parameters * 8]}


@pytest.mark.slow
def test_measuring_adds_up_sums_and_gathers_nothing(measured):
    """Class sums, a gradient and scatter of one run: fewer numbers than one split's features
    would be.
    """
    moved = measured["collectives"]["2x2"]["measurement"]
    assert set(moved) == {"all-reduce"}
    assert len(moved["all-reduce"]) <= 4


def plan(tmp_path, **fields):
    return prepare(meshes.make_config(**fields), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data": 3},
            r"^config.mesh.data: got 3; there is no more than 2 cpu devices \(JAX_NUM_CPU_DEVICES",
        ),
        ({"run": 4}, r"^config.mesh.run: got 4; there is no more than 2 cpu devices, so at most 2"),
        (
            {"run": 2, "data": 2},
            r"^config.mesh.run: got 2; there is no more than 2 cpu devices, so at most 1",
        ),
        (
            {"data": 2, **meshes.NORMALIZED, "train__batch_size": 25},
            r"^config.mesh.data: got 2; batch normalization needs a divisor of the batch of 25",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        loop.train(plan(tmp_path, **fields))


@pytest.mark.parametrize(
    ("runs", "run", "data", "shape"),
    [(4, 0, 1, (2, 1)), (1, 0, 1, (1, 1)), (4, 0, 2, (1, 2)), (4, 1, 1, (1, 1)), (1, 2, 1, (2, 1))],
)
def test_devices_not_asked_for_go_to_runs(runs, run, data, shape):
    assert tuple(parallel.make_mesh(runs, run, data).shape.values()) == shape


@pytest.mark.parametrize(
    "fields",
    [{"mesh.run": 2}, {"mesh.data": 2}, {"sweep.runs_per_program": 1}, {"profile.dir": "trace"}],
)
def test_where_a_run_is_computed_is_no_other_run(fields):
    mine, other = configuration.default_config(), configuration.default_config()
    other.update(fields)
    assert configuration.differences(mine, configuration.to_mapping(other)) == []


@pytest.mark.parametrize(
    ("most", "slices", "runs"),
    [
        (0, [(0, 10)], 10),
        (4, [(0, 4), (4, 8), (8, 10)], 4),
        (9, [(0, 5), (5, 10)], 6),
        (1, None, 1),
    ],
)
def test_a_grid_is_cut_into_equal_programs(tmp_path, most, slices, runs):
    fields = {"sweep__seed": tuple(range(5)), "sweep__runs_per_program": most}
    program = sweep.make_program(plan(tmp_path, **fields))
    found = [(part.start, part.stop) for part in program.slices]
    assert found == (slices or [(i, i + 1) for i in range(10)])
    assert program.runs == runs
    columns = program.columns_of(program.slices[-1])
    assert {len(values) for values in columns.values()} == {runs}


@pytest.mark.slow
@unmeasured()
def test_as_many_runs_at_once_as_memory_holds(tmp_path, monkeypatch):
    """By the account of the compiled program; too little for one is one line."""
    big = plan(tmp_path, sweep__seed=tuple(range(5)), run=1)
    whole = sweep.make_program(big)
    assert whole.runs == 10
    account = whole.compiled.train.memory_analysis()
    states = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole.shapes))
    assert account.argument_size_in_bytes >= whole.bytes_of_data + states  # of both splits
    limit = int((whole.bytes_of_data + 4.5 * whole.bytes_per_run) / 0.9)
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: limit)
    fitted = sweep.make_program(big)
    assert 1 <= fitted.runs < 10
    assert fitted.bytes_per_device <= 0.9 * limit
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: 1000)
    with pytest.raises(
        InputError, match=r"^config.model.widths: got \(8, 8\); one run needs .* bytes of a device"
    ):
        sweep.make_program(big)


def read(arguments, outputs, temporaries, aliased):
    """A compiled program with this account of its memory."""
    account = SimpleNamespace(
        argument_size_in_bytes=arguments,
        output_size_in_bytes=outputs,
        temp_size_in_bytes=temporaries,
        alias_size_in_bytes=aliased,
    )
    return SimpleNamespace(memory_analysis=lambda: account)


@pytest.mark.parametrize(
    ("train", "passes", "metrics", "beside"),
    [
        ((900, 500, 10, 500), (300, 40, 60, 0), (40, 5, 7, 0), 100),
        ((900, 500, 110, 500), (300, 40, 60, 0), (40, 5, 7, 0), 110),
        ((900, 500, 10, 500), (300, 40, 60, 0), (40, 5, 80, 0), 125),
    ],
)
def test_a_device_needs_what_its_largest_program_does(
    tmp_path, monkeypatch, train, passes, metrics, beside
):
    """Beside data and states, which training has as arguments and gives back in their place."""
    compiled = sweep.Advance(read(*train), read(*passes), read(*metrics))
    monkeypatch.setattr(sweep.Program, "compiled", compiled)
    assert sweep.make_uncompiled(plan(tmp_path)).bytes_per_device == 900 + beside


@pytest.mark.parametrize(("most", "runs"), [(5, 10), (4, 4), (1, 2), (0, None)])
def test_a_compiler_that_refuses_what_does_not_fit_gets_half_the_runs(
    tmp_path, monkeypatch, most, runs
):
    """As the one of TPUs does, until the account of a program can be read; `most` on a device."""

    def compiled(program):
        if program.runs_per_device > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")
        return sweep.Advance(read(900, 0, 0, 0), read(0, 0, 0, 0), read(0, 0, 0, 0))

    monkeypatch.setattr(sweep.Program, "compiled", property(compiled))
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: 1000)
    big = plan(tmp_path, sweep__seed=tuple(range(5)), run=2)
    if runs is None:
        with pytest.raises(InputError, match=r"model\.widths.*one run does not fit .*Ran out of"):
            sweep.make_program(big)
    else:
        assert sweep.make_program(big).runs == runs


@pytest.mark.slow
@unmeasured()
def test_states_that_wait_lie_in_the_hosts_memory_and_come_back_as_they_were(tmp_path, monkeypatch):
    """Two programs of two runs, in two chunks, to the bit."""
    begun = plan(tmp_path, sweep__runs_per_program=2)
    here = sweep.Sweep(begun)
    monkeypatch.setattr(sweep, "_shares_memory", lambda mesh: False)
    there = sweep.Sweep(begun)
    for found in (here, there):
        found.advance(1, measured=False)
        found.advance(2, measured=False)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there._states)}
    assert kinds == {"pinned_host"}
    for a, b in zip(jax.tree.leaves(here.states), jax.tree.leaves(there.states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    there.restore(jax.device_get(here.states), 3)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there._states)} == {"pinned_host"}


def test_flops_of_a_network_are_those_of_its_matmuls():
    """Six a weight and position, four in the first layer; 3x3 convolutions of stride 2 halve the
    sides, rounding up.
    """

    def flops(model, image):
        return sweep.training_flops(model, layers.find(model, image, "none", "float32"), image)

    dense = models.MLP((5, 7), 3)
    assert flops(dense, (2, 2, 1)) == 4 * 4 * 5 + 6 * (5 * 7 + 7 * 3)
    conv = models.ConvNet((5, 7), 3)
    expected = 4 * 9 * 2 * 5 * 3 * 3 + 6 * 9 * 5 * 7 * 2 * 2 + 6 * 4 * 7 * 3
    assert flops(conv, (6, 5, 2)) == expected


def test_shares_of_a_batch_are_the_batch():
    """By hand: three devices, eight rows; the ninth is the last again and has no weight."""
    whole = np.arange(8)
    with pytest.MonkeyPatch.context() as patch:
        parts = []
        for device in range(3):
            patch.setattr(parallel.lax, "axis_index", lambda axis, device=device: device)
            rows, mine = parallel.Share(3).part(jax.numpy.asarray(whole))
            parts.append((rows.tolist(), mine.tolist()))
    assert parts == [
        ([0, 1, 2], [True] * 3),
        ([3, 4, 5], [True] * 3),
        ([6, 7, 7], [True, True, False]),
    ]
