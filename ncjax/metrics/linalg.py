"""Computes a small singular value decomposition, and the symmetric part of a class matrix.

The decomposition uses plain array operations, because LAPACK cannot be used inside the compiled
program: JAX 0.10's batched calls wait for XLA's thread pool from inside that pool, and deadlock
when every device measures at once. On a GPU, cuSOLVER would factor one matrix after another.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_MOST_SWEEPS = 30  # five to ten suffice up to a hundred rows
# Convergence is quadratic: after a sweep that finds no cosine above this, none is above its square.
_NEARLY_ORTHOGONAL = 1e-9


class SymmetricPart(NamedTuple):
    """Holds the parts of a (C, C) matrix M = u (I - J/C) + v J/C + E, with J all ones.

    The first two parts are the same under every permutation of the classes.

    Attributes:
      u: the factor of differences between classes, (tr M - v)/(C - 1).
      v: the factor of their sum, 1^T M 1/C.
      rest: E (C, C), Frobenius-orthogonal to the other two parts.
    """

    u: Float[Array, ""]
    v: Float[Array, ""]
    rest: Float[Array, "C C"]


def symmetric_part(matrix: Float[Array, "C C"]) -> SymmetricPart:
    num_classes = len(matrix)
    v = matrix.sum() / num_classes
    u = (jnp.trace(matrix) - v) / (num_classes - 1)
    identity = jnp.eye(num_classes, dtype=matrix.dtype)
    return SymmetricPart(u, v, matrix - u * identity - (v - u) / num_classes)


def row_space(matrix: Float[Array, "C p"]) -> tuple[Float[Array, " C"], Float[Array, "C p"]]:
    """Returns the singular values, descending, and right singular vectors (rows) of a few rows.

    This is the one-sided Jacobi method (Hestenes 1958): it rotates pairs of rows until all rows are
    orthogonal, and their norms are then the singular values. No Gram matrix is formed, so a
    singular value keeps its digits down to eps times the largest. Rows that belong to a zero
    singular value are zero or orthogonal noise at that level.

    A round rotates row i of the upper half with row i of the lower half, for all i at once. Every
    row but the first then moves on by one place, so that each pair has met after rows - 1 rounds
    (Brent & Luk 1985).
    """
    rows, columns = matrix.shape
    # The rotations compare fourth powers of entries, which must neither underflow nor overflow.
    largest = jnp.max(jnp.abs(matrix))
    matrix = matrix / jnp.where(largest > 0, largest, 1)
    half = -(-rows // 2)
    padded = jnp.concatenate([matrix, jnp.zeros((2 * half - rows, columns), matrix.dtype)])
    nearly_orthogonal = max(_NEARLY_ORTHOGONAL, 4 * float(jnp.finfo(matrix.dtype).eps))
    negligible = (rows * jnp.finfo(matrix.dtype).eps) ** 2 * jnp.sum(matrix**2)

    def play_round(state, _):
        x, y, oblique = state
        alpha, beta, gamma = jnp.sum(jnp.stack([x * x, y * y, x * y]), 2)
        meet = jnp.minimum(alpha, beta) > negligible
        oblique |= jnp.any(meet & (gamma**2 > nearly_orthogonal**2 * alpha * beta))
        meet &= gamma != 0
        zeta = (beta - alpha) / (2 * jnp.where(meet, gamma, 1))
        tangent = jnp.where(
            meet, jnp.where(zeta < 0, -1, 1) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta**2)), 0
        )[:, None]
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        x, y = cosine * (x - tangent * y), cosine * (tangent * x + y)
        if half > 1:
            x, y = jnp.concatenate([x[:1], y[:1], x[1:-1]]), jnp.concatenate([y[1:], x[-1:]])
        return (x, y, oblique), None

    def sweep(state):
        x, y, _, count = state
        (x, y, oblique), _ = lax.scan(play_round, (x, y, jnp.bool(False)), length=2 * half - 1)
        return x, y, oblique, count + 1

    start = (padded[:half], padded[half:], jnp.bool(True), 0)
    x, y, _, _ = lax.while_loop(lambda state: state[2] & (state[3] < _MOST_SWEEPS), sweep, start)
    orthogonal = jnp.concatenate([x, y])
    norms = jnp.sqrt(jnp.sum(orthogonal**2, axis=1))
    descending = jnp.argsort(-norms)[:rows]
    norms = norms[descending]
    return norms * largest, orthogonal[descending] / jnp.where(norms > 0, norms, 1)[:, None]
