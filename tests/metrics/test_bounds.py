"""bounds against float64 NumPy, on random instances that are no critical points, and at the
geometries that are theirs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.cli.train import load_config
from ncjax.metrics import bounds, collapse, theory
from ncjax.metrics.statistics import class_statistics
from ncjax.metrics.vocabulary import Quantities, assemble
from ncjax.plan import prepare
from ncjax.runs import loop
from ncjax.storage import history as histories
from tests.helpers import (
    ROOT,
    oracle_bounds,
    oracle_nc4_bounds,
    oracle_row_space_bound,
    simplex_etf,
)

# Each bound, and what it is a bound on.
BOUNDED = {
    "nc1_bound": "nc1",
    "nc2_bound_etf": "etf_error",
    "nc2_bound_equinorm": "nc2_equinorm_means",
    "nc2_bound_equiangular": "nc2_equiangular_means",
    "nc3_bound": "nc3",
    "nc3_centered_bound": "nc3_centered",
    "nc4_bound": "nc4",
    "nc4_bound_nc1": "nc4",
    "nc1_row_space_bound": "nc1_row_space",
}
NAMES = [*BOUNDED, *BOUNDED.values(), "nc3_floor", "fit_loss_floor"]
SHARES = [f"nc2_share_{cause}" for cause in ("asymmetry", "within", "gradient", "outputs")]


def random_instances(num_classes, count, seed, *, bias=True, centered=False):
    """Features, head, bias and lambda of `count` networks that are near to collapse or far from
    it: the head is between noise and the one that a ridge regression of the features finds.
    """
    rng = np.random.default_rng(seed)
    per_class, dim = 4, num_classes + 3
    labels = np.repeat(np.arange(num_classes), per_class)
    targets = np.eye(num_classes)[labels] - (1 / num_classes if centered else 0)
    scatter, unlike, noise = 10.0 ** rng.uniform(-3, 0, (3, count, 1, 1))
    decay = 10.0 ** rng.uniform(-4, -1, count)
    means = simplex_etf(num_classes, dim)[None] + unlike * rng.standard_normal(
        (count, num_classes, dim)
    )
    means += rng.uniform(0, 2, (count, 1, 1)) * rng.standard_normal((count, 1, dim))
    h = means[:, labels] + scatter * rng.standard_normal((count, len(labels), dim))
    second = h.mT @ h / len(labels) + decay[:, None, None] * np.eye(dim)
    head = np.linalg.solve(second, h.mT @ targets[None] / len(labels)).mT
    head += noise * rng.standard_normal(head.shape) * np.abs(head).mean((1, 2), keepdims=True)
    offset = rng.uniform(-1, 1, (count, num_classes)) / num_classes if bias else None
    return h, labels, head, offset, decay, targets


def statistics_of(h, labels, head, offset, decay, targets):
    """The statistics of one network; what `class_statistics` knows of one-hot targets alone is
    replaced.
    """
    num_classes = head.shape[0]
    logits = h @ head.T + (0 if offset is None else offset[None])
    found = class_statistics(h, labels, num_classes, head, None, logits, decay)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=h.dtype)
    residuals = targets - logits
    mean_residuals = one_hot.T @ residuals / found.examples[:, None]
    spectrum, _ = collapse.span(head, 1e-12, min(head.shape))
    return dataclasses.replace(
        found,
        mean_residuals=mean_residuals,
        fit_gradient=-residuals.T @ h / len(h),
        residual_dot_logit=jnp.mean(jnp.sum(residuals * (h @ head.T), 1)),
        head_spectrum=spectrum,
    )


def measured(instances):
    """The metrics of all instances, stacked, and the deviations of their Gram matrices."""
    h, labels, head, offset, decay, targets = instances

    def one(h, head, offset, decay):
        quantities = Quantities(statistics_of(h, labels, head, offset, decay, targets))
        found = assemble(quantities, [*NAMES, *SHARES, "accuracy"])
        deviations = bounds.gram_deviations(
            quantities.budget_terms,
            quantities.centred,
            quantities.logit_part.rest,
            quantities.t,
            decay,
        )
        gram = quantities.centred @ quantities.centred.T
        num_classes = len(gram)
        across = jnp.eye(num_classes) - 1 / num_classes
        left = gram - jnp.trace(gram) / (num_classes - 1) * across - deviations.sum(0)
        residuals = targets - h @ head.T - (0 if offset is None else offset[None])
        identity = jnp.abs(left).max() / jnp.abs(gram).max()
        return found | {"identity": identity, "fit_loss": jnp.mean(jnp.sum(residuals**2, 1)) / 2}

    with jax.enable_x64(True):
        labels, targets = jnp.asarray(labels), jnp.asarray(targets)
        found = jax.jit(jax.vmap(one))(h, head, offset, decay)
        return {name: np.asarray(value) for name, value in found.items()}


def assert_bounded(found):
    """Fails if a bound is below what it bounds by more than rounding, or if none is finite."""
    for bound, name in BOUNDED.items():
        finite = np.isfinite(found[bound])
        assert finite.mean() > 0.3, bound
        excess = (found[name] - found[bound])[finite]
        assert excess.max() <= 1e-9 * np.maximum(1, found[name][finite]).max(), bound
    assert (found["nc3_floor"] <= found["nc3"] + 1e-12).all()
    assert (found["fit_loss_floor"] <= found["fit_loss"] * (1 + 1e-12)).all()
    by_floor = (1 - found["nc3_centered"] / 2) * (1 - found["nc3_floor"] / 2)
    np.testing.assert_allclose(1 - found["nc3"] / 2, by_floor, atol=1e-10)
    defined = np.isfinite(found["nc2_bound_etf"])
    assert found["identity"][defined].max() < 1e-10
    assert not found["nc4"][found["nc4_bound"] == 0].any()


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "bias", "centered"), [(4, True, False)])
def test_no_bound_is_violated(num_classes, bias, centered):
    assert_bounded(measured(random_instances(num_classes, 500, 0, bias=bias, centered=centered)))


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_no_bound_is_violated_by_ten_thousand_instances(num_classes, bias, centered):
    """20 settings of 500."""
    assert_bounded(measured(random_instances(num_classes, 500, 1, bias=bias, centered=centered)))


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "centered"), [(True, False), (False, True)])
def test_every_bound_equals_its_definition(bias, centered):
    instances = random_instances(5, 3, 2, bias=bias, centered=centered)
    h, labels, head, offset, decay, targets = instances
    found = measured(instances)
    for i in range(len(h)):
        logits = h[i] @ head[i].T + (0 if offset is None else offset[i])
        expected = oracle_bounds(h[i], targets - logits, labels, head[i], decay[i])
        expected |= oracle_nc4_bounds(h[i], logits, labels, head[i])
        expected["nc1_row_space_bound"] = oracle_row_space_bound(h[i], labels, head[i])
        for name in expected.keys() & found.keys():
            np.testing.assert_allclose(found[name][i], expected[name], rtol=1e-8, err_msg=name)


@pytest.mark.slow
def test_no_committed_history_violates_a_bound():
    """Norms and shares of the budget give N2 of NC3; the other bounds need matrices, which only
    younger histories have seen. Of a network that is put out, squares have left float32.
    """
    bounded = 0
    for path in sorted((ROOT / "experiments").rglob("*.nc")):
        one = histories.load(path)
        train = one.sel(split="train").where(~histories.extinct(one))
        for bound in BOUNDED.keys() & set(one):
            excess = train[BOUNDED[bound]] - train[bound]
            assert not (excess > 1e-5 * np.maximum(1, train[bound])).any(), path.stem
        whole = np.sqrt(train["weight_norm_sq"].isel(layer=-1)) * train["effective_decay"]
        across_sq = [
            train[f"budget_{term}_norm"] ** 2 - (train[f"budget_{term}"] * whole) ** 2
            for term in ("mean", "asymmetry", "within", "gradient")
        ]
        sine = sum(np.sqrt(np.maximum(x, 0)) for x in across_sq) / train["budget_theorem_norm"]
        known = (train["budget_theorem"] > 0) & (train["epsilon"] + train["delta"] > 0) & (sine < 1)
        excess = train["nc3"] - (2 - 2 * np.sqrt(1 - np.minimum(sine, 1) ** 2))
        assert not (excess.where(known) > 1e-4).any(), path.stem
        assert not (train["nc3"] < train["nc3_floor"] - 1e-5).any(), path.stem
        bounded += int(known.sum())
    assert bounded > 100


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_a_simplex_etf_has_radius_one_over_root_two(num_classes):
    with jax.enable_x64(True):
        radii = collapse.radii_sq(3 * jnp.asarray(simplex_etf(num_classes, num_classes + 1)))
    np.testing.assert_allclose(radii, 0.5, rtol=1e-12)


def test_class_means_that_coincide_leave_no_ball():
    centred = np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    radii = collapse.radii_sq(centred)
    assert radii[:2].tolist() == [0, 0]
    assert radii[2] > 0


@pytest.mark.slow
def test_the_bounds_are_0_at_the_theorem_itself():
    """A simplex ETF, its dual head and symmetric outputs: nothing deviates, nothing is left."""
    etf = simplex_etf(4, 6)
    decay = np.array([0.01])
    labels = np.repeat(np.arange(4), 3)
    h = etf[labels][None]
    across = np.eye(4) - 1 / 4
    # lambda W = t/C Mdot^T with t = 1 - a, W Mdot = a P: a = g C/(C-1) for W = g Mdot^T.
    gain = 1 / (4 * 0.01 + 4 / 3)
    found = measured((h, labels, gain * etf[None], None, decay, across[labels]))
    for name in ("nc3_bound", "nc3_centered_bound", "nc2_bound_etf", "nc2_bound_equiangular"):
        assert found[name][0] < 1e-12, name
    assert found["nc4_bound"][0] == 0
    assert found["nc1_bound"][0] < 1e-24


def test_interpolation_at_a_positive_decay_has_an_equilibrium_residual_of_exactly_1():
    """No residual, no gradient of the fit term: lambda W is all that is left."""
    with jax.enable_x64(True):
        weight = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
        got = theory.equilibrium_residual(weight, jnp.zeros_like(weight), jnp.asarray(0.01))
        floor = bounds.fit_loss_floor(jnp.asarray(0.0), jnp.asarray(1.0))
    assert float(got) == 1
    assert float(floor) == 0


@pytest.mark.slow
def test_on_digits_at_1e_3_the_bounds_are_tight(tmp_path):
    """The README's networks, one seed."""
    config = load_config("digits")
    config.sweep.weight_decay, config.sweep.seed = (1e-3,), (0,)
    final = loop.train(prepare(config, tmp_path / "run")).isel(epoch=-1).sel(split="train")
    for bound, most in {"nc2_bound_etf": 1.2, "nc3_centered_bound": 2.0, "nc1_bound": 3.0}.items():
        ratio = float(final[bound].squeeze() / final[BOUNDED[bound]].squeeze())
        assert 1 <= ratio <= most, bound
