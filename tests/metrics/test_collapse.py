"""collapse against explicit float64 NumPy (helpers.oracle_split), closed forms and invariances."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.metrics import collapse
from ncjax.metrics.statistics import statistics_of_passes
from ncjax.metrics.vocabulary import Quantities, assemble
from tests.helpers import (
    oracle_geometry,
    oracle_nc3_floor,
    oracle_split,
    oracle_symmetric_part,
    simplex_etf,
)


def assembled(means, scatter, frame, frame_head, head):
    """The metrics of what both passes have summed, and the cosines of the class means."""
    with jax.enable_x64(True):
        statistics = statistics_of_passes(means, frame, frame_head, scatter, head)
        cosines = collapse.cosines(statistics.means - statistics.center[None])
        metrics = assemble(Quantities(statistics)) | {"class_mean_cosine": cosines}
        del metrics["weight_norm_sq"], metrics["nc0"]  # the ones that have a unit
        return metrics


def two_passes(features, outputs, labels, head):
    """The whole measurement of one batch, as `collapse`'s docstring prescribes it, of one-hot
    targets.
    """
    residuals, winners = (
        jax.nn.one_hot(labels, outputs.shape[1], dtype=outputs.dtype) - outputs,
        jnp.argmax(outputs, 1),
    )
    means = collapse.class_means(collapse.class_sums(features, residuals, labels))
    frame, frame_head = collapse.frames((means,), head)
    reach = collapse.certificate_of_split(means, frame)
    scatter = collapse.class_scatter(
        features, residuals, winners, labels, means, frame, frame_head, reach, is_linear=False
    )
    return assembled(means, scatter, frame, frame_head, head)


two_passes_in_jit = jax.jit(two_passes)


def measured(features, outputs, labels, head, dtype=np.float32, f=two_passes_in_jit):
    context = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with context:
        arrays = (jnp.asarray(a, dtype) for a in (features, outputs))
        metrics = f(*arrays, jnp.asarray(labels, jnp.int32), jnp.asarray(head, dtype))
        return {name: np.asarray(value) for name, value in metrics.items()}


def assert_equal(got, expected, rtol, atol=0.0):
    assert got.keys() >= expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=name)


def random_split(num_classes=5, dim=8, per_class=12, seed=0, spread=1.0, dtype=np.float64):
    """Features about random means, outputs about one-hot targets, a random head; examples
    shuffled.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    features = rng.standard_normal((num_classes, dim))[labels] + spread * rng.standard_normal(
        (len(labels), dim)
    )
    outputs = np.eye(num_classes)[labels] + 0.5 * rng.standard_normal((len(labels), num_classes))
    head = rng.standard_normal((num_classes, dim))
    return features.astype(dtype), outputs.astype(dtype), labels, head.astype(dtype)


SHAPES = {
    "p_exceeds_C": {},
    "C_exceeds_p": {"num_classes": 9, "dim": 4},
    "two_classes": {"num_classes": 2, "dim": 3, "per_class": 20},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float32, 2e-5), (np.float64, 1e-11)], ids=["float32", "float64"]
)
def test_every_metric_equals_its_definition(shape, dtype, rtol):
    split = random_split(**shape, dtype=dtype)
    assert_equal(measured(*split, dtype=dtype), oracle_split(*split), rtol, atol=rtol / 10)


@pytest.mark.slow
def test_a_direct_call_outside_jit_and_x64_gives_float64_metrics():
    split = random_split(dtype=np.float32)
    assert not jax.config.jax_enable_x64
    got = measured(*split, f=two_passes)
    assert {value.dtype for value in got.values()} == {np.dtype(np.float64)}
    assert_equal(got, oracle_split(*split), 2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["x64_off", "x64_on"])
def test_vmap_measures_each_run_of_a_stack(x64):
    splits = [random_split(seed=seed, dtype=np.float32) for seed in range(3)]
    with jax.enable_x64(x64):
        features, outputs, labels, heads = (
            jnp.asarray(np.stack(a)) for a in zip(*splits, strict=True)
        )
        got = jax.jit(jax.vmap(two_passes))(features, outputs, labels.astype(jnp.int32), heads)
        got = {name: np.asarray(values) for name, values in got.items()}
    for run, split in enumerate(splits):
        assert_equal(
            {name: values[run] for name, values in got.items()},
            oracle_split(*split),
            2e-5,
            atol=2e-6,
        )


