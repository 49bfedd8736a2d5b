"""closed_forms against numbers from docs/theory.md and brute-force minimization of the losses
they solve.
"""

import itertools

import numpy as np
import pytest
from scipy import optimize

from ncjax.metrics import closed_forms
from ncjax.metrics.closed_forms import Setting
from tests.helpers import oracle_geometry


@pytest.mark.parametrize(
    ("num_classes", "cosine"), [(2, -1.0), (3, -0.5), (10, -1 / 9), (10, 0.0), (4, 0.7), (5, 1.0)]
)
def test_an_equiangular_frame_has_unit_rows_at_the_angle_asked_for(num_classes, cosine):
    frame = closed_forms.equiangular_frame(num_classes, cosine)
    expected = np.full((num_classes, num_classes), cosine)
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(frame @ frame.T, expected, atol=1e-14)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_a_simplex_etf_has_rows_of_sum_zero_and_no_nc2(num_classes):
    etf = closed_forms.simplex_etf(num_classes)
    np.testing.assert_allclose(etf.sum(0), 0, atol=1e-14)
    assert max(oracle_geometry(etf, "rows").values()) < 1e-7


@pytest.mark.parametrize(
    ("depth", "margin", "spinodal", "equal_loss"),
    [(2, 0, 1, 1), (3, 1 / 4, 0.4725, 0.3969), (4, 1 / 3, 0.3849, 0.2722)],
)
def test_critical_points_equal_the_numbers_of_the_theory_and_a_search(
    depth, margin, spinodal, equal_loss
):
    assert closed_forms.spinodal_margin(depth) == pytest.approx(margin, rel=1e-14)
    assert closed_forms.spinodal(depth) == pytest.approx(spinodal, abs=5e-5)
    assert closed_forms.equal_loss(depth) == pytest.approx(equal_loss, abs=5e-5)
    a = np.linspace(0, 1, 1_000_001)
    curve = a ** (1 - 2 / depth) * (1 - a)
    assert closed_forms.spinodal(depth) == pytest.approx(curve.max(), rel=1e-10)
    assert a[curve.argmax()] == pytest.approx(margin, abs=2e-6)


@pytest.mark.parametrize("depth", [2, 3, 4, 7])
def test_a_branch_inverts_relative_decay_and_lies_on_its_side_of_the_spinodal(depth):
    relative = closed_forms.spinodal(depth) * np.array([1e-3, 0.1, 0.5, 0.9, 0.999])
    stable = closed_forms.margin(relative, depth)
    np.testing.assert_allclose(closed_forms.relative_decay(stable, depth), relative, rtol=1e-9)
    assert (stable > closed_forms.spinodal_margin(depth)).all()
    assert (np.diff(stable) < 0).all()
    unstable = closed_forms.margin(relative, depth, "unstable")
    if depth == 2:
        assert np.isnan(unstable).all()
        np.testing.assert_allclose(stable, 1 - relative, atol=1e-15)
    else:
        np.testing.assert_allclose(
            closed_forms.relative_decay(unstable, depth), relative, rtol=1e-9
        )
        assert (unstable < closed_forms.spinodal_margin(depth)).all()
        assert (np.diff(unstable) > 0).all()


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_margin_is_1_without_decay_and_nan_beyond_the_spinodal(depth):
    relative = np.array([0.0, 1.001 * closed_forms.spinodal(depth), -1e-9, np.nan])
    np.testing.assert_array_equal(
        np.isnan(closed_forms.margin(relative, depth)), [False, True, True, True]
    )
    assert closed_forms.margin(0.0, depth) == pytest.approx(1, abs=1e-15)
    assert closed_forms.margin(0.0, depth).shape == ()


SETTINGS = {
    "none": Setting(4),
    "free": Setting(4, "free"),
    "decayed": Setting(4, "decayed"),
    "centered": Setting(4, targets="centered"),
    "centered_decayed": Setting(4, "decayed", "centered"),
}


def cost_of_norms(n, weight_decay, gamma, depth, setting):
    """L of a collapsed network whose layers all have ||W_k||^2 = n, its outputs' sums met as well
    as they can be.

    From the loss itself: outputs of class c are a (y_c - 1/C) + s/C, residuals are summed over the
    C outputs.
    """
    classes, a = setting.num_classes, gamma * n ** (depth / 2)
    one_hot = setting.targets == "one_hot"

    def cost(s_weights, s_bias):
        outputs = a * (np.eye(classes) - 1 / classes) + (s_weights + s_bias) / classes
        target = np.eye(classes) if one_hot else np.eye(classes) - 1 / classes
        penalty = (
            weight_decay
            / 2
            * (depth * n + (s_bias**2 / classes if setting.head_bias == "decayed" else 0))
        )
        return np.sum((target - outputs) ** 2) / (2 * classes) + penalty

    if setting.head_bias == "none" and one_hot:
        return cost(a, 0)  # a mode as strong as the others
    bias = optimize.minimize_scalar(lambda s: cost(0, s)).x if setting.head_bias != "none" else 0
    return cost(0, bias)


