"""linalg against LAPACK's singular value decomposition and Frobenius projections, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.metrics.linalg import row_space, symmetric_part
from tests.helpers import oracle_symmetric_part, simplex_etf


def decompose(matrix):
    with jax.enable_x64(True):
        return tuple(np.asarray(a) for a in jax.jit(row_space)(jnp.asarray(matrix, jnp.float64)))


def random_matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def with_singular_values(values, columns, seed=0):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return left * np.asarray(values) @ right.T


MATRICES = {
    "one_row": random_matrix(1, 5),
    "two_rows": random_matrix(2, 5),
    "odd": random_matrix(7, 20),
    "even": random_matrix(10, 20),
    "rows_exceed_columns": random_matrix(9, 4),
    "centred_hence_rank_deficient": random_matrix(10, 20) - random_matrix(10, 20).mean(0),
    "equal_singular_values_of_an_etf": simplex_etf(10, 20),
    "orthogonal_rows": with_singular_values(np.ones(6), 12) * 3,
    "duplicate_rows": np.repeat(random_matrix(3, 8), 2, axis=0),
    "zero": np.zeros((4, 6)),
    "one_to_1e-10": with_singular_values(np.logspace(0, -10, 10), 20),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_row_space_equals_lapack_to_rounding_of_the_largest_singular_value(matrix):
    values, basis = decompose(matrix)
    _, expected, right = np.linalg.svd(matrix, full_matrices=False)
    expected = np.pad(expected, (0, len(matrix) - len(expected)))
    largest = expected[0]
    np.testing.assert_allclose(values, expected, rtol=0, atol=5e-15 * largest)
    assert (np.diff(values) <= 0).all()

    kept = expected > 1e-12 * largest if largest else np.zeros(len(matrix), bool)
    kept_basis, kept_right = basis[kept], right[kept[: len(right)]]
    # A direction is known to rounding of the largest relative to its own singular value.
    atol = 1e-9 + 1e-14 * largest / min(expected[kept], default=1)
    np.testing.assert_allclose(kept_basis @ kept_basis.T, np.eye(kept.sum()), atol=atol)
    np.testing.assert_allclose(kept_basis.T @ kept_basis, kept_right.T @ kept_right, atol=atol)


def test_small_singular_values_keep_their_digits_where_a_gram_matrix_would_lose_them():
    expected = np.logspace(0, -10, 10)
    matrix = with_singular_values(expected, 20)
    values, _ = decompose(matrix)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    # The premise: squared in float64, the smallest drown.
    from_gram = np.sqrt(np.abs(np.linalg.eigvalsh(matrix @ matrix.T))[::-1])
    assert abs(from_gram[-1] / expected[-1] - 1) > 0.1


def test_each_basis_row_reproduces_its_singular_value():
    matrix = random_matrix(7, 20)
    values, basis = decompose(matrix)
    np.testing.assert_allclose(np.linalg.norm(matrix @ basis.T, axis=0), values, rtol=1e-13)


def test_vmap_decomposes_each_matrix_of_a_batch():
    batch = np.stack([random_matrix(5, 8, seed) * 10.0**seed for seed in range(4)])
    with jax.enable_x64(True):
        values, basis = (np.asarray(a) for a in jax.jit(jax.vmap(row_space))(jnp.asarray(batch)))
    for matrix, got, rows in zip(batch, values, basis, strict=True):
        np.testing.assert_allclose(got, np.linalg.svd(matrix, compute_uv=False), rtol=1e-13)
        np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_the_scale_of_a_matrix_costs_no_digits(scale):
    """A net that decays to zero has features whose squares, but not they themselves, underflow."""
    matrix = random_matrix(5, 8) * scale
    values, _ = decompose(matrix)
    np.testing.assert_allclose(values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_terminates_and_gives_nan(bad):
    matrix = random_matrix(5, 8)
    matrix[1, 2] = bad
    values, _ = decompose(matrix)
    assert np.isnan(values).any()


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_the_symmetric_part_is_the_frobenius_projection_on_matrices_that_treat_all_classes_alike(
    num_classes,
):
    matrix = random_matrix(num_classes, num_classes)
    with jax.enable_x64(True):
        u, v, rest = (np.asarray(a) for a in symmetric_part(jnp.asarray(matrix)))
    for got, expected in zip((u, v, rest), oracle_symmetric_part(matrix), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-14)
    average = np.full((num_classes, num_classes), 1 / num_classes)
    across = np.eye(num_classes) - average
    np.testing.assert_allclose(u * across + v * average + rest, matrix, atol=1e-14)
    assert abs(np.sum(rest * across)) < 1e-14
    assert abs(np.sum(rest * average)) < 1e-14
    assert np.linalg.norm(rest) > 0.1
    # Class order does not matter: the mean over all relabellings is the symmetric part.
    names = (
        [list(order) for order in itertools.permutations(range(num_classes))]
        if num_classes < 7
        else []
    )
    if names:
        mean = np.mean([matrix[np.ix_(order, order)] for order in names], axis=0)
        np.testing.assert_allclose(mean, u * across + v * average, atol=1e-14)


def test_a_symmetric_part_by_hand_keeps_its_type():
    u, v, rest = symmetric_part(jnp.asarray([[5.0, 1.0], [3.0, 7.0]], jnp.float32))
    # (5 + 1 + 3 + 7)/2 = 8 and 12 - 8 = 4: 4 (I - J/2) + 8 J/2 = [[6, 2], [2, 6]].
    assert (float(u), float(v)) == (4.0, 8.0)
    np.testing.assert_array_equal(np.asarray(rest), [[-1, -1], [1, 1]])
    assert u.dtype == v.dtype == rest.dtype == np.float32
