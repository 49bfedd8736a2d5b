"""What several test files share: oracles, small runs, damage.

The oracles are written from the definitions in docs/theory.md, in float64 NumPy, by explicit p x p
matrices and loops over classes and pairs; they share no code and no algorithm with ncjax.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.config import HeadBias, default_config
from ncjax.plan import prepare
from ncjax.report import draw
from ncjax.runs import loop
from ncjax.storage import checkpoint
from ncjax.training import evaluate, every_layer, layers, program
from ncjax.training.objective import Objective

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Compiles sweeps without what measures, which is most of them."""
    with (
        mock.patch.object(program, "sums_of_runs", return_value=({}, {})),
        mock.patch.object(program, "metrics_of_runs", return_value={}),
    ):
        yield


def measure_by(
    model: nn.Module,
    structure: layers.Structure,
    head_bias: HeadBias,
    objective: Objective = Objective(),  # noqa: B008 (immutable)
    probe: every_layer.Probe | None = None,
    most_held: int = 2**20,
) -> Callable[[dict, Any, evaluate.Data], dict]:
    """Returns measure(params, weight_decay, data) of one run whose leaves are all decayed."""

    def measure(params: dict, weight_decay: Any, data: evaluate.Data) -> dict:
        sums = evaluate.collect(
            {"params": params},
            weight_decay,
            data,
            model=model,
            structure=structure,
            decayed=layers.decay_factors(params, True, True, True, head_bias, "decayed"),
            objective=objective,
            probe=probe,
            most_held=most_held,
        )
        meaning = evaluate.Meaning(structure, objective, probe=probe)
        return evaluate.metrics(sums, weight_decay, meaning)

    return measure


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / np.sqrt(a @ a * (b @ b))


def oracle_geometry(rows: np.ndarray, suffix: str) -> dict[str, float]:
    """NC2 of the rows of a matrix."""
    rows = np.asarray(rows, np.float64)
    norms = np.array([np.sqrt(row @ row) for row in rows])
    cosines = np.array([_cosine(rows[a], rows[b]) for a, b in permutations(range(len(rows)), 2)])
    return {
        f"nc2_equinorm_{suffix}": np.sqrt(np.mean((norms - norms.mean()) ** 2)) / norms.mean(),
        f"nc2_equiangular_{suffix}": np.mean(np.abs(cosines + 1 / (len(rows) - 1))),
        f"nc2_cosine_std_{suffix}": np.sqrt(np.mean((cosines - cosines.mean()) ** 2)),
    }


def oracle_nc3_floor(head: np.ndarray) -> float:
    """NC3 against the centred rows of the head themselves, which no class means come nearer to."""
    head = np.asarray(head, np.float64)
    centred = head - head.mean(0)
    return np.sum((head / np.sqrt(np.sum(head**2)) - centred / np.sqrt(np.sum(centred**2))) ** 2)


