"""What `measure` must find, from the definitions in docs/theory.md, in NumPy's widest floating
point type.

Extended precision reaches from 1e-4932 to 1e4932 and has 19 digits: nothing overflows, and what is
compared with float64 is rounded once. Only singular value decompositions are float64, of matrices
scaled to a largest entry of 1.
"""

from typing import Any

import numpy as np

Wide = np.longdouble


def _exact(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.float64).astype(Wide) if array.dtype.kind == "V" else array.astype(Wide)


def _norm(array: np.ndarray) -> Any:
    return np.sqrt(np.sum(array**2))


def _geometry(rows: np.ndarray, suffix: str) -> dict[str, Any]:
    norms, across = np.sqrt(np.sum(rows**2, axis=1)), ~np.eye(len(rows), dtype=bool)
    cosines = (rows @ rows.T / np.outer(norms, norms))[across]
    return {
        f"nc2_equinorm_{suffix}": norms.std() / norms.mean(),
        f"nc2_equiangular_{suffix}": np.mean(np.abs(cosines + Wide(1) / (len(rows) - 1))),
        f"nc2_cosine_std_{suffix}": cosines.std(),
    }


def _row_basis(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Singular values that are not 0, right singular vectors as rows, and the factor that the
    values lack.
    """
    size = np.abs(rows).max() or Wide(1)
    _, values, vectors = np.linalg.svd((rows / size).astype(np.float64), full_matrices=False)
    kept = values > 1e-11 * max(values[0], 1e-300)
    return values[kept].astype(Wide), vectors[kept].astype(Wide), size


def _of_features(h: np.ndarray, y: np.ndarray, mu: np.ndarray) -> dict[str, Any]:
    count, deviation, centred = len(mu), h - mu[y], mu - mu.mean(0)
    values, basis, size = _row_basis(centred)
    variances = np.array([np.sum(deviation[y == c] ** 2) / np.sum(y == c) for c in range(count)])
    distances = np.sum((mu[:, None] - mu[None]) ** 2, axis=2)
    across = ~np.eye(count, dtype=bool)
    gram = centred @ centred.T
    etf = (np.eye(count, dtype=Wide) - Wide(1) / count) / np.sqrt(Wide(count - 1))
    within = np.sum((deviation / size @ basis.T) ** 2, axis=0) / len(h)
    return {
        "nc1": np.sum(within / values**2),  # Sigma_B has the eigenvalues values^2/C
        "nc1_rank": Wide(len(values)) if centred.any() else Wide(0),
        "nc1_trace_ratio": np.sum(deviation**2) / len(h) / (np.sum(centred**2) / count),
        "cdnv": np.mean(((variances[:, None] + variances[None]) / (2 * distances))[across]),
        "etf_error": _norm(gram / _norm(gram) - etf),
        **_geometry(centred, "means"),
    }


def _of_head(h: np.ndarray, y: np.ndarray, mu: np.ndarray, head: np.ndarray) -> dict[str, Any]:
    centred, deviation = mu - mu.mean(0), h - mu[y]
    _, basis, _ = _row_basis(head)

    def distance(rows: np.ndarray) -> Any:
        return np.sum((rows / _norm(rows) - centred / _norm(centred)) ** 2)

    return {
        "nc1_row_space": np.sum((deviation @ basis.T) ** 2) / np.sum(deviation**2),
        "nc3": distance(head),
        "nc3_centered": distance(head - head.mean(0)),
        "weight_norm_sq": np.sum(head**2),
        **_geometry(head, "head"),
    }


def _of_outputs(
    f: np.ndarray, residuals: np.ndarray, y: np.ndarray, nearest: np.ndarray
) -> dict[str, Any]:
    count = f.shape[1]
    mean = np.stack([residuals[y == c].mean(0) for c in range(count)])
    own, across = np.trace(mean), ~np.eye(count, dtype=bool)
    epsilon, delta = own / count, -mean[across].mean()
    v = mean.sum() / count
    u = (own - v) / (count - 1)
    rest = mean - u * np.eye(count, dtype=Wide) - (v - u) / count
    return {
        "accuracy": np.mean(f.argmax(1) == y),
        "nc4": np.mean(f.argmax(1) != nearest),
        "epsilon": epsilon,
        "delta": delta,
        "sqi_gap": np.abs(delta - epsilon / (count - 1)),
        "output_asymmetry": _norm(rest) / count,
        "output_spread": np.sqrt(np.sum((residuals - mean[y]) ** 2) / len(y) / count),
    }


def expected(
    features: Any,
    labels: Any,
    logits: Any = None,
    head: Any = None,
    bias: Any = None,
    loss: str = "square",
    weight_decay: float | None = None,
    **_: Any,
) -> dict[str, np.longdouble]:
    """Returns name -> value, of the classes that have examples; what is left out is not
    compared.
    """
    with np.errstate(all="ignore"):
        present, y = np.unique(np.asarray(labels).astype(np.int64), return_inverse=True)
        wide = _exact(features)
        h = wide - wide[0]  # the means of integers about 2**60 would need more digits
        mu = np.stack([h[y == c].mean(0) for c in range(len(present))])
        found = _of_features(h, y, mu)
        rows = None if head is None else _exact(head)[present]
        if rows is not None:
            found |= _of_head(h, y, mu, rows)
        if rows is None and logits is None:
            return found
        if logits is not None:
            f = _exact(logits)[:, present]
        else:
            f = wide @ rows.T + (0 if bias is None else _exact(bias)[present])
        if loss == "square":
            residuals = np.eye(len(present), dtype=Wide)[y] - f
        else:
            e = np.exp(f - f.max(1, keepdims=True))
            residuals = np.eye(len(present), dtype=Wide)[y] - e / e.sum(1, keepdims=True)
        nearest = np.array([np.argmin(np.sum((x - mu) ** 2, axis=1)) for x in h])
        found |= _of_outputs(f, residuals, y, nearest)
        if rows is not None and weight_decay is not None:
            pull = residuals.T @ wide / len(h)
            decay = Wide(weight_decay)
            found["equilibrium_residual"] = _norm(decay * rows - pull) / _norm(decay * rows)
            found["norm_target"] = np.sum(pull * rows) / decay
        return found


_OF_OUTPUTS = ("epsilon", "delta", "sqi_gap", "output_asymmetry", "output_spread")
_SHARES = ("accuracy", "nc4")


def wrong(
    found: dict[str, Any], right: dict[str, Any], tolerance: float, examples: int, size: float = 1.0
) -> list[str]:
    """Returns a line for every number that is off.

    Numbers may be off by `tolerance`, relative, or by a tenth of it where they are near 0 (of
    `size`, that of outputs, where they are differences of outputs); shares of examples by one
    example. NaN is right where the definition is 0/0, and infinity where the value leaves float64.
    """
    lines = []
    for name, value in right.items():
        if name not in found:
            lines.append(f"{name} is missing")
            continue
        got = float("nan") if found[name] is None else float(found[name])
        with np.errstate(over="ignore"):
            true = float(value)
        if np.isnan(true) or np.isinf(true):
            same = np.isnan(got) if np.isnan(true) else not np.isfinite(got)
        elif name in _SHARES:
            same = abs(got - true) <= 1.01 / examples
        else:
            near_zero = tolerance / 10 * (max(1.0, size) if name in _OF_OUTPUTS else 1.0)
            same = abs(got - true) <= tolerance * abs(true) + near_zero
        if not same:
            lines.append(f"{name} is {got:.6g}, must be {true:.6g}")
    return lines
