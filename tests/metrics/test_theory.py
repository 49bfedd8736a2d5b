"""theory against hand-computed numbers, explicit matrices, and the gradient of networks written
here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.metrics import closed_forms, theory
from ncjax.metrics.linalg import symmetric_part


def numbers(*values):
    return tuple(jnp.asarray(value, jnp.float64) for value in values)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_equilibrium_residual_by_hand():
    weight, gradient = numbers([[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.5], [0.0, 0.0]])
    # lambda W has norm 0.5; lambda W + G has entries 0.3, 0.5, 0.4.
    expected = np.sqrt(0.3**2 + 0.5**2 + 0.4**2) / 0.5
    assert float(theory.equilibrium_residual(weight, gradient, *numbers(0.1))) == pytest.approx(
        expected, rel=1e-15
    )


def test_equilibrium_residual_vanishes_where_the_fit_gradient_balances_decay():
    (weight,) = numbers(np.random.default_rng(0).standard_normal((3, 4)))
    assert float(theory.equilibrium_residual(weight, -0.25 * weight, *numbers(0.25))) == 0


def test_norm_target_and_relaxation_time_by_hand():
    assert float(theory.norm_target(*numbers(0.3, 0.01))) == pytest.approx(30, rel=1e-15)
    flow_time, weight_decay = (
        np.array([[1.0, 10.0], [100.0, 1000.0]]),
        np.array([[1e-3, 1e-3], [5e-2, 5e-2]]),
    )
    times = theory.relaxation_time(flow_time, weight_decay)
    np.testing.assert_allclose(times, [[2e-3, 2e-2], [10.0, 100.0]], rtol=1e-15)


def test_without_decay_every_equilibrium_quantity_is_undefined():
    weight, gradient, zero, one = numbers(np.ones((2, 2)), np.ones((2, 2)), 0.0, 1.0)
    assert np.isnan(float(theory.equilibrium_residual(weight, gradient, zero)))
    assert np.isnan(float(theory.norm_target(one, zero)))
    times = theory.relaxation_time(np.array([5.0, 5.0]), np.array([0.0, 0.1]))
    np.testing.assert_array_equal(times, [np.nan, 1.0])


def lemma2_terms(head_bias, hidden_bias=0.0):
    """The arguments of `lemma2_residual` for a random ReLU net, from the gradient of the fit
    term alone.
    """
    rng = np.random.default_rng(0)
    num_classes, weight_decay = 4, 0.03
    x = jnp.asarray(rng.standard_normal((20, 5)))
    y = jnp.asarray(np.eye(num_classes)[np.arange(20) % num_classes])
    weights = [
        jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 7), (7, 6), (6, num_classes))
    ]
    bias = (
        jnp.asarray(rng.standard_normal(num_classes))
        if head_bias != "none"
        else jnp.zeros(num_classes)
    )

    def outputs(weights):
        h = x
        for w in weights[:-1]:
            h = jnp.maximum(h @ w + hidden_bias, 0)
        return h @ weights[-1] + bias[None]

    def fit(weights):
        return jnp.sum((y - outputs(weights)) ** 2) / (2 * len(x))

    gradients = jax.grad(fit)(weights)
    residual = y - outputs(weights)
    norms_sq = jnp.stack([jnp.sum(w**2) for w in weights])
    bias_penalty = (
        weight_decay / 2 * jnp.sum(bias**2) if head_bias == "decayed" else jnp.asarray(0.0)
    )
    return {
        "loss": fit(weights) + weight_decay / 2 * jnp.sum(norms_sq) + bias_penalty,
        "weight_norms_sq": norms_sq,
        "weight_dot_gradient": jnp.stack(
            [jnp.sum(w * g) for w, g in zip(weights, gradients, strict=True)]
        ),
        "residual_dot_target": jnp.sum(residual * (y - bias[None])) / len(x),
        "bias_penalty": bias_penalty,
        "weight_decay": jnp.asarray(weight_decay),
    }


@pytest.mark.slow
@pytest.mark.parametrize("head_bias", ["none", "free", "decayed"])
def test_lemma_2_holds_at_any_moment_of_training(head_bias):
    assert float(theory.lemma2_residual(**lemma2_terms(head_bias))) < 1e-14


@pytest.mark.parametrize(
    "term",
    ["loss", "weight_norms_sq", "weight_dot_gradient", "residual_dot_target", "bias_penalty"],
)
def test_lemma_2_notices_each_wrong_term(term):
    terms = lemma2_terms("decayed")
    assert float(theory.lemma2_residual(**{**terms, term: 1.01 * terms[term]})) > 1e-6


def test_lemma_2_fails_for_a_net_with_hidden_biases():
    assert float(theory.lemma2_residual(**lemma2_terms("none", hidden_bias=0.5))) > 1e-3


# Of a network (W_2 s(W_1 x))^2 below a head, and of one that is no power of W_2.
@pytest.mark.parametrize(
    ("power", "degrees"),
    [
        (2, (2.0, 2.0, 1.0)),
        pytest.param(None, (1.0, float("nan"), 1.0), marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("float64")
def test_lemma_2_holds_for_layers_of_every_degree_and_decay(power, degrees):
    rng = np.random.default_rng(0)
    factors, weight_decay = np.array([2.0, 0.5, 3.0]), 0.03
    x, y = jnp.asarray(rng.standard_normal((20, 5))), jnp.asarray(np.eye(4)[np.arange(20) % 4])
    weights = [jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 6), (6, 6), (6, 4))]

    def outputs(weights):
        h = jnp.maximum(x @ weights[0], 0)
        update = h @ weights[1]
        return (update**power if power else h + jnp.maximum(update, 0)) @ weights[2]

    def fit(weights):
        return jnp.sum((y - outputs(weights)) ** 2) / (2 * len(x))

    gradients, residual = jax.grad(fit)(weights), y - outputs(weights)
    decayed = jnp.asarray(factors) * jnp.stack([jnp.sum(w**2) for w in weights])
    terms = {
        "loss": fit(weights) + weight_decay / 2 * jnp.sum(decayed),
        "weight_norms_sq": decayed,
        "weight_dot_gradient": jnp.stack(
            [jnp.sum(w * g) for w, g in zip(weights, gradients, strict=True)]
        ),
        "residual_dot_target": jnp.sum(residual * y) / len(x),
        "bias_penalty": jnp.asarray(0.0),
        "weight_decay": jnp.asarray(weight_decay),
    }
    assert float(theory.lemma2_residual(**terms, degrees=degrees)) < 1e-14
    assert float(theory.lemma2_residual(**terms, degrees=(1.0, 1.0, 1.0))) > 1e-3


def test_normalized_margin_of_layers_of_every_degree():
    """Of 3 W_1^2 W_2 with scalar weights: 3, whatever they are."""
    logits = 3 * 2.0**2 * 5.0 * (np.eye(3) - 1 / 3)
    part = symmetric_part(*numbers(logits))
    norms_sq = np.array([2.0**2, 5.0**2])
    assert float(theory.normalized_margin(part, *numbers(norms_sq), (2.0, 1.0))) == pytest.approx(3)


def average(num_classes):
    return np.full((num_classes, num_classes), 1 / num_classes)


def across(num_classes):
    return np.eye(num_classes) - average(num_classes)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_lemma_1_collapse_without_bias_costs_at_least_half_of_1_over_c(num_classes):
    alpha = np.linspace(0, 1.5, 301)
    outputs = alpha[:, None, None] * num_classes / (num_classes - 1) * across(num_classes)
    explicit = np.sum((np.eye(num_classes) - outputs) ** 2, axis=(1, 2)) / (2 * num_classes)
    np.testing.assert_allclose(theory.collapsed_loss(alpha, num_classes), explicit, rtol=1e-13)
    best = (num_classes - 1) / num_classes
    assert theory.collapsed_loss(np.array([best]), num_classes) == pytest.approx(
        1 / (2 * num_classes), rel=1e-14
    )
    assert theory.collapsed_loss(alpha, num_classes).min() >= 1 / (2 * num_classes) - 1e-15
    # What it lacks is the sum of the outputs alone: a bias of 1/C interpolates, and so it does
    # centred targets.
    np.testing.assert_allclose(
        best * num_classes / (num_classes - 1) * across(num_classes) + 1 / num_classes,
        np.eye(num_classes),
        atol=1e-15,
    )


def symmetric_problem(a, t, s, q, *, num_classes=4, dim=6, weight_decay=0.02, offset=0.0):
    """W, class means (C, p), W M = a (I - J/C) + s J/C and Rbar = t (I - J/C) + q J/C, with lambda
    W = Rbar M^T/C.

    W W^T = Rbar (W M)^T/(lambda C) has a symmetric root; where t or q is 0, so is W there, and M is
    free: `offset`.
    """
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0][:num_classes]
    strengths = [np.sqrt(x / (weight_decay * num_classes)) for x in (a * t, s * q)]
    head = (strengths[0] * across(num_classes) + strengths[1] * average(num_classes)) @ basis
    scale = weight_decay * num_classes
    of_means = scale * strengths[0] / t, scale * strengths[1] / q if q else offset
    means = (of_means[0] * across(num_classes) + of_means[1] * average(num_classes)) @ basis
    logits, residuals = head @ means.T, t * across(num_classes) + q * average(num_classes)
    np.testing.assert_allclose(weight_decay * head, residuals @ means / num_classes, atol=1e-14)
    return head, means, logits, residuals, weight_decay


def solve(logits, residuals, weight_decay):
    parts = (symmetric_part(matrix) for matrix in numbers(logits, residuals))
    return [
        float(x) for x in theory.symmetric_solution(*parts, len(logits), *numbers(weight_decay))
    ]


# a, t, s, q of W M and Rbar; the square loss has a = 1 - t, and s = 1 - q without a bias.
SOLUTIONS = {
    "quasi_interpolation": {"a": 0.7, "t": 0.3, "s": 0.0, "q": 0.0, "offset": 2.0},
    "orthogonal_frame": {"a": 0.7, "t": 0.3, "s": 0.7, "q": 0.3},
    "generic": {"a": 0.8, "t": 0.2, "s": 0.95, "q": 0.05},
    "larger_sum": {"a": 0.5, "t": 0.1, "s": 0.6, "q": 0.4},
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_symmetric_solution_equals_explicit_matrices_at_equilibrium(name):
    head, means, logits, residuals, weight_decay = symmetric_problem(**SOLUTIONS[name])
    norm_sq, cosine, predicted = solve(logits, residuals, weight_decay)
    centred = means - means.mean(0)
    assert norm_sq == pytest.approx(np.sum(head**2), rel=1e-12)
    rows = head / np.linalg.norm(head, axis=1, keepdims=True)
    off_diagonal = (rows @ rows.T)[~np.eye(4, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, cosine, atol=1e-12)
    nc3 = np.sum((head / np.linalg.norm(head) - centred / np.linalg.norm(centred)) ** 2)
    assert predicted == pytest.approx(nc3, abs=1e-12)
    if name == "quasi_interpolation":
        assert (cosine, predicted) == (
            pytest.approx(-1 / 3, rel=1e-12),
            pytest.approx(0, abs=1e-12),
        )
    if name == "orthogonal_frame":
        assert (cosine, predicted) == (
            pytest.approx(0, abs=1e-12),
            pytest.approx(2 - 2 * np.sqrt(3 / 4), rel=1e-12),
        )


@pytest.mark.parametrize("seed", range(2))
def test_the_symmetric_solution_looks_only_at_what_treats_all_classes_alike(seed):
    _, _, logits, residuals, weight_decay = symmetric_problem(**SOLUTIONS["generic"])
    asymmetry = np.asarray(
        symmetric_part(*numbers(np.random.default_rng(seed).standard_normal((4, 4)))).rest
    )
    expected = solve(logits, residuals, weight_decay)
    assert solve(logits + asymmetry, residuals - asymmetry, weight_decay) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    ("a", "t", "s", "q", "weight_decay", "exists"),
    [
        (0.7, 0.3, 0.7, 0.3, 0.0, False),  # nothing is balanced without decay
        (-0.1, 0.3, 0.7, 0.3, 0.02, False),
        (0.0, 0.3, 0.7, 0.3, 0.02, False),
        (0.7, -0.3, 0.7, 0.3, 0.02, False),
        (0.7, 0.3, 0.7, -0.3, 0.02, False),
        (0.7, 0.3, 0.7, -0.0091, 0.02, False),  # w_1 = -0.00637 against -1% of 3 w_p = -0.0063
        (0.7, 0.3, 0.7, -0.0089, 0.02, True),
    ],
)
def test_where_there_is_no_symmetric_solution_all_of_it_is_nan(a, t, s, q, weight_decay, exists):
    got = solve(a * across(4) + s * average(4), t * across(4) + q * average(4), weight_decay)
    assert np.isfinite(got).tolist() == [exists] * 3
    if exists:  # a sum that vanishes up to the rest of training counts as 0
        assert got == pytest.approx([3 * a * t / (4 * weight_decay), -1 / 3, 0], abs=1e-12)


def test_the_theorem_is_exact_under_symmetric_quasi_interpolation():
    head, means, _, residuals, weight_decay = symmetric_problem(**SOLUTIONS["quasi_interpolation"])
    epsilon, centred = np.trace(residuals) / 4, means - means.mean(0)

    def residual(head, weight_decay=weight_decay):
        return float(theory.theorem_residual(*numbers(epsilon, head, centred, weight_decay)))

    assert residual(head) < 1e-13
    assert residual(2 * head) == pytest.approx(0.5, rel=1e-12)  # ||2W - W||/||2W||
    assert residual(-head) == pytest.approx(2, rel=1e-12)
    assert np.isnan(residual(head, 0.0))


def test_the_theorem_misses_an_orthogonal_frame_by_the_closed_form():
    """W's sum it takes for 0, and epsilon/(C-1) for t/C: off by 1/C of W's differences, and by
    all of W's sum.
    """
    head, means, _, residuals, weight_decay = symmetric_problem(**SOLUTIONS["orthogonal_frame"])
    got = theory.theorem_residual(
        *numbers(np.trace(residuals) / 4, head, means - means.mean(0), weight_decay)
    )
    # t = epsilon here; C epsilon/((C-1) t) = 4/3 times the differences, whose squared norm is 3/4
    # of the whole.
    assert float(got) == pytest.approx(np.sqrt(3 / 4 * (1 / 3) ** 2 + 1 / 4), rel=1e-12)


def two_layer_minimum(inputs, targets, weight_decay):
    """Head (C, k) and class means (C, k) of the global minimum of a two-layer linear net, one
    example in each class.

    1/(2C) ||Y - W_2 W_1 X||^2 + lambda/2 (||W_1||^2 + ||W_2||^2), least over factors of Z = W_2 W_1
    = U S V^T at W_2 = U S^{1/2}, W_1 = S^{1/2} V^T, is convex in Z: accelerated proximal gradient
    descent, in float64.
    """
    num_classes = len(targets)
    step = num_classes / np.linalg.norm(inputs, 2) ** 2
    product = ahead = np.zeros((num_classes, len(inputs)))
    momentum = 1.0
    for _ in range(4000):
        moved = ahead + step / num_classes * (targets - ahead @ inputs) @ inputs.T
        u, s, vt = np.linalg.svd(moved, full_matrices=False)
        newest = u * np.maximum(s - step * weight_decay, 0) @ vt
        grown = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = newest + (momentum - 1) / grown * (newest - product)
        product, momentum = newest, grown
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    return u * np.sqrt(s), (np.sqrt(s)[:, None] * vt @ inputs).T


@pytest.mark.parametrize("seed", range(2))
def test_the_theorem_does_not_become_exact_as_decay_goes_to_0(seed):
    """No scatter, no bias to miss, the global minimum: asymmetry alone stands against it, and
    does not shrink.
    """
    inputs = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))[0] * [
        0.5,
        0.8,
        1.2,
        2.0,
    ]
    inputs = inputs @ np.linalg.qr(np.random.default_rng(seed + 9).standard_normal((4, 4)))[0]
    targets = across(4)
    errors, nc3s = [], []
    for weight_decay in (1e-2, 1e-3, 1e-4):
        head, means = two_layer_minimum(inputs, targets, weight_decay)
        residuals, centred = targets - head @ means.T, means - means.mean(0)
        gradient = weight_decay * head - residuals @ means / 4
        assert np.linalg.norm(gradient) < 1e-6 * weight_decay * np.linalg.norm(head)
        _, shares = account(
            head,
            weight_decay,
            mean_residuals=residuals.T,
            means=means,
            covariance=0 * head,
            gradient=gradient,
        )
        assert abs(shares["budget_mean"]) < 1e-6
        whole = weight_decay * np.linalg.norm(head)
        assert shares["budget_asymmetry_norm"] > 0.2 * whole
        errors.append(
            float(
                theory.theorem_residual(
                    *numbers(np.trace(residuals) / 4, head, centred, weight_decay)
                )
            )
        )
        nc3s.append(np.sum((head / np.linalg.norm(head) - centred / np.linalg.norm(centred)) ** 2))
    s = np.linalg.svd(targets @ np.linalg.inv(inputs), compute_uv=False)[:3]
    spread = s.mean() * (1 / s).mean()
    assert spread > 1.05
    assert errors[-1] == pytest.approx(np.sqrt(spread - 1), rel=1e-3)
    assert nc3s[-1] == pytest.approx(2 - 2 / np.sqrt(spread), rel=1e-3)
    assert abs(errors[-1] - errors[-2]) < 0.2 * abs(errors[-2] - errors[-3]) < 0.01


@functools.cache
def budget_problem():
    """A head on random features of a random ReLU layer: G by automatic differentiation, K by a
    loop over examples.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        num_classes, weight_decay = 4, 0.03
        labels = np.arange(20) % num_classes
        features = np.maximum(rng.standard_normal((20, 6)), 0)
        head = rng.standard_normal((num_classes, 6))
        y = jnp.asarray(np.eye(num_classes)[labels])

        def loss(head):
            outputs = jnp.asarray(features) @ head.T
            return jnp.sum((y - outputs) ** 2) / (2 * len(y)) + weight_decay / 2 * jnp.sum(head**2)

        gradient = np.asarray(jax.grad(loss)(jnp.asarray(head)))
    residuals = np.eye(num_classes)[labels] - features @ head.T
    means, mean_residuals = (
        np.stack([rows[labels == c].mean(0) for c in range(num_classes)])
        for rows in (features, residuals)
    )
    covariance, within = np.zeros((num_classes, 6)), np.zeros((6, 6))
    for h, r, c in zip(features, residuals, labels, strict=True):
        covariance += np.outer(r - mean_residuals[c], h - means[c]) / len(labels)
        within += np.outer(h - means[c], h - means[c]) / len(labels)
    np.testing.assert_allclose(covariance, -head @ within, atol=1e-14)  # as it is at square loss
    arguments = {
        "mean_residuals": mean_residuals,
        "means": means,
        "covariance": covariance,
        "gradient": gradient,
    }
    return arguments, head, weight_decay