def oracle_symmetric_part(matrix: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(u, v, E): matrix = u (I - J/C) + v J/C + E, by Frobenius projection on the first two."""
    num_classes = len(matrix)
    average = np.ones((num_classes, num_classes)) / num_classes
    across = np.eye(num_classes) - average
    u, v = (
        np.sum(matrix * across) / np.sum(across**2),
        np.sum(matrix * average) / np.sum(average**2),
    )
    return u, v, matrix - u * across - v * average


def oracle_nc4_bounds(features, outputs, labels, head) -> dict[str, float]:
    """Both bounds on NC4: an example counts unless its deviation, in the metric in which the class
    means are orthonormal, is below the radius of its class.
    """
    h, labels = np.asarray(features, np.float64), np.asarray(labels)
    classes = range(len(head))
    mu = np.stack([h[labels == c].mean(0) for c in classes])
    m_dot = (mu - mu.mean(0)).T
    inverse = np.linalg.pinv(m_dot, rcond=1e-5)
    radii = []
    for c in classes:
        steps = [mu[other] - mu[c] for other in classes if other != c]
        radii.append(min(v @ v / (2 * np.linalg.norm(m_dot.T @ v)) for v in steps))
    distances = [np.linalg.norm(inverse @ (x - mu[c])) for x, c in zip(h, labels, strict=True)]
    wrong = np.mean(np.argmax(outputs, 1) != labels)
    outside = np.mean([d >= radii[c] for d, c in zip(distances, labels, strict=True)])
    return {
        "nc4_bound": min(1, wrong + outside),
        "nc4_bound_nc1": min(1, wrong + np.mean(np.square(distances)) / min(radii) ** 2),
    }


def oracle_row_space_bound(features, labels, head) -> float:
    h, labels, head = np.asarray(features, np.float64), np.asarray(labels), np.asarray(head)
    deviations = np.stack([x - h[labels == c].mean(0) for x, c in zip(h, labels, strict=True)])
    values = np.linalg.svd(head, compute_uv=False)
    least = values[values > 1e-5 * values[0]].min()
    return np.sum((deviations @ head.T) ** 2) / (least**2 * np.sum(deviations**2))


def oracle_bounds(features, residuals, labels, head, weight_decay) -> dict[str, float]:
    """The bounds that are of the training split alone, by p x p matrices and loops over pairs.

    They are of a full-batch gradient lambda W - mean r h^T.
    """
    h, r, head = (np.asarray(a, np.float64) for a in (features, residuals, head))
    total, num_classes = len(h), len(head)
    classes = range(num_classes)
    mu = np.stack([h[labels == c].mean(0) for c in classes], axis=1)
    r_bar = np.stack([r[labels == c].mean(0) for c in classes], axis=1)
    across = np.eye(num_classes) - 1 / num_classes
    m_dot = mu @ across
    t, q, rest = oracle_symmetric_part(r_bar)
    deviation = h - mu.T[labels]
    theorem = t / num_classes * m_dot.T
    mean = q / num_classes * np.outer(np.ones(num_classes), mu.mean(1))
    others = {
        "asymmetry": rest @ mu.T / num_classes,
        "within": (r - r_bar.T[labels]).T @ deviation / total,
        "gradient": weight_decay * head - r.T @ h / total,
    }

    def outside(x, direction):
        return np.linalg.norm(x - np.sum(x * direction) / np.sum(direction**2) * direction)

    def angle(whole, parts):
        if t <= 0 or np.sum(theorem * whole) <= 0:
            return np.nan
        sines = [sum(outside(x, whole) for x in parts) / np.linalg.norm(theorem)]
        if weight_decay > 0:
            size = weight_decay * np.linalg.norm(whole)
            sines.append(sum(outside(x, theorem) for x in parts) / size)
        return 2 - 2 * np.sqrt(1 - min(1, *sines, 1) ** 2)

    centred = angle(across @ head, [across @ x for x in others.values()])
    kept = np.linalg.norm(across @ head) / np.linalg.norm(head)
    whole = np.fmin(angle(head, [mean, *others.values()]), 2 - (2 - centred) * kept)

    gram = m_dot.T @ m_dot
    u = np.trace(gram) / (num_classes - 1)
    factor = num_classes / t if t > 0 else np.nan
    parts = {name: -factor * across @ x @ m_dot for name, x in others.items()}
    _, _, unlike = oracle_symmetric_part(head @ mu)
    parts["outputs"] = factor * weight_decay * across @ unlike @ across
    for name, x in parts.items():
        symmetric = (x + x.T) / 2
        parts[name] = symmetric - np.trace(symmetric) / (num_classes - 1) * across
    if t > 0:  # the identity that the bounds rest on
        np.testing.assert_allclose(
            u * across + sum(parts.values()), gram, atol=1e-10 * np.abs(gram).max()
        )
    bound = sum(np.abs(x) for x in parts.values())
    secant = np.sqrt(1 + np.sum(bound**2) / (u**2 * (num_classes - 1)))
    square = u * (num_classes - 1) / num_classes
    norms = np.diag(bound) / square
    least = np.maximum(1 - norms, 0)
    mean_norm = 1 - np.mean(norms**2) / (2 * (1 + np.sqrt(least.min())) ** 2)
    angles = []
    for c, d in permutations(classes, 2):
        shrink = np.sqrt(least[c] * least[d])
        angle_most = num_classes / (num_classes - 1)
        if shrink > 0:
            at_least_norms = bound[c, d] / (square * shrink)
            angle_most = min(angle_most, at_least_norms + (1 / shrink - 1) / (num_classes - 1))
        angles.append(angle_most)
    if not t > 0:
        angles, mean_norm = [np.nan], np.nan
    equinorm = np.sqrt(1 / mean_norm**2 - 1) if not mean_norm <= 0 else np.inf

    # K^+ applied to P W d and to R d, over examples.
    inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True)
    deviating = across @ sum(others.values())
    sizes = [
        np.sqrt(np.mean(np.sum((deviation @ x.T @ inverse) ** 2, axis=1)))
        for x in (weight_decay * across @ head, deviating)
    ]
    defined = t > 0 and weight_decay > 0 and np.linalg.matrix_rank(gram) == num_classes - 1
    logits = h @ head.T
    return {
        "nc3_bound": whole,
        "nc3_centered_bound": centred,
        "nc2_bound_etf": np.sqrt(2 - 2 / secant),
        "nc2_bound_equinorm": np.minimum(equinorm, np.sqrt(num_classes - 1)),
        "nc2_bound_equiangular": np.mean(angles),
        **{
            f"nc2_share_{name}": np.sum(np.abs(x) * bound) / np.sum(bound**2)
            for name, x in parts.items()
        },
        "nc1_bound": (factor * sum(sizes)) ** 2 if defined else np.nan,
        "nc1_bound_outputs": sizes[0] / sum(sizes) if defined else np.nan,
        "fit_loss_floor": max(0, np.mean(np.sum(r * logits, 1))) ** 2
        / (2 * np.mean(np.sum(logits**2, 1))),
    }


def oracle_split(features, outputs, labels, head, residuals=None) -> dict[str, float]:
    """Every measurement of `collapse.measure`. features (M, p), outputs (M, C), labels (M,), head
    (C, p).

    residuals (M, C): of the square loss with one-hot targets unless given.
    """
    rank_tolerance = 1e-5
    h, f, head = (np.asarray(a, np.float64) for a in (features, outputs, head))
    labels = np.asarray(labels)
    (total, dim), num_classes = h.shape, len(head)
    classes = range(num_classes)
    mu = np.stack([h[labels == c].mean(0) for c in classes])
    m_dot = np.stack([mu_c - mu.mean(0) for mu_c in mu], axis=1)

    within = (
        sum(
            (np.outer(x - mu[c], x - mu[c]) for x, c in zip(h, labels, strict=True)),
            np.zeros((dim, dim)),
        )
        / total
    )
    between = m_dot @ m_dot.T / num_classes
    singular_values = np.linalg.svd(m_dot, compute_uv=False)
    variances = [np.mean([(x - mu[c]) @ (x - mu[c]) for x in h[labels == c]]) for c in classes]
    cdnv = [
        (variances[a] + variances[b]) / (2 * (mu[a] - mu[b]) @ (mu[a] - mu[b]))
        for a, b in permutations(classes, 2)
    ]
    gram = m_dot.T @ m_dot
    etf = (np.eye(num_classes) - np.ones((num_classes, num_classes)) / num_classes) / np.sqrt(
        num_classes - 1
    )

    def distance(w: np.ndarray) -> float:
        return np.sum((w.T / np.sqrt(np.sum(w**2)) - m_dot / np.sqrt(np.sum(m_dot**2))) ** 2)

    nearest = [min(classes, key=lambda c: np.sum((x - mu[c]) ** 2)) for x in h]
    winner = [max(classes, key=lambda c: out[c]) for out in f]

    r = np.eye(num_classes)[labels] - f if residuals is None else np.asarray(residuals, np.float64)
    residual = np.stack([r[labels == c].mean(0) for c in classes], axis=1)  # r_c in column c
    epsilon = np.mean([residual[c, c] for c in classes])
    delta = -np.mean([residual[a, b] for a, b in permutations(classes, 2)])
    asymmetry = oracle_symmetric_part(residual)[2]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=rank_tolerance**2, hermitian=True))
        / num_classes,
        "nc1_rank": min(
            num_classes - 1, dim, np.sum(singular_values > rank_tolerance * singular_values[0])
        ),
        "nc1_trace_ratio": np.trace(within) / np.trace(between),
        "nc1_row_space": np.trace(np.linalg.pinv(head, rcond=1e-6) @ head @ within)
        / np.trace(within),
        "cdnv": np.mean(cdnv),
        **oracle_geometry(m_dot.T, "means"),
        "etf_error": np.sqrt(np.sum((gram / np.sqrt(np.sum(gram**2)) - etf) ** 2)),
        "nc3": distance(head),
        "nc3_centered": distance(head - head.mean(0)),
        "nc4": np.mean([a != b for a, b in zip(nearest, winner, strict=True)]),
        "epsilon": epsilon,
        "delta": delta,
        "sqi_gap": abs(delta - epsilon / (num_classes - 1)),
        "output_spread": np.sqrt(
            np.mean([np.sum((one - residual[:, c]) ** 2) for one, c in zip(r, labels, strict=True)])
            / num_classes
        ),
        "output_asymmetry": np.sqrt(np.sum(asymmetry**2)) / num_classes,
        "class_mean_cosine": np.array(
            [[_cosine(m_dot[:, a], m_dot[:, b]) for b in classes] for a in classes]
        ),
    }


def oracle_by_class(features, outputs, labels, head, residuals=None) -> dict[str, list[float]]:
    """Metrics by class, by loops over classes; arguments are those of `oracle_split`."""
    h, f, head = (np.asarray(a, np.float64) for a in (features, outputs, head))
    r = np.eye(len(head))[labels] - f if residuals is None else np.asarray(residuals, np.float64)
    classes = range(len(head))
    mu = np.stack([h[labels == c].mean(0) for c in classes])
    centred = mu - mu.mean(0)
    return {
        "class_accuracy": [np.mean(f[labels == c].argmax(1) == c) for c in classes],
        "class_epsilon": [r[labels == c][:, c].mean() for c in classes],
        "class_norm_means": [np.sqrt(row @ row) for row in centred],
        "class_cosine_means": [
            max(_cosine(centred[c], centred[d]) for d in classes if d != c) for c in classes
        ],
        "class_norm_head": [np.sqrt(row @ row) for row in head],
        "class_cosine_head": [
            max(_cosine(head[c], head[d]) for d in classes if d != c) for c in classes
        ],
    }


def simplex_etf(num_classes: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows of length 1 at equal angles, cos = -1/(C-1), in a random position in R^dim."""
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0][
        :num_classes
    ]
    return (
        np.sqrt(num_classes / (num_classes - 1))
        * (np.eye(num_classes) - 1 / num_classes)
        @ rotation
    )


