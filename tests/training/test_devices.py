"""Where runs live: the mesh, padding and groups."""

from dataclasses import dataclass

import numpy as np
import pytest

from ncjax.training import parallel


@pytest.mark.parametrize(("runs", "devices"), [(1, 1), (2, 2), (3, 2), (18, 2)])
def test_mesh_takes_no_device_that_would_only_hold_padding(runs, devices):
    assert parallel.make_mesh(runs).shape == {"run": devices, "data": 1}


@dataclass(frozen=True)
class Chip:
    """As much of a TPU as jax.make_mesh looks at."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def test_a_slice_of_tpus_is_used_whole_unless_a_part_is_asked_for():
    """Nine of sixteen chips are no rectangle, which jax.make_mesh refuses."""
    chips = [Chip(i, (i % 4, i // 4, 0)) for i in range(16)]
    assert parallel.make_mesh(18, devices=chips).shape == {"run": 16, "data": 1}
    mesh = parallel.make_mesh(18, run=9, devices=chips)
    assert mesh.shape == {"run": 9, "data": 1}
    assert list(mesh.devices.flat) == chips[:9]


def test_padding_repeats_the_last_run_and_fills_the_mesh():
    mesh = parallel.make_mesh(3)
    tree = {"a": np.arange(6.0).reshape(3, 2), "b": np.arange(3)}
    padded = parallel.pad_runs(tree, parallel.padded(3, mesh))
    assert parallel.padded(3, mesh) == len(padded["a"]) == len(padded["b"]) == 4
    assert np.array_equal(padded["a"], [[0, 1], [2, 3], [4, 5], [4, 5]])
    placed = parallel.place(padded, parallel.by_run(mesh))
    assert [shard.data.shape for shard in placed["a"].addressable_shards] == [(2, 2), (2, 2)]
    assert np.array_equal(parallel.fetch(placed)["a"], padded["a"])


@pytest.mark.parametrize(("runs", "group"), [(1, 1), (2, 2), (4, 2), (7, 7), (8, 2), (9, 3)])
def test_a_cpu_trains_in_small_equal_groups_and_measures_singly(runs, group):
    assert parallel.group_sizes(runs, "cpu", convolves=False) == (group, 1)
    assert parallel.group_sizes(runs, "cpu", convolves=True) == (1, 1)


def test_an_accelerator_takes_all_runs_at_once():
    for convolves in (False, True):
        assert parallel.group_sizes(9, "gpu", convolves) == (9, 9)


@pytest.mark.parametrize(
    ("runs", "numbers", "platform", "together"),
    [(9, 1280, "cpu", 9), (12, 51200, "cpu", 2), (7, 51200, "cpu", 1), (12, 51200, "gpu", 12)],
)
def test_arithmetic_is_done_on_as_many_runs_as_a_cache_holds(runs, numbers, platform, together):
    assert parallel.side_by_side(runs, numbers, platform) == together
