"""weights: ranks, condition and imbalance of layers against LAPACK's SVD and sums written out."""

import numpy as np
import pytest

from ncjax.metrics import weights
from ncjax.metrics.vocabulary import LAYER_VOCABULARY


def made(*singular_values, inputs=6, outputs=5, seed=0):
    """A kernel (in, out) that has these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (inputs, outputs))
    count = len(singular_values)
    return left[:, :count] * np.array(singular_values) @ right[:count]


def test_spectra_are_those_that_weights_were_made_with():
    full, low = made(8, 4, 2, 2, 1), made(3, 3, 0.02, 0.01, 0.001)
    found = weights.measure([np.stack([full, low])], [None])
    np.testing.assert_array_equal(found["layer_rank"], [[5], [2]])
    np.testing.assert_allclose(found["layer_condition"], [[8], [3000]], rtol=1e-6)
    entropies = [-sum(x / sum(s) * np.log(x / sum(s)) for x in s) for s in SPECTRA]
    np.testing.assert_allclose(found["layer_effective_rank"][:, 0], np.exp(entropies))
    assert np.isnan(found["layer_imbalance"]).all()


SPECTRA = ((8, 4, 2, 2, 1), (3, 3, 0.02, 0.01, 0.001))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (3, 3, 2, 5)])
def test_wide_tall_and_convolutional_weights_have_the_spectrum_of_their_matrix(shape):
    kernels = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    found = weights.measure([kernels], [None])
    for run, kernel in enumerate(kernels):
        matrix = kernel.astype(np.float64).reshape(-1, shape[-1])
        values = np.linalg.svd(matrix, compute_uv=False)
        assert found["layer_condition"][run, 0] == pytest.approx(values[0] / values[-1])
        assert found["layer_rank"][run, 0] == len(values)


def test_imbalance_is_the_norm_of_the_difference_of_products():
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((2, *shape)) for shape in ((6, 5), (5, 4), (4, 3))]
    found = weights.measure(kernels, [1, None, None])["layer_imbalance"]
    for run in range(2):
        first, second = (kernel[run].T for kernel in kernels[:2])
        expected = np.sqrt(np.sum((second.T @ second - first @ first.T) ** 2))
        assert found[run, 0] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(found[:, 1:]).all()


def test_layers_that_balance_each_other_have_an_imbalance_of_0():
    u, s, v = np.linalg.svd(np.random.default_rng(0).standard_normal((4, 6)), full_matrices=False)
    below, above = (u * s) @ v, (u * s).T
    found = weights.measure([below.T[None], above.T[None]], [1, None])["layer_imbalance"]
    assert found[0, 0] < 1e-12


def test_products_of_convolutions_are_summed_over_positions():
    """Channel by channel: of the kernel below over its inputs and positions, of what lies above
    over its outputs and positions, whether it is a convolution or dense on 2x2 of them.
    """
    rng = np.random.default_rng(0)
    below, conv, dense = (rng.standard_normal(s) for s in ((3, 3, 2, 5), (3, 3, 5, 4), (20, 3)))
    product = np.einsum("hwia,hwib->ab", below, below)
    by_position = dense.reshape(2, 2, 5, 3)
    for above, summed in (
        (conv, np.einsum("hwao,hwbo->ab", conv, conv)),
        (dense, np.einsum("hwao,hwbo->ab", by_position, by_position)),
    ):
        found = weights.measure([below[None], above[None]], [1, None])["layer_imbalance"]
        assert found[0, 0] == pytest.approx(np.linalg.norm(summed - product), rel=1e-12)


def test_weights_that_are_not_finite_or_zero_are_nan_and_leave_others_alone():
    kernels = np.stack([made(2, 1), np.full((6, 5), np.nan), np.zeros((6, 5))])
    found = weights.measure([kernels], [None])
    for name in ("layer_rank", "layer_effective_rank", "layer_condition"):
        assert np.isfinite(found[name][0]).all()
        assert np.isnan(found[name][1]).all()
    assert found["layer_rank"][2] == 0
    # The weights have rank 2 of 5.
    assert found["layer_condition"][0] > 1e12


def test_every_number_lies_in_the_range_of_its_definition():
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((5, *shape)) for shape in ((6, 5), (5, 4))]
    for name, values in weights.measure(kernels, [1, None]).items():
        metric = LAYER_VOCABULARY[name]
        known = values[np.isfinite(values)]
        assert ((known >= metric.least) & (known <= metric.most)).all(), name
    # The definition of a rank has no greatest value: the shorter side of the kernel is.
    ranks = weights.measure(kernels, [1, None])["layer_rank"]
    assert ((ranks >= 1) & (ranks <= [5, 4])).all()