def best_norm(weight_decay, gamma, depth, setting):
    """The local minimum of `cost_of_norms` with the largest norm, below that of a = 1."""
    full = gamma ** (-2 / depth)
    norms = np.linspace(0.2, 1.0, 400) * full
    costs = np.array([cost_of_norms(n, weight_decay, gamma, depth, setting) for n in norms])
    minima = [i for i in range(1, 399) if costs[i] < min(costs[i - 1], costs[i + 1])]
    assert len(minima) == 1
    bracket = norms[minima[0] - 1], norms[minima[0]], norms[minima[0] + 1]
    found = optimize.minimize_scalar(
        lambda n: cost_of_norms(n, weight_decay, gamma, depth, setting),
        bracket,
        options={"xtol": 1e-10},
    )
    return found.x


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_homogeneous_law_equals_brute_force_minimization_of_the_loss(depth, setting):
    gamma = 0.3
    weight_decay = 0.7 * setting.k0 * gamma ** (2 / depth) * closed_forms.spinodal(depth)
    got = closed_forms.homogeneous_solution(weight_decay, gamma, depth, setting)
    n = best_norm(weight_decay, gamma, depth, setting)
    a = gamma * n ** (depth / 2)
    # A minimum found by its values is known to the root of the spacing of float64.
    assert float(got.weight_norm_sq) == pytest.approx(n, rel=1e-6)
    assert float(got.margin) == pytest.approx(a, rel=1e-6)
    if setting.targets == "one_hot":
        # Outputs: a (y - 1/C) + s/C, s = 1 with a free bias, 1/(1 + lambda) with one that decays, a
        # without.
        s = {"none": a, "free": 1, "decayed": 1 / (1 + weight_decay)}[setting.head_bias]
        own, other = a * 3 / 4 + s / 4, -a / 4 + s / 4
        assert float(got.epsilon) == pytest.approx(1 - own, rel=1e-5)
        assert float(got.delta) == pytest.approx(other, rel=1e-5, abs=1e-9)
    else:
        assert float(got.epsilon) == pytest.approx(3 / 4 * (1 - a), rel=1e-5)
        assert float(got.delta) == pytest.approx((1 - a) / 4, rel=1e-5)
    frame = setting.head_bias == "none" and setting.targets == "one_hot"
    assert float(got.nc3) == pytest.approx(2 - 2 * np.sqrt(3 / 4) if frame else 0)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("depth", [3, 4])
def test_at_equal_loss_collapse_costs_as_much_as_a_network_of_zeros_and_at_the_spinodal_it_ends(
    depth, setting
):
    gamma = 0.3
    equal, last = closed_forms.critical_decays(gamma, depth, setting)
    norm = float(closed_forms.homogeneous_solution(equal, gamma, depth, setting).weight_norm_sq)
    collapsed, zeros = (cost_of_norms(n, equal, gamma, depth, setting) for n in (norm, 0.0))
    assert collapsed == pytest.approx(zeros, rel=1e-12)
    solution = closed_forms.homogeneous_solution(
        np.array([0.999, 1.001]) * last, gamma, depth, setting
    )
    for values in solution:
        np.testing.assert_array_equal(np.isnan(values), [False, True])


def unconstrained_loss(flat, shapes, per_class, weight_decay, setting):
    """L of factors and bias stacked into `flat`, on x_n = e_n, and its gradient."""
    num_classes = setting.num_classes
    sizes = [a * b for a, b in shapes]
    parts = np.split(flat, np.cumsum(sizes))
    factors = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=False)]
    bias = parts[-1] if setting.head_bias != "none" else np.zeros(num_classes)
    bias_decay = weight_decay if setting.head_bias == "decayed" else 0.0
    targets = np.repeat(np.eye(num_classes), per_class, axis=0)
    if setting.targets == "centered":
        targets = targets - 1 / num_classes
    # Features of each layer, the inputs being e_n.
    products = list(itertools.accumulate(factors, np.matmul))
    residual = (products[-1] + bias - targets) / len(targets)
    loss = np.sum(residual**2) * len(targets) / 2 + weight_decay / 2 * sum(
        np.sum(w**2) for w in factors
    )
    gradients, back = [], residual
    for below, w in zip([None, *products[:-1]][::-1], factors[::-1], strict=True):
        gradients.append((back if below is None else below.T @ back) + weight_decay * w)
        back = back @ w.T
    flat_gradient = [g.ravel() for g in gradients[::-1]]
    if setting.head_bias != "none":
        flat_gradient.append(residual.sum(0) + bias_decay * bias)
    return loss + bias_decay / 2 * bias @ bias, np.concatenate(flat_gradient)