def small_config(**changes):
    config = default_config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", 3, 20
    config.model.widths = (8, 8)
    config.train.epochs, config.train.batch_size, config.checkpoint.every = 6, 16, 2
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-2), (0, 1)
    config.update(changes)
    return config


def run(workdir, figures=False, **changes):
    """`changes` to `small_config`, with __ for a dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    with pytest.MonkeyPatch.context() as patch:
        if not figures:  # most of a small run's time
            patch.setattr(draw, "draw_all", lambda history, folder: [])
        return loop.train_and_show(prepare(small_config(**changes), workdir))


def whole_checkpoint(workdir, epoch):
    """name -> (R, ...), read by Orbax rather than by ncjax."""
    import orbax.checkpoint as ocp

    with warnings.catch_warnings(action="ignore"):  # that it asks the checkpoint for its shardings
        state = ocp.PyTreeCheckpointer().restore(
            (workdir / "checkpoints" / str(epoch) / "state").resolve()
        )
    return {
        f"{layer}.{leaf}": np.asarray(values)
        for layer, leaves in state["params"].items()
        for leaf, values in leaves.items()
    }


def forge(workdir, epoch, change, **facts):
    """Writes a checkpoint anew, sealed as if it had been trained so: `change` maps each leaf of
    the parameters.
    """
    folder = workdir / "checkpoints"
    before = checkpoint.read_metadata(folder, epoch)
    params: dict = {}
    for name, leaf in whole_checkpoint(workdir, epoch).items():
        layer, _, part = name.partition(".")
        params.setdefault(layer, {})[part] = change(leaf)
    saved = checkpoint.Checkpoints(folder, keep=9)
    with jax.enable_x64(True):
        saved.save({"params": jax.tree.map(jnp.asarray, params)}, before._replace(**facts))
    saved.close()


def flip(workdir, epoch, leaf):
    """Damages the chunk of `leaf`, one run's numbers, on disk; those below 1 kB have none of
    their own.
    """
    needle, hits = np.ascontiguousarray(leaf).tobytes(), 0
    for path in (workdir / "checkpoints" / str(epoch) / "state").rglob("*"):
        content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        at = content.find(needle)
        if at >= 0:
            content[at + 5] ^= 1
            path.write_bytes(content)
            hits += 1
    assert hits == 1