def account(head, weight_decay, **arguments):
    terms = theory.budget(**{name: jnp.asarray(value) for name, value in arguments.items()})
    whole = theory.budget_account(terms, *numbers(head, weight_decay))
    return terms, {name: float(value) for name, value in whole.items()}


def test_the_budget_is_an_identity_at_any_moment_of_training():
    arguments, head, weight_decay = budget_problem()
    terms, shares = account(head, weight_decay, **arguments)
    np.testing.assert_allclose(
        sum(np.asarray(term) for term in terms), weight_decay * head, atol=1e-14
    )
    assert shares["budget_residual"] < 1e-14
    assert sum(shares[f"budget_{name}"] for name in terms._fields) == pytest.approx(1, rel=1e-12)
    assert all(np.linalg.norm(term) > 0.01 for term in terms)  # none is there in vain


def test_every_term_of_the_budget_equals_its_definition():
    arguments, head, weight_decay = budget_problem()
    terms, shares = account(head, weight_decay, **arguments)
    # Classes as columns, and as rows.
    rbar, means = (
        arguments["mean_residuals"].T,
        arguments["means"],
    )
    t, q = np.sum(rbar * across(4)) / 3, np.sum(rbar * average(4))
    expected = {
        "theorem": t / 4 * (means - means.mean(0)),
        "mean": q / 4 * np.outer(np.ones(4), means.mean(0)),
        "asymmetry": (rbar - t * across(4) - q * average(4)) @ means / 4,
        "within": arguments["covariance"],
        "gradient": arguments["gradient"],
    }
    for name, term in expected.items():
        np.testing.assert_allclose(np.asarray(getattr(terms, name)), term, atol=1e-15, err_msg=name)
        share = np.sum(term * head) / (weight_decay * np.sum(head**2))
        assert shares[f"budget_{name}"] == pytest.approx(share, rel=1e-12), name
        assert shares[f"budget_{name}_norm"] == pytest.approx(np.linalg.norm(term), rel=1e-12), name