@pytest.mark.parametrize(
    "setting",
    [Setting(3), Setting(3, "free"), Setting(3, "decayed"), Setting(3, targets="centered")],
    ids=str,
)
@pytest.mark.parametrize("depth", [2, 3])
def test_the_unconstrained_model_equals_a_full_minimization_over_all_its_factors(depth, setting):
    per_class, width = 2, 4
    gamma = closed_forms.unconstrained_gamma(depth, per_class, setting)
    weight_decay = 0.6 * closed_forms.critical_decays(gamma, depth, setting)[1]
    expected = closed_forms.homogeneous_solution(weight_decay, gamma, depth, setting)

    shapes = [(6, width), *[(width, width)] * (depth - 2), (width, 3)]
    start = np.random.default_rng(1).standard_normal(
        sum(a * b for a, b in shapes) + 3 * (setting.head_bias != "none")
    )
    arguments = shapes, per_class, weight_decay, setting
    error = optimize.check_grad(
        lambda x: unconstrained_loss(x, *arguments)[0],
        lambda x: unconstrained_loss(x, *arguments)[1],
        start,
    )
    assert error < 1e-5
    found = optimize.minimize(
        unconstrained_loss,
        start,
        arguments,
        "L-BFGS-B",
        jac=True,
        options={"maxiter": 5000, "ftol": 0, "gtol": 1e-11},
    )
    sizes = np.cumsum([a * b for a, b in shapes])
    factors = [p.reshape(s) for p, s in zip(np.split(found.x, sizes), shapes, strict=False)]
    bias = found.x[sizes[-1] :] if setting.head_bias != "none" else 0
    features = np.linalg.multi_dot([*factors[:-1], np.eye(width)]) if depth > 2 else factors[0]
    target = np.eye(3) - (1 / 3 if setting.targets == "centered" else 0)
    residual = (target - (features @ factors[-1] + bias).reshape(3, per_class, 3).mean(1)).T
    means = features.reshape(3, per_class, width).mean(1)
    centred, head = means - means.mean(0), factors[-1].T
    nc3 = np.sum((head / np.linalg.norm(head) - centred / np.linalg.norm(centred)) ** 2)
    for w in factors:
        assert np.sum(w**2) == pytest.approx(float(expected.weight_norm_sq), rel=1e-6)
    assert np.trace(residual) / 3 == pytest.approx(float(expected.epsilon), rel=1e-6)
    assert -(residual.sum() - np.trace(residual)) / 6 == pytest.approx(
        float(expected.delta), rel=1e-6, abs=1e-9
    )
    assert nc3 == pytest.approx(float(expected.nc3), abs=1e-8)


def test_the_scale_of_the_unconstrained_law_is_the_same_in_every_setting():
    """scale = k0 gamma^{2/L} = N^{-1/L}/C."""
    for setting, depth in itertools.product(SETTINGS.values(), (2, 3, 4)):
        gamma = closed_forms.unconstrained_gamma(depth, 5, setting)
        assert setting.k0 * gamma ** (2 / depth) == pytest.approx(5 ** (-1 / depth) / 4, rel=1e-13)


@pytest.mark.parametrize("relative", [0.2, 0.9, 1.1, 3.0])
def test_a_regularized_bias_equals_brute_force_on_both_sides_of_its_threshold(relative):
    """Depth 2: the weights' sum s_w costs lambda s_w, as a nuclear norm; the bias s_b/C of every
    class, its square.
    """
    num_classes, weight_decay = 4, 0.06
    bias_decay = relative * num_classes * weight_decay / (1 - num_classes * weight_decay)

    def cost(sums):
        by_weights, by_bias = sums
        fit = (1 - by_weights - by_bias) ** 2 / (2 * num_classes)
        return fit + weight_decay * by_weights + bias_decay * by_bias**2 / (2 * num_classes)

    # Convex: there is one minimum.
    found = optimize.minimize(
        cost, (0.5, 0.5), method="L-BFGS-B", bounds=[(0, 2)] * 2, options={"ftol": 0, "gtol": 1e-9}
    )
    got = closed_forms.sum_of_outputs(num_classes * weight_decay, bias_decay)
    np.testing.assert_allclose(np.array(got), found.x, atol=1e-6)
    assert (float(got[0]) == 0) == (relative < 1)


def test_a_bias_decayed_as_the_weights_always_leaves_a_simplex_etf():
    weight_decay = np.array([1e-4, 1e-2, 0.2])
    by_weights, by_bias = closed_forms.sum_of_outputs(4 * weight_decay, weight_decay)
    np.testing.assert_array_equal(by_weights, 0)
    np.testing.assert_allclose(by_bias, 1 / (1 + weight_decay), rtol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.97])
