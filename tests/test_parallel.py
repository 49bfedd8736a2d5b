"""Where runs live: the mesh, padding and groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax import parallel


@pytest.mark.parametrize(("runs", "devices"), [(1, 1), (2, 2), (3, 2), (18, 2)])
def test_mesh_takes_no_device_that_would_only_hold_padding(runs, devices):
    assert parallel.run_mesh(runs).shape == {"run": devices}


def test_padding_repeats_the_last_run_and_is_dropped_again():
    mesh = parallel.run_mesh(3)
    tree = {"a": jnp.arange(6.0).reshape(3, 2), "key": jax.vmap(jax.random.key)(jnp.arange(3))}
    padded = parallel.pad_runs(tree, mesh)
    assert parallel.padded(3, mesh) == len(padded["a"]) == len(padded["key"]) == 4
    assert np.array_equal(padded["a"][3], padded["a"][2])
    assert np.array_equal(parallel.drop_padding(padded, 3)["a"], tree["a"])


@pytest.mark.parametrize(("runs", "group"), [(1, 1), (2, 2), (4, 2), (7, 7), (8, 2), (9, 3)])
def test_a_cpu_trains_in_small_equal_groups_and_measures_singly(runs, group):
    assert parallel.group_sizes(runs, "cpu", convolves=False) == (group, 1)
    assert parallel.group_sizes(runs, "cpu", convolves=True) == (1, 1)


def test_an_accelerator_takes_all_runs_at_once():
    for convolves in (False, True):
        assert parallel.group_sizes(9, "gpu", convolves) == (9, 9)
