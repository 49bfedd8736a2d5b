"""Computes the collapsed state in closed form, by a law of homogeneous networks. NumPy only.

The law is exact for unconstrained features. A network of degree 1 in each of L layers whose norms
are equal, ||W_k||_F = n^{1/2}, has margin a = gamma n^{L/2}, where gamma is the margin of the
network with all norms one. Minimizing k0/2 (1 - a)^2 + lambda L n/2 over n gives

    lambda = scale a^{1-2/L} (1 - a),    scale = k0 gamma^{2/L},                         (*)

with k0 = 1 if the weights fit the sum of the outputs too (one-hot targets, no bias), and k0 =
(C-1)/C if they do not (a bias, or centred targets). The class-mean residuals are then Rbar = (1 -
a)(I - J/C) + q J/C. In the unconstrained-feature model (a linear net on x_n = e_n, N examples per
class) each singular mode obeys (*) on its own, with scale = N^{-1/L}/C. Derivations are in
docs/theory.md.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

Numbers: TypeAlias = float | np.ndarray

_BISECTIONS = 64  # halve [0, 1] to below the spacing of float64


def equiangular_frame(num_classes: int, cosine: float) -> np.ndarray:
    """Returns a (C, C) matrix of unit rows with the same cosine between any two.

    It is the symmetric square root of (1 - cos) I + cos J. A cosine of -1/(C-1) gives the simplex
    ETF, 0 the orthogonal frame.
    """
    average = np.full((num_classes, num_classes), 1 / num_classes)
    across = np.sqrt(1 - cosine) * (np.eye(num_classes) - average)
    return across + np.sqrt(max(0.0, 1 + (num_classes - 1) * cosine)) * average


def simplex_etf(num_classes: int) -> np.ndarray:
    """Returns C unit rows (C, C) that sum to zero, with cosine -1/(C-1) between any two."""
    return equiangular_frame(num_classes, -1 / (num_classes - 1))


def spinodal_margin(depth: int) -> float:
    """Returns (L-2)/(2(L-1)), the least margin of the stable branch, where lambda is greatest."""
    return (depth - 2) / (2 * (depth - 1))


def spinodal(depth: int) -> float:
    """Returns the greatest lambda/scale that can collapse: 1, 0.4725, 0.3849 for L = 2, 3, 4."""
    return float(relative_decay(spinodal_margin(depth), depth))


def equal_loss(depth: int) -> float:
    """Returns the lambda/scale at which the collapsed solution has the loss of zero weights.

    The margin there is a = (L-2)/(L-1). The values are 1, 0.3969, 0.2722 for L = 2, 3, 4.
    """
    return float(relative_decay((depth - 2) / (depth - 1), depth))


def relative_decay(margin: Numbers, depth: int) -> np.ndarray:
    """Returns lambda/scale = a^{1-2/L} (1 - a) of a solution with margin a."""
    margin = np.asarray(margin, np.float64)
    return np.asarray(margin ** (1 - 2 / depth) * (1 - margin))


def margin(relative: Numbers, depth: int, branch: str = "stable") -> np.ndarray:
    """Returns the margin a at lambda/scale = `relative`, for depth >= 2.

    It is NaN beyond the spinodal, and on the unstable branch for L = 2, which has none.

    Args:
      branch: `stable`, which falls from a = 1 at lambda = 0 to the spinodal; or `unstable`, which
        rises from a = 0 to it. With L >= 3 a mode that starts below the unstable branch dies,
        because a = 0 is stable at every lambda > 0.
    """
    relative = np.asarray(relative, np.float64)
    turning = spinodal_margin(depth)
    low, high = (turning, 1.0) if branch == "stable" else (0.0, turning)
    low, high = np.full(relative.shape, low), np.full(relative.shape, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        # lambda falls with a on the stable branch and rises on the other.
        too_low = (relative_decay(middle, depth) > relative) == (branch == "stable")
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    exists = (relative >= 0) & (relative <= spinodal(depth)) & ((branch == "stable") | (depth > 2))
    return np.where(exists, (low + high) / 2, np.nan)


class Setting(NamedTuple):
    """Holds what decides whether the weights or a bias fit the sum of the outputs.

    Attributes:
      num_classes: C.
      head_bias: `none`, `free` or `decayed`.
      targets: `one_hot` or `centered`.
    """

    num_classes: int
    head_bias: str = "none"
    targets: str = "one_hot"

    @property
    def sum_is_fitted(self) -> bool:
        """Returns whether the weights fit the sum of the outputs too, as one more mode."""
        return self.head_bias == "none" and self.targets == "one_hot"

    @property
    def modes(self) -> int:
        return self.num_classes if self.sum_is_fitted else self.num_classes - 1

    @property
    def k0(self) -> float:
        return self.modes / self.num_classes


class Solution(NamedTuple):
    """Holds the collapsed solution at one lambda, or at many; NaN if there is none.

    Attributes:
      margin: a, on the stable branch.
      epsilon, delta: `collapse.quasi_interpolation` of Rbar = (1 - a)(I - J/C) + q J/C.
      nc3: 2 - 2 sqrt((C-1)/C) if the head is an orthogonal frame, 0 if it is a simplex ETF; between
        them if the weights fit a part of the sum of the outputs.
      weight_norm_sq: ||W_k||_F^2, the same for every layer: (a/gamma)^{2/L}, and more if the
        weights fit a part of the sum of the outputs.
    """

    margin: np.ndarray
    epsilon: np.ndarray
    delta: np.ndarray
    nc3: np.ndarray
    weight_norm_sq: np.ndarray


def scale(gamma: Numbers, depth: int, setting: Setting) -> Numbers:
    """Returns k0 gamma^{2/L}, the unit of lambda in (*)."""
    return setting.k0 * gamma ** (2 / depth)


def homogeneous_solution(
    weight_decay: Numbers,
    gamma: Numbers,
    depth: int,
    setting: Setting,
    bias_decay: Numbers | None = None,
) -> Solution:
    """Solves the law (*) for a given gamma; a trained network has `theory.normalized_margin`.

    The solution is valid at equilibrium, if the layers' norms are equal, if the normalized network
    does not change with lambda, and if the outputs treat all classes the same. Without a bias they
    are an orthogonal frame (the weights give their sum the same margin). With one, mu_G = 0 and the
    bias fits the sum of the outputs; a decayed one up to q = lambda_b/(1 + lambda_b), and with two
    layers the weights fit a part of it once lambda_b is large (`sum_of_outputs`).

    Args:
      bias_decay: lambda_b of a decayed bias; None: lambda.
    """
    weight_decay, gamma = np.asarray(weight_decay, np.float64), np.asarray(gamma, np.float64)
    num_classes = setting.num_classes
    relative = weight_decay / scale(gamma, depth, setting)
    a = margin(relative, depth)
    by_weights: Numbers = 0.0
    if setting.sum_is_fitted:
        by_weights, q = a, 1 - a
    elif setting.head_bias == "decayed" and setting.targets == "one_hot":
        bias_decay = weight_decay if bias_decay is None else np.asarray(bias_decay, np.float64)
        by_bias: Numbers = 1 / (1 + bias_decay)
        if depth == 2:
            by_weights, by_bias = sum_of_outputs(relative, bias_decay)
        q = np.where(np.isnan(a), np.nan, 1 - by_weights - by_bias)
    else:
        q = np.where(np.isnan(a), np.nan, 0.0)
    # The share of ||W_L||_F^2 that its centred rows have.
    centred = (num_classes - 1) * a / ((num_classes - 1) * a + by_weights)
    return Solution(
        margin=a,
        epsilon=((num_classes - 1) * (1 - a) + q) / num_classes,
        delta=((1 - a) - q) / num_classes,
        nc3=2 - 2 * np.sqrt(centred),
        weight_norm_sq=(a / gamma) ** (2 / depth) * (1.0 if setting.sum_is_fitted else 1 / centred),
    )


def unconstrained_gamma(depth: int, per_class: int, setting: Setting) -> float:
    """Returns gamma = K^{-L/2} N^{-1/2} of the unconstrained-feature model with K equal modes.

    The product of the factors has K singular values a N^{1/2}, and each factor has K singular
    values (a N^{1/2})^{1/L}. (*) then has scale = N^{-1/L}/C in every setting.
    """
    return float(setting.modes ** (-depth / 2) * per_class**-0.5)


def critical_decays(gamma: float, depth: int, setting: Setting) -> tuple[float, float]:
    """Returns lambda of equal loss and lambda of the spinodal.

    Beyond the first, zero weights have less loss; beyond the second, no solution collapses.
    """
    unit = float(scale(gamma, depth, setting))
    return unit * equal_loss(depth), unit * spinodal(depth)


def linear_collapse(
    scales: np.ndarray, weight_decay: float, depth: int, num_classes: int
) -> tuple[float, float]:
    """Returns nc3 and etf_error of a linear network at the critical point whose modes are those
    of its inputs X.

    There is one example in each class, and targets are centred, so that data, lambda and depth
    decide. Every singular value of X is a mode of its own: with z the singular value of the product
    of all weights and a = z scale the margin, a is the larger root of

        a^(1 - 2/L) (1 - a) = C lambda/scale^(2/L).

    The head then has the singular value z^(1/L), the class means have a z^(-1/L), on the same
    singular vectors. Both are NaN where a mode has no root.

    Args:
      scales: the nonzero singular values of the centred inputs, (C - 1,).
    """
    relative = num_classes * weight_decay / scales ** (2 / depth)
    margins = margin(relative, depth) if weight_decay else np.ones_like(scales)
    head = (margins / scales) ** (1 / depth)
    means = margins / head
    nc3 = 2 - 2 * np.sum(head * means) / np.sqrt(np.sum(head**2) * np.sum(means**2))
    gram = means**2
    cosine = gram.sum() / np.sqrt(len(gram) * np.sum(gram**2))
    return float(nc3), float(np.sqrt(2 - 2 * cosine))


def sum_of_outputs(relative: Numbers, bias_decay: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum of the outputs as two parts: (by the weights, by a bias decayed by lambda_b).

    It is for depth 2 and one-hot targets; `relative` is lambda/scale, which is C lambda of an
    unconstrained-feature model with one example a class. The parts are (0, 1/(1 + lambda_b)), hence
    a simplex ETF, iff lambda_b <= relative/(1 - relative), as always with lambda_b = lambda.
    Otherwise the sum is a mode too: (1 - relative - relative/lambda_b, relative/lambda_b).
    """
    relative, bias_decay = np.asarray(relative, np.float64), np.asarray(bias_decay, np.float64)
    # The sum is no mode while its residual, with the bias alone, is within the threshold.
    by_bias_alone = bias_decay / (1 + bias_decay) <= relative
    by_bias = np.where(
        by_bias_alone, 1 / (1 + bias_decay), relative / np.where(by_bias_alone, 1.0, bias_decay)
    )
    return np.where(by_bias_alone, 0.0, 1 - relative - by_bias), by_bias