@pytest.mark.parametrize(
    "wrong", ["mean_residuals", "means", "covariance", "gradient", "head", "weight_decay"]
)
def test_the_budget_notices_each_wrong_term(wrong):
    arguments, head, weight_decay = budget_problem()
    everything = arguments | {"head": head, "weight_decay": weight_decay}
    _, shares = account(**everything | {wrong: 1.01 * everything[wrong]})
    assert shares["budget_residual"] > 1e-4


def test_the_budget_notices_residuals_with_classes_as_columns():
    arguments, head, weight_decay = budget_problem()
    _, shares = account(
        head, weight_decay, **arguments | {"mean_residuals": arguments["mean_residuals"].T}
    )
    assert shares["budget_residual"] > 1e-2


def test_without_decay_shares_are_undefined_and_the_identity_stands():
    arguments, head, weight_decay = budget_problem()
    arguments = arguments | {"gradient": arguments["gradient"] - weight_decay * head}
    terms, shares = account(head, 0.0, **arguments)
    assert {name for name, value in shares.items() if np.isnan(value)} == {
        f"budget_{name}" for name in terms._fields
    }
    assert shares["budget_residual"] < 1e-14


def test_the_other_terms_bound_how_far_the_theorem_is_off():
    """lambda ||W - W_theorem|| <= |q|/(C (C-1)) ||Mdot|| + the four other norms: t/C =
    epsilon/(C-1) - q/(C (C-1)).
    """
    arguments, head, weight_decay = budget_problem()
    terms, shares = account(head, weight_decay, **arguments)
    means, rbar = arguments["means"], arguments["mean_residuals"]
    epsilon, centred = np.trace(rbar) / 4, means - means.mean(0)
    theorem = theory.theorem_residual(*numbers(epsilon, head, centred, weight_decay))
    q = rbar.sum() / 4
    predicted = epsilon / 3 * centred
    np.testing.assert_allclose(np.asarray(terms.theorem), predicted - q / 12 * centred, atol=1e-15)
    others = sum(
        shares[f"budget_{name}_norm"] for name in ("mean", "asymmetry", "within", "gradient")
    )
    bound = (abs(q) / 12 * np.linalg.norm(centred) + others) / (weight_decay * np.linalg.norm(head))
    assert float(theorem) <= bound


