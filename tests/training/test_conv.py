"""conv: the numbers, parameters and gradients of lax.conv and nn.Conv."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ncjax.plan import examine
from ncjax.training import models, parallel, program, sweep
from ncjax.training.conv import convolve
from tests import meshes

CASES = [
    # height, width, window, strides, padding
    (8, 8, (3, 3), (2, 2), [(1, 1), (1, 1)]),
    (7, 9, (3, 3), (2, 2), [(1, 1), (1, 1)]),
    (7, 6, (3, 2), (1, 2), [(0, 2), (1, 0)]),
    (6, 6, (1, 1), (1, 1), "VALID"),
    (5, 7, (1, 1), (2, 3), "SAME"),
    (9, 8, (5, 4), (3, 1), "SAME"),
    (9, 8, (5, 4), (1, 3), "VALID"),
    (4, 4, (2, 2), (2, 2), "VALID"),
    (1, 1, (3, 3), (2, 2), [(1, 1), (1, 1)]),
]


def reference(x, kernel, strides, padding):
    layouts = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layouts)


def by_definition(x, kernel, strides, pads):
    """Six loops."""
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    rows = (x.shape[1] - kernel.shape[0]) // strides[0] + 1
    columns = (x.shape[2] - kernel.shape[1]) // strides[1] + 1
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for b, i, j, k, m in np.ndindex(len(x), rows, columns, *kernel.shape[:2]):
        y[b, i, j] += x[b, i * strides[0] + k, j * strides[1] + m] @ kernel[k, m]
    return y


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("height", "width", "window", "strides", "padding"), CASES)
def test_values_and_gradients_are_those_of_lax_conv(height, width, window, strides, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, height, width, 3)), rng.standard_normal((*window, 3, 4))

    @jax.jit
    def with_gradients(x, kernel, weights):
        found = []
        for conv in (convolve, reference):
            y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, strides, padding), x, kernel)  # noqa: B023
            found.append((y, *pull(weights)))
        return found

    shape = jax.eval_shape(
        lambda: reference(jnp.asarray(x), jnp.asarray(kernel), strides, padding)
    ).shape
    for found, expected in zip(*with_gradients(x, kernel, rng.standard_normal(shape)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    if not isinstance(padding, str):
        found = convolve(jnp.asarray(x), jnp.asarray(kernel), strides, padding)
        np.testing.assert_allclose(
            found, by_definition(x, kernel, strides, padding), rtol=1e-12, atol=1e-12
        )


@pytest.mark.usefixtures("float64")
def test_under_vmap_every_run_has_its_own_kernel():
    rng = np.random.default_rng(1)
    x, kernels = (
        jnp.asarray(rng.standard_normal((3, 2, 6, 6, 2))),
        jnp.asarray(rng.standard_normal((3, 3, 3, 2, 5))),
    )
    found = jax.vmap(lambda x, kernel: convolve(x, kernel, (2, 2), [(1, 1), (1, 1)]))(x, kernels)
    for run in range(3):
        expected = reference(x[run], kernels[run], (2, 2), [(1, 1), (1, 1)])
        np.testing.assert_allclose(found[run], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_nn_conv_takes_it_in_place_of_its_own():
    settings = {
        "features": 4,
        "kernel_size": (3, 3),
        "strides": 2,
        "padding": 1,
        "param_dtype": jnp.float64,
    }
    ours, theirs = nn.Conv(conv_general_dilated=convolve, **settings), nn.Conv(**settings)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 7, 8, 3)))
    params = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(0), x))
    np.testing.assert_allclose(
        ours.apply(params, x), theirs.apply(params, x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "other", [{"rhs_dilation": (1, 2)}, {"lhs_dilation": (2, 1)}, {"feature_group_count": 2}]
)
def test_what_it_has_not_is_refused(other):
    with pytest.raises(NotImplementedError, match="no dilations and no groups"):
        convolve(jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 2, 4)), (1, 1), "SAME", **other)


def test_float32_stays_float32():
    x, kernel = jnp.ones((1, 4, 4, 1), jnp.float32), jnp.ones((3, 3, 1, 2), jnp.float32)
    assert convolve(x, kernel, (1, 1), "SAME").dtype == jnp.float32


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model", "side"),
    [
        pytest.param(
            models.ConvNet((3, 4), 3, normalization="batch", dtype=jnp.float64), 7, id="ConvNet"
        ),
        pytest.param(
            models.ResNet18((3, 4), 3, dtype=jnp.float64), 6, marks=pytest.mark.slow, id="ResNet18"
        ),
    ],
)
def test_networks_are_the_same_with_patches_and_with_lax_conv(model, side):
    """The two have one set of parameters; outputs and gradients agree."""
    patches, lax_conv = (models.placed(model, platform, None) for platform in ("cpu", "tpu"))
    assert (patches.slices_patches, lax_conv.slices_patches) == (True, False)
    assert patches == model
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, side, side, 2)))

    @jax.jit
    def gradients(variables, x):
        def loss(params, network):
            y, _ = network.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), y

        grad = jax.grad(loss, has_aux=True)
        return [grad(variables["params"], network) for network in (patches, lax_conv)]

    variables = jax.jit(patches.init)(jax.random.key(0), x)
    expected = jax.eval_shape(lax_conv.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    mine, theirs = gradients(variables, x)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_a_network_without_convolutions_is_placed_as_it_is():
    model = models.MLP((5,), 3)
    assert models.placed(model, "tpu", None) == model
    assert models.placed(model, "tpu", "data").batch_axis == "data"


@pytest.mark.parametrize(("platform", "convolves"), [("tpu", True), ("cpu", False), ("gpu", False)])
def test_the_program_of_a_platform_convolves_as_is_best_there(platform, convolves, monkeypatch):
    """The traced program, before XLA: a convolution in it is lax.conv's."""
    monkeypatch.setattr(parallel, "platform", lambda mesh: platform)
    fields = meshes.NORMALIZED | {"run": 1, "model__widths": (3,)}
    plan = examine(meshes.make_config(**fields), None)
    one = sweep.make_uncompiled(plan)
    train, passes, _ = program.make_advance(one.recipe, one.mesh).trace(*one._started, one._data)
    for traced in (train, passes):
        assert ("conv_general_dilated" in str(traced.jaxpr)) == convolves