@pytest.mark.slow
def test_sums_over_uneven_batches_with_padding_equal_the_whole_split():
    features, outputs, labels, head = random_split()
    padded = np.concatenate([labels, [-1, -1, -1]])
    # Padding holds junk, which must not count.
    features_padded = np.concatenate([features, np.full((3, 8), 1e6)])
    outputs_padded = np.concatenate([outputs, np.full((3, 5), -1e6)])
    edges = [0, 1, 8, 40, len(padded)]

    @jax.jit
    def in_batches(features, outputs, labels, head):
        residuals = jax.nn.one_hot(labels, 5, dtype=outputs.dtype) - outputs
        whole = features, residuals, jnp.argmax(outputs, 1), labels
        batches = [tuple(a[i:j] for a in whole) for i, j in itertools.pairwise(edges)]

        def total(f):
            return jax.tree.map(lambda *terms: sum(terms), *(f(*batch) for batch in batches))

        means = collapse.class_means(
            total(lambda h, r, _, labels: collapse.class_sums(h, r, labels))
        )
        frame, frame_head = collapse.frames((means,), head)
        reach = collapse.certificate_of_split(means, frame)
        scatter = total(
            lambda *batch: collapse.class_scatter(*batch, means, frame, frame_head, reach, True)
        )
        return assembled(means, scatter, frame, frame_head, head)

    got = measured(features_padded, outputs_padded, padded, head, dtype=np.float64, f=in_batches)
    assert_equal(got, oracle_split(features, outputs, labels, head), 1e-11, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_float32_keeps_three_digits_at_within_class_spread_1e_3_about_means_of_norm_5(offset):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 50)
    means = rng.standard_normal((10, 64))
    means *= 5 / np.linalg.norm(means, axis=1, keepdims=True)
    direction = rng.standard_normal(64)
    features = (
        means[labels]
        + 1e-3 * rng.standard_normal((500, 64))
        + offset * direction / np.linalg.norm(direction)
    )
    outputs = np.eye(10)[labels] + 1e-3 * rng.standard_normal((500, 10))
    split = (
        features.astype(np.float32),
        outputs.astype(np.float32),
        labels,
        means.astype(np.float32),
    )
    got, expected = measured(*split), oracle_split(*split)
    for name in (
        "nc1",
        "nc1_trace_ratio",
        "nc1_row_space",
        "cdnv",
        "output_spread",
        "nc4",
        "epsilon",
        "delta",
    ):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-3, atol=1e-7, err_msg=name)
    for name in ("nc3", "etf_error", "nc2_equinorm_means", "nc2_equiangular_means"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-3, atol=1e-6, err_msg=name)


def collapsed(means, per_class=12):
    """Features at their class means, perfect outputs."""
    labels = np.repeat(np.arange(len(means)), per_class)
    return means[labels], np.eye(len(means))[labels], labels


def test_a_perfect_simplex_etf_with_a_proportional_head_is_collapsed_in_every_respect():
    etf = simplex_etf(5, 8)
    got = measured(*collapsed(3 * etf + 2.0), 0.5 * etf, dtype=np.float64)
    zero = [
        "nc1",
        "nc1_trace_ratio",
        "cdnv",
        "nc2_equinorm_means",
        "nc2_equiangular_means",
        "nc2_cosine_std_means",
    ]
    zero += [
        "etf_error",
        "nc3",
        "nc3_centered",
        "nc4",
        "epsilon",
        "delta",
        "output_spread",
        "output_asymmetry",
    ]
    assert {name: got[name] for name in zero} == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-7)
    assert got["nc1_rank"] == 4


def test_an_orthogonal_frame_head_stands_off_its_means_by_the_closed_form_of_nc3():
    frame = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0][:5]
    got = measured(*collapsed(4 * frame), 0.3 * frame, dtype=np.float64)
    assert got["nc3"] == pytest.approx(2 - 2 * np.sqrt(4 / 5), rel=1e-12)
    assert got["nc3_centered"] == pytest.approx(0, abs=1e-14)