def head_sum(
    weight_decay: np.ndarray,
    learning_rates: np.ndarray,
    momentum: np.ndarray,
    *,
    is_coupled: bool,
) -> np.ndarray:
    """Returns the sum of the head's rows over its initial value, before and after every step of
    SGD: (R,), (R, T) and (R,) -> (R, T + 1).

    With cross-entropy the residuals y - softmax(f) of every example add up to 0, hence so do the
    rows of the fit term's gradient, whatever the data, the network or its normalization. The sum
    s = 1^T W_L obeys weight decay alone:

        coupled     v <- momentum v + lambda s,  s <- s - lr v;
        decoupled   s <- s - lr lambda s.

    Up to the transient of momentum this is exp(-lambda t), t = sum of lr/(1 - momentum), and
    without 1/(1 - momentum) if decay is decoupled.
    """
    share, velocity = np.ones(len(weight_decay)), np.zeros(len(weight_decay))
    shares = [share]
    for rate in learning_rates.T:
        velocity = weight_decay * share + (momentum * velocity if is_coupled else 0.0)
        share = share - rate * velocity
        shares.append(share)
    return np.stack(shares, axis=1)


def norm_imbalance(flow_time: Numbers, weight_decay: Numbers) -> np.ndarray:
    """Returns exp(-2 lambda t): ||W_k||^2 - ||W_l||^2 at t over its value at t = 0, for any k, l.

    Along gradient flow <W_k, G_k> is the same for all layers of a network of degree 1 in each, so
    only weight decay changes the difference.
    """
    return np.exp(-2 * np.asarray(weight_decay) * np.asarray(flow_time))
