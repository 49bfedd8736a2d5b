"""Checks what experiments compute beside the histories, by definition in NumPy."""

import itertools

import numpy as np
import pytest
import xarray as xr

from experiments.batch_norm.__main__ import cosines
from experiments.clock.__main__ import at_clock, predict
from experiments.low_rank import __main__ as low_rank


def test_collapsed_loss_is_that_of_orthogonal_frames_in_every_layer():
    weight_decay = 0.008
    inputs = np.eye(low_rank.CLASSES * low_rank.PER_CLASS)
    labels = np.repeat(np.arange(low_rank.CLASSES), low_rank.PER_CLASS)
    targets = np.eye(low_rank.CLASSES)[labels]
    losses = []
    for margin in np.linspace(0.85, 0.9, 501):
        factor = (margin * low_rank.PER_CLASS**0.5) ** (1 / low_rank.LAYERS)
        first = factor * targets / low_rank.PER_CLASS**0.5
        weights = [first, *[factor * np.eye(low_rank.CLASSES)] * (low_rank.LAYERS - 1)]
        h = inputs
        for weight in weights:
            h = np.maximum(h @ weight, 0)
        fit = np.sum((targets - h) ** 2) / (2 * len(inputs))
        losses.append(fit + weight_decay / 2 * sum(np.sum(weight**2) for weight in weights))
    assert low_rank.collapsed_loss(weight_decay) == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("suffix", ["", "_uncentred"])
def test_cosines_are_means_over_all_pairs(suffix):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [4, 5, 6])
    features = rng.standard_normal((15, 4)) + 2 * np.eye(3, 4)[labels] + 1
    center = np.mean([features[labels == c].mean(0) for c in range(3)], axis=0)
    x = features - (0 if suffix else center)

    def mean_cosine(a, b):
        pairs = itertools.product(x[labels == a], x[labels == b])
        return np.mean([u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in pairs])

    within = [mean_cosine(c, c) for c in range(3)]
    between = [mean_cosine(a, b) for a, b in itertools.combinations(range(3), 2)]
    found = cosines(features, labels)
    assert found[f"intra_cosine{suffix}"] == pytest.approx(np.mean(within))
    assert found[f"least_intra_cosine{suffix}"] == pytest.approx(min(within))
    assert found[f"inter_cosine{suffix}"] == pytest.approx(np.mean(between))
    assert found[f"greatest_inter_cosine{suffix}"] == pytest.approx(max(between))


def test_prediction_is_exact_where_log_is_linear_in_log_lambda():
    epochs, decays, seeds = np.arange(5), np.array([1e-4, 1e-3, 1e-2]), [0, 1]
    times = np.outer(decays, 10.0 ** (epochs - 1) * (epochs > 0)) * 1e3
    clock = np.broadcast_to(times[:, None], (3, 2, 5))
    noise = np.array([0.5, -0.5])[:, None]  # log of each seed, whose mean is 0
    with np.errstate(divide="ignore"):
        logs = 0.3 * np.log(decays)[:, None, None] - 0.2 * np.log(clock) + noise
    dims, split = ("weight_decay", "seed", "epoch"), ("split", ["train", "test"])
    run = xr.Dataset(
        {"relaxation_time": (dims, clock), "nc3": (dims, np.exp(logs))},
        {"weight_decay": decays, "seed": seeds, "epoch": epochs},
    ).expand_dims(dict([split]))
    points = np.array([5.0, 50.0, 1e3])
    found = predict(run.isel(weight_decay=[0, 2]), 1e-3, "nc3", points, "relaxation_time")
    expected = 0.3 * np.log(1e-3) - 0.2 * np.log(points)
    # The greatest lambda begins after the first point, the least ends before the last.
    np.testing.assert_allclose(found, np.where([0, 1, 0], expected, np.nan), rtol=1e-12)
    measured = at_clock(run.isel(weight_decay=1), "nc3", points, "relaxation_time").mean("seed")
    np.testing.assert_allclose(measured[1], expected[1], rtol=1e-12)