def test_the_sum_of_the_heads_rows_tends_to_its_exponential_law(momentum):
    """A linear recurrence has a closed form in powers of its roots; for small steps it is
    exp(-lambda t).
    """
    decay, rate, steps = np.array([1e-3, 0.02]), 1e-3, 3000
    rates = np.full((2, steps), rate)
    share = closed_forms.head_sum(decay, rates, np.full(2, momentum), is_coupled=True)
    # s_{k+1} = (1 + m - lr lambda) s_k - m s_{k-1}, s_0 = 1, s_1 = 1 - lr lambda.
    for run, weight_decay in enumerate(decay):
        roots = np.roots([1, -(1 + momentum - rate * weight_decay), momentum])
        start = np.array([1, 1 - rate * weight_decay])
        weights = np.linalg.solve(np.vander(roots, 2, increasing=True).T, start)
        expected = (roots ** np.arange(steps + 1)[:, None]) @ weights
        np.testing.assert_allclose(share[run], expected.real, rtol=1e-9, atol=1e-13)
    time = rate * steps / (1 - momentum)
    np.testing.assert_allclose(share[:, -1], np.exp(-decay * time), rtol=0.03)
    alone = closed_forms.head_sum(decay, rates, np.full(2, momentum), is_coupled=False)
    np.testing.assert_allclose(alone[:, -1], (1 - rate * decay) ** steps, rtol=1e-12)


def nc3_and_etf_error(head, means):
    """By definition, of a head (C, p) and class means (C, p)."""
    centred = means - means.mean(0)
    num_classes = len(means)
    unit = (matrix / np.linalg.norm(matrix) for matrix in (head, centred))
    gram = centred @ centred.T
    etf = (np.eye(num_classes) - 1 / num_classes) / np.sqrt(num_classes - 1)
    nc3 = np.sum(np.subtract(*unit) ** 2)
    return nc3, np.linalg.norm(gram / np.linalg.norm(gram) - etf)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_linear_collapse_is_that_of_a_critical_point(layers):
    num_classes, weight_decay = 4, 0.01
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, num_classes)) * 2
    x -= x.mean(1, keepdims=True)
    left, scales, right = np.linalg.svd(x, full_matrices=False)
    left, scales, right = left[:, :-1], scales[:-1], right[:-1]
    # Every mode by bisection of the derivative of its loss.
    low, high = 0.5 / scales, 1 / scales
    z = low
    for _ in range(100):
        z = (low + high) / 2
        slope = -scales / num_classes * (1 - z * scales) + weight_decay * z ** (2 / layers - 1)
        low, high = np.where(slope < 0, z, low), np.where(slope < 0, high, z)
    middle = np.eye(num_classes - 1) * z ** (1 / layers)
    weights = [middle @ left.T, *[middle] * (layers - 2), right.T @ middle]
    targets = np.eye(num_classes) - 1 / num_classes
    outputs = np.linalg.multi_dot([*weights[::-1], x])
    for k in range(layers):
        above = [np.eye(len(weights[k])), *weights[k + 1 :]]
        below = [x, *weights[:k]]
        back = np.linalg.multi_dot([*above[::-1]]) if len(above) > 1 else above[0]
        input_ = np.linalg.multi_dot([*below[::-1]]) if len(below) > 1 else below[0]
        gradient = back.T @ (outputs - targets) @ input_.T / num_classes
        np.testing.assert_allclose(gradient, -weight_decay * weights[k], atol=1e-12)
    features = np.linalg.multi_dot([*weights[:-1][::-1], x])
    expected = nc3_and_etf_error(weights[-1], features.T)
    found = closed_forms.linear_collapse(scales, weight_decay, layers, num_classes)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_without_a_bias_the_centred_head_has_one_term_more_than_with_one():
    rng = np.random.default_rng(0)
    num_classes = 5
    means = rng.standard_normal((8, num_classes)) + 0.5
    center = means.mean(1)
    centred = means - center[:, None]
    head = np.linalg.pinv(means)
    head -= head.mean(0)
    eigenvalues = np.linalg.svd(centred, compute_uv=False)[:-1] ** 2
    inverse = np.linalg.pinv(centred)
    across = center - centred @ inverse @ center
    extra = np.sum((inverse @ center) ** 2) / np.sum(across**2)
    np.testing.assert_allclose(np.sum((head - inverse) ** 2), extra, rtol=1e-10)
    spread = eigenvalues.mean() * ((1 / eigenvalues).mean() + extra / (num_classes - 1))
    found, _ = nc3_and_etf_error(head, means.T)
    np.testing.assert_allclose(found, 2 - 2 / np.sqrt(spread), rtol=1e-10)