def test_opposite_head_has_the_largest_nc3():
    etf = simplex_etf(5, 8)
    assert measured(*collapsed(etf), -etf, dtype=np.float64)["nc3"] == pytest.approx(4, rel=1e-12)


def test_equal_class_means_have_rank_0_and_nc1_nan():
    rng = np.random.default_rng(0)
    deviation = rng.integers(-4, 5, (6, 8)).astype(np.float64)
    # Every class has mean 1, exactly.
    features = np.tile(np.concatenate([1 + deviation, 1 - deviation]), (5, 1))
    labels = np.repeat(np.arange(5), 12)
    got = measured(features, np.eye(5)[labels], labels, rng.standard_normal((5, 8)))
    assert got["nc1_rank"] == 0
    assert np.isnan(got["nc1"])
    assert got["nc1_trace_ratio"] == np.inf


def test_nc1_row_space_is_1_in_the_row_space_of_the_head_and_0_in_its_null_space():
    labels = np.repeat(np.arange(5), 12)
    wiggle = np.tile([1.0, -1.0], 30)[:, None]
    head, axis = np.eye(5, 8), np.eye(8)
    for direction, share in ((axis[1], 1.0), (axis[7], 0.0), (axis[1] + axis[7], 0.5)):
        got = measured(5 * head[labels] + wiggle * direction, np.eye(5)[labels], labels, head)
        assert got["nc1_row_space"] == pytest.approx(share, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "ranks"), [(np.float32, (2, 2)), (np.float64, (3, 3))], ids=["float32", "float64"]
)
def test_frames_keep_what_stands_above_the_rounding_of_the_features(dtype, ranks):
    """Relative singular values 1, 1e-4, 1e-7 and 0: float32 keeps those above 1e-5, float64 those
    above 1e-12, of means and of a head, however wide."""
    strengths = np.array([1.0, 1e-4, 1e-7, 0.0])
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((1024, 4)))[0].T
    sum_to_zero = np.linalg.qr(np.eye(4)[:, :3] - 0.25)[0]  # three orthonormal columns that do
    with jax.enable_x64(dtype == np.float64):
        centred = jnp.asarray(sum_to_zero @ (strengths[:3, None] * directions[:3]), dtype)
        means = collapse.ClassMeans(centred, jnp.zeros((4, 4), dtype))
        frame, frame_head = collapse.frames(
            (means,), jnp.asarray(strengths[:, None] * directions, dtype)
        )
    assert (int(frame.rank), int(frame_head.rank)) == ranks
    expected = np.where(np.arange(4) < ranks[0], strengths / 2, 0)  # Mdot/sqrt(C)
    np.testing.assert_allclose(np.asarray(frame.singular_values), expected, rtol=1e-2)
    assert (np.asarray(frame.basis)[ranks[0] :] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_geometry_ignores_rotation_translation_and_scale_of_features_and_scale_of_head(seed):
    features, outputs, labels, head = random_split(seed=seed)
    rotation = np.linalg.qr(np.random.default_rng(seed + 100).standard_normal((8, 8)))[0]
    before = measured(features, outputs, labels, head, dtype=np.float64)
    after = measured(
        3 * features @ rotation + 7.0, outputs, labels, 0.2 * head @ rotation, dtype=np.float64
    )
    assert_equal(after, before, 1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_relabelling_the_classes_changes_no_metric(seed):
    features, outputs, labels, head = random_split(seed=seed)
    new_name = np.random.default_rng(seed + 100).permutation(5)
    before = measured(features, outputs, labels, head, dtype=np.float64)
    by_new_name = np.argsort(new_name)
    after = measured(
        features, outputs[:, by_new_name], new_name[labels], head[by_new_name], dtype=np.float64
    )
    cosine, cosine_after = before.pop("class_mean_cosine"), after.pop("class_mean_cosine")
    assert_equal(after, before, 1e-9, atol=1e-11)
    np.testing.assert_allclose(cosine_after, cosine[np.ix_(by_new_name, by_new_name)], rtol=1e-9)


def test_scaling_the_within_class_deviations_scales_nc1_by_the_square():
    features, outputs, labels, head = random_split()
    means = np.stack([features[labels == c].mean(0) for c in range(5)])[labels]
    before = measured(features, outputs, labels, head, dtype=np.float64)
    after = measured(means + 3 * (features - means), outputs, labels, head, dtype=np.float64)
    for name in ("nc1", "nc1_trace_ratio", "cdnv"):
        assert after[name] == pytest.approx(9 * before[name], rel=1e-10), name


@pytest.mark.parametrize("seed", range(3))
def test_quasi_interpolation_of_mean_residuals_by_hand(seed):
    """With Rbar = t (I - J/C) + q J/C + E: epsilon + delta = t and epsilon - (C-1) delta = q."""
    # Mean outputs of class c in row c.
    outputs = np.random.default_rng(seed).standard_normal((6, 6))
    with jax.enable_x64(True):
        got = {
            name: float(v)
            for name, v in collapse.quasi_interpolation(jnp.asarray(np.eye(6) - outputs)).items()
        }
    epsilon, delta = 1 - np.mean(np.diagonal(outputs)), (outputs.sum() - np.trace(outputs)) / 30
    t, q, asymmetry = oracle_symmetric_part(np.eye(6) - outputs)
    assert (epsilon + delta, epsilon - 5 * delta) == (
        pytest.approx(t, rel=1e-12),
        pytest.approx(q, rel=1e-12),
    )
    expected = {
        "epsilon": epsilon,
        "delta": delta,
        "sqi_gap": abs(delta - epsilon / 5),
        "output_asymmetry": np.linalg.norm(asymmetry) / 6,
    }
    assert got == pytest.approx(expected, rel=1e-12)
    assert np.linalg.norm(asymmetry) > 0.1


def test_residuals_keep_the_digits_that_outputs_near_their_targets_lose():
    """Outputs within 1e-9 of one-hot, in float32: summed as residuals they are exact to five
    digits.
    """
    labels = np.repeat(np.arange(5), 12)
    shortfall = 1e-9 * (1 + np.random.default_rng(0).random((60, 5)))
    features, _, _, _ = random_split(dtype=np.float32)
    sums = collapse.class_sums(
        jnp.asarray(features), jnp.asarray(shortfall, jnp.float32), jnp.asarray(labels)
    )
    got = float(collapse.quasi_interpolation(collapse.class_means(sums).residuals)["epsilon"])
    assert got == pytest.approx(np.mean(shortfall[np.arange(60), labels]), rel=1e-5)
    assert np.float32(1) - np.float32(1 - 1e-9) == 0  # the premise: outputs could not tell


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_covariance_within_classes_equals_its_definition_and_is_minus_w_sigma_w_at_square_loss(
    seed,
):
    features, _, labels, head = random_split(seed=seed)
    outputs = features @ head.T
    residuals = np.eye(5)[labels] - outputs
    mu, rbar = (
        np.stack([a[labels == c].mean(0) for c in range(5)])[labels] for a in (features, residuals)
    )
    expected = sum(np.outer(r, h) for r, h in zip(residuals - rbar, features - mu, strict=True))
    with jax.enable_x64(True):
        h, r, w = (jnp.asarray(a) for a in (features, residuals, head))
        y, winners = jnp.asarray(labels, jnp.int32), jnp.asarray(outputs.argmax(1))
        means = collapse.class_means(collapse.class_sums(h, r, y))
        frames = collapse.frames((means,), w)
        reach = collapse.certificate_of_split(means, frames[0])
        scatter = collapse.class_scatter(h, r, winners, y, means, *frames, reach, True)
        covariance = np.asarray(scatter.covariance)
    np.testing.assert_allclose(covariance, expected, atol=1e-12 * np.abs(expected).max())
    within = (features - mu).T @ (features - mu)
    np.testing.assert_allclose(covariance, -head @ within, atol=1e-12 * np.abs(expected).max())


def test_symmetric_quasi_interpolation_is_recognized():
    labels = np.repeat(np.arange(5), 12)
    epsilon = 0.2
    outputs = np.full((60, 5), epsilon / 4)
    outputs[np.arange(60), labels] = 1 - epsilon
    features, _, _, head = random_split()
    got = measured(features, outputs, labels, head, dtype=np.float64)
    assert (got["epsilon"], got["delta"]) == (pytest.approx(0.2), pytest.approx(0.05))
    assert [got[n] for n in ("sqi_gap", "output_spread", "output_asymmetry")] == pytest.approx(
        [0, 0, 0], abs=1e-15
    )


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nc4_counts_disagreement_with_the_nearest_class_mean(offset):
    features, _, labels, head = random_split(spread=2.0, dtype=np.float32)
    features = features + np.float32(offset)
    means = np.stack([features[labels == c].astype(np.float64).mean(0) for c in range(5)])
    nearest = np.argmin(
        [[np.sum((x - m) ** 2) for m in means] for x in features.astype(np.float64)], axis=1
    )
    outputs = np.eye(5)[nearest]
    assert measured(features, outputs, labels, head)["nc4"] == 0
    wrong = np.arange(len(labels)) % 6 == 0
    outputs[wrong] = np.roll(outputs[wrong], 1, axis=1)
    assert measured(features, outputs, labels, head)["nc4"] == pytest.approx(1 / 6)
    assert 0.1 < np.mean(nearest != labels) < 0.9  # so that accuracy could not pass for nc4


def test_head_geometry_equals_its_definition():
    head = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    features, outputs, labels, _ = random_split(num_classes=5)
    got = measured(features, outputs, labels, head)
    expected = oracle_geometry(head, "head") | {"nc3_floor": oracle_nc3_floor(head)}
    assert_equal({name: np.asarray(value) for name, value in got.items()}, expected, 1e-12)


@jax.jit
@jax.vmap
def nc3s_and_floor(head, means):
    """(nc3, nc3_centered, nc3_floor) of a head and class means."""
    centred, centred_head = (rows - rows.mean(0, keepdims=True) for rows in (means, head))
    duality = (collapse.self_duality(rows, centred) for rows in (head, centred_head))
    return *duality, collapse.nc3_floor(head, jnp.ones(len(head)))


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (3, 7), (10, 4)])
def test_no_class_means_bring_nc3_below_its_floor_and_the_centred_head_attains_it(num_classes, dim):
    rng = np.random.default_rng(0)
    # From a head that is centred to one that has nothing else.
    common = 10 ** rng.uniform(-8, 3, (1000, 1, 1)) * rng.standard_normal((1000, 1, dim))
    head = rng.standard_normal((1000, num_classes, dim)) + common
    share = np.linalg.norm(head - head.mean(1, keepdims=True), axis=(1, 2)) / np.linalg.norm(
        head, axis=(1, 2)
    )
    others = rng.standard_normal(head.shape)
    with jax.enable_x64(True):
        for means in (others, head + 0.1 * others, head):
            nc3, centred, floor = (np.asarray(value) for value in nc3s_and_floor(head, means))
            assert (floor >= 0).all()
            # Heads a thousand times their centred part lose three of float64's digits in being
            # centred.
            assert (floor <= nc3 + 1e-10).all()
            np.testing.assert_allclose(1 - nc3 / 2, (1 - centred / 2) * share, atol=1e-10)
    np.testing.assert_allclose(nc3, floor, rtol=1e-6, atol=1e-10)  # the means were the head


def test_the_floor_is_that_of_the_frames_known():
    heads = 3 * np.eye(10, 12), simplex_etf(10, 12), np.ones((10, 12))
    with jax.enable_x64(True):
        *_, floors = nc3s_and_floor(np.stack(heads), np.stack([np.eye(10, 12)] * 3))
    np.testing.assert_allclose(floors, [2 - 2 * np.sqrt(0.9), 0, 2], rtol=1e-14, atol=1e-28)


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [5, pytest.param(9, marks=pytest.mark.slow)])
def test_pairs_of_classes_taken_a_few_rows_at_a_time_give_the_same(num_classes, monkeypatch):
    features, outputs, labels, head = random_split(num_classes=num_classes)
    expected = oracle_split(features, outputs, labels, head) | oracle_geometry(head, "head")
    expected["nc3_floor"] = oracle_nc3_floor(head)
    # Two rows at a time of an odd number.
    monkeypatch.setattr(collapse, "_MOST_PAIRS", 2 * num_classes)
    with jax.enable_x64(True):
        got = measured(features, outputs, labels, head, dtype=np.float64, f=two_passes)
    assert_equal(got, expected, 1e-11, atol=1e-12)