def test_the_bound_is_met_where_one_term_alone_disturbs_the_theorem():
    head, means, _, residuals, weight_decay = symmetric_problem(**SOLUTIONS["quasi_interpolation"])
    disturbance = np.random.default_rng(0).standard_normal(head.shape)
    arguments = {
        "mean_residuals": residuals,
        "means": means,
        "covariance": 0 * head,
        "gradient": disturbance,
    }
    moved = head + disturbance / weight_decay
    _, shares = account(moved, weight_decay, **arguments)
    assert shares["budget_residual"] < 1e-13
    theorem = theory.theorem_residual(
        *numbers(np.trace(residuals) / 4, moved, means - means.mean(0), weight_decay)
    )
    bound = shares["budget_gradient_norm"] / (weight_decay * np.linalg.norm(moved))
    assert float(theorem) == pytest.approx(bound, rel=1e-10)


def test_normalized_margin_is_that_of_the_network_with_all_norms_one():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in ((4, 5), (5, 3), (3, 3))]
    norms_sq = np.array([np.sum(w**2) for w in weights])

    def margin(weights):
        logits = np.linalg.multi_dot(weights)[:3]
        return np.sum(logits * across(3)) / 2

    part = symmetric_part(*numbers(np.linalg.multi_dot(weights)[:3]))
    got = float(theory.normalized_margin(part, *numbers(norms_sq)))
    assert got == pytest.approx(margin([w / np.linalg.norm(w) for w in weights]), rel=1e-12)
    assert abs(got) > 1e-3


def test_mode_eigenvalues_are_the_margin_and_the_sum_of_a_symmetric_solution_in_descending_order():
    rng = np.random.default_rng(0)
    logits = np.stack([0.7 * across(4) + s * average(4) for s in (0.2, 0.9)])
    skew = rng.standard_normal((4, 4))
    got = theory.mode_eigenvalues(logits + (skew - skew.T))  # which the symmetric part does not see
    np.testing.assert_allclose(got, [[0.7, 0.7, 0.7, 0.2], [0.9, 0.7, 0.7, 0.7]], atol=1e-14)


def test_mode_eigenvalues_of_a_run_that_is_not_finite_are_nan_and_leave_the_others_alone():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 4, 4))
    expected = np.linalg.eigvalsh((logits + logits.swapaxes(-1, -2)) / 2)[..., ::-1]
    logits[0, 1, 2, 3], logits[1, 2] = np.inf, np.nan
    expected[0, 1] = expected[1, 2] = np.nan
    got = theory.mode_eigenvalues(logits)
    assert got.shape == (2, 3, 4)
    np.testing.assert_allclose(got, expected, atol=1e-14)


def test_norm_imbalance_decays_as_gradient_flow_of_a_linear_net_does():
    """Fourth-order Runge-Kutta on 1/2 ||Y - X W_1 W_2||^2/N + lambda/2 (||W_1||^2 + ||W_2||^2)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 4)), rng.standard_normal((12, 3))
    weights, weight_decay, step = (
        [rng.standard_normal((4, 5)), 0.3 * rng.standard_normal((5, 3))],
        0.05,
        0.01,
    )

    def slope(weights):
        first, second = weights
        residual = (y - x @ first @ second) / len(x)
        return [
            x.T @ residual @ second.T - weight_decay * first,
            (x @ first).T @ residual - weight_decay * second,
        ]

    def moved(weights, slopes, by):
        return [w + by * s for w, s in zip(weights, slopes, strict=True)]

    imbalance = []
    for _ in range(1001):
        imbalance.append(np.sum(weights[0] ** 2) - np.sum(weights[1] ** 2))
        k1 = slope(weights)
        k2 = slope(moved(weights, k1, step / 2))
        k3 = slope(moved(weights, k2, step / 2))
        k4 = slope(moved(weights, k3, step))
        weights = [
            w + step / 6 * (a + 2 * b + 2 * c + d)
            for w, a, b, c, d in zip(weights, k1, k2, k3, k4, strict=True)
        ]
    predicted = closed_forms.norm_imbalance(step * np.arange(1001), np.full(1001, weight_decay))
    np.testing.assert_allclose(np.array(imbalance) / imbalance[0], predicted, rtol=1e-6)
    assert imbalance[0] > 5
    assert predicted[-1] == pytest.approx(np.exp(-1), rel=1e-12)
