"""Every metric in one place: its name, definition, range, best value, and the function that
computes it.

A metric is added by one decorated function of `Quantities` in this file; training, `ncjax.measure`,
the history on disk, tables and documentation then have it. `assemble` computes all metrics that a
`Statistics` determines. Metrics that need more than that have no function, and are listed in two
tables that say where they are computed.
"""

import functools
import importlib
import math
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
    from jax import Array

    from ncjax.metrics import bounds, collapse, geometry, linalg, statistics, theory
else:

    class _Lazy:
        """Imports a module when it is first used: definitions are read without JAX."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    Array = Any
    jax, jnp = _Lazy("jax"), _Lazy("jax.numpy")
    bounds, collapse, geometry, linalg, statistics, theory = (
        _Lazy(f"ncjax.metrics.{name}")
        for name in ("bounds", "collapse", "geometry", "linalg", "statistics", "theory")
    )


class Quantities:
    """Quantities that several metrics share, each computed when it is first asked for, in
    float64.
    """

    def __init__(self, summed: "statistics.Statistics"):
        self.statistics = jax.tree.map(lambda a: a.astype(statistics.wide()), summed)

    @functools.cached_property
    def total(self) -> Array:
        """The number of examples."""
        return self.statistics.examples.sum()

    @functools.cached_property
    def num_classes(self) -> int:
        return len(self.statistics.means)

    @functools.cached_property
    def centred(self) -> Array:
        """Mdot^T: row c is mu_c - mu_G."""
        return self.statistics.means - self.statistics.center[None]

    @functools.cached_property
    def class_weights(self) -> Array:
        """Returns what mu_G weighs the class means by."""
        weights = self.statistics.class_weights
        return jnp.ones(self.num_classes) if weights is None else weights

    @functools.cached_property
    def trace_within(self) -> Array:
        """tr(Sigma_W)."""
        return self.statistics.within.sum() / self.total

    @functools.cached_property
    def pairs(self) -> dict[str, Array]:
        """Means over pairs of classes of what their centred means are to each other."""
        return collapse.between_means(
            self.centred, self.statistics.within / self.statistics.examples
        )

    @functools.cached_property
    def head_geometry(self) -> dict[str, Array]:
        return collapse.geometry(self.statistics.head, "head")

    @functools.cached_property
    def interpolation(self) -> dict[str, Array]:
        """Returns how far class-mean outputs are from targets."""
        residuals = self.statistics.mean_residuals
        if isinstance(residuals, statistics.FactoredResiduals):
            factors = map(jnp.asarray, residuals)
            return collapse.quasi_interpolation_of_head(self.statistics.means, *factors)
        return collapse.quasi_interpolation(residuals)

    @functools.cached_property
    def class_mean_logits(self) -> Array:
        """Row c is W mu_c, the mean output of class c less the bias."""
        return self.statistics.means @ self.statistics.head.T

    @functools.cached_property
    def logit_part(self) -> "linalg.SymmetricPart":
        return linalg.symmetric_part(self.class_mean_logits)

    @functools.cached_property
    def solution(self) -> "theory.SymmetricSolution":
        residual_part = linalg.symmetric_part(self.statistics.mean_residuals)
        return theory.symmetric_solution(
            self.logit_part, residual_part, self.num_classes, self.statistics.weight_decay
        )

    @functools.cached_property
    def budget_terms(self) -> "theory.Budget":
        split = self.statistics
        gradient = split.fit_gradient + split.weight_decay * split.head
        covariance = split.covariance / self.total
        return theory.budget(split.mean_residuals, split.means, covariance, gradient)

    @functools.cached_property
    def budget(self) -> dict[str, Array]:
        """The equilibrium budget: shares, norms and what they leave."""
        split = self.statistics
        return theory.budget_account(self.budget_terms, split.head, split.weight_decay)

    @functools.cached_property
    def t(self) -> Array:
        """The factor of I - J/C in the mean residuals: epsilon + delta."""
        return self.interpolation["epsilon"] + self.interpolation["delta"]

    @functools.cached_property
    def duality_bounds(self) -> "bounds.DualityBounds":
        split = self.statistics
        floor = collapse.nc3_floor(split.head, self.class_weights)
        return bounds.bound_duality(
            self.budget_terms, split.head, floor, self.t, split.weight_decay
        )

    @functools.cached_property
    def gram_bounds(self) -> "bounds.GramBounds":
        """Bounds on NC2 of the class means."""
        deviations = bounds.gram_deviations(
            self.budget_terms,
            self.centred,
            self.logit_part.rest,
            self.t,
            self.statistics.weight_decay,
        )
        return bounds.bound_gram(deviations, self.centred)

    @functools.cached_property
    def scatter_bound(self) -> "bounds.ScatterBound":
        split = self.statistics
        return bounds.bound_scatter(
            split.head,
            split.head_scatter / self.total,
            self.centred,
            split.basis,
            split.spectrum,
            nc1(self),
            self.t,
            split.weight_decay,
        )

    @functools.cached_property
    def logit_scatter(self) -> Array:
        """mean ||W (h - mu_c)||^2, the scatter of outputs W h within classes."""
        return jnp.sum(self.statistics.head_scatter * self.statistics.head) / self.total

    @functools.cached_property
    def mean_square_logit(self) -> Array:
        """mean ||W h||^2."""
        between = self.statistics.examples @ jnp.sum(self.class_mean_logits**2, axis=1)
        return self.logit_scatter + between / self.total


class Metric(NamedTuple):
    """One entry of the vocabulary.

    Attributes:
      title: short label of an axis or a table.
      definition: the formula.
      dims: dimensions in a history, after those of the grid and `epoch`.
      least, most: the range.
      best: the value at collapse, or where the theory holds; None: there is no best one.
      units: of the numbers; "1" for those without.
      scale: powers of the sizes of features, head and outputs that the metric is proportional to.
      needs: fields of `Statistics` without which there is no such metric.
      of_equal_classes: whether it has a meaning for classes of one size alone.
      function: computes it from `Quantities`; None: they do not determine it.
    """

    title: str
    definition: str
    dims: tuple[str, ...] = ()
    least: float = 0.0
    most: float = math.inf
    best: float | None = None
    units: str = "1"
    scale: tuple[int, int, int] = (0, 0, 0)
    needs: tuple[str, ...] = ()
    of_equal_classes: bool = False
    function: Callable[[Quantities], Array] | None = None

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes of an xarray variable: with them `.plot()` labels itself."""
        return {"definition": self.definition, "long_name": self.title, "units": self.units}


# What a history of training records, and what `ncjax.measure` gives besides.
VOCABULARY: dict[str, Metric] = {}
_OF_FEATURES_ALONE: dict[str, Metric] = {}

_Function: TypeAlias = Callable[[Quantities], Array]


def _metric(
    title: str, definition: str, *, name: str = "", of_features_alone: bool = False, **fields
) -> Callable[[_Function], _Function]:
    """Enters a function, under its own name unless another is given."""

    def enter(function: _Function) -> _Function:
        vocabulary = _OF_FEATURES_ALONE if of_features_alone else VOCABULARY
        entry = Metric(title, definition, function=function, **fields)
        vocabulary[name or function.__name__] = entry
        return function

    return enter


_SPLIT, _LAYER, _MODE, _BY_CLASS = ("split",), ("layer",), ("mode",), ("split", "label")
# Proportional to outputs f; to ||W||^2 of the head, and of a head predicted as f/h; to r h.
_AS_OUTPUTS, _AS_HEAD_SQ = (0, 0, 1), (0, 2, 0)
_AS_PREDICTED_HEAD_SQ, _AS_GRADIENT = (-2, 0, 2), (1, 0, 1)
_HEAD = ("head",)
_EQUILIBRIUM = ("head", "fit_gradient", "weight_decay")
# What the theorem and the budget are made of.
_THEORY = (*_EQUILIBRIUM, "mean_residuals", "covariance")
_SCATTER = ("head_scatter", "basis")

# Computed from the whole network or the clock of its training, by `training.evaluate` and
# `runs.derived`.
VOCABULARY |= {
    "finite": Metric(
        "finite",
        "1 while parameters and training loss are finite; all else is NaN where it is 0",
        most=1,
        best=1,
    ),
    "loss": Metric("loss", "fit_loss + lambda/2 times the squared norm of what is decayed", _SPLIT),
    "fit_loss": Metric(
        "fit loss", "1/(2NC) sum_n ||y_n - f_n||^2, or mean cross-entropy, in eval mode", _SPLIT
    ),
    "effective_decay": Metric(
        "effective lambda", "lambda of the loss whose critical points the optimizer seeks"
    ),
    "flow_time": Metric(
        "flow time t",
        "t = sum over steps of learning rate/(1 - momentum)",
        units="learning rate x steps",
    ),
    "relaxation_time": Metric(
        "2 lambda t",
        "2 lambda t: e-folds by which squared layer norms have drawn together",
        units="e-folds",
    ),
    "lemma2_residual": Metric(
        "Lemma 2's residual", "largest over layers of |L - Lemma 2's right side|/L", best=0
    ),
    "nc0_law": Metric(
        "NC0 over its initial value, by its law",
        "NC0 over that at epoch 0 where residuals sum to 0: step by step of cross-entropy and SGD",
        best=0,
    ),
    "normalized_margin": Metric(
        "normalized margin gamma",
        "gamma: margin of the class-mean outputs over the product of all ||W_k||_F",
        least=-math.inf,
    ),
    "mode_eigenvalues": Metric(
        "mode eigenvalue",
        "eigenvalues of the symmetric part of the class-mean outputs less the bias",
        _MODE,
        least=-math.inf,
    ),
    "closed_form_epsilon": Metric(
        "epsilon of the UFM",
        "epsilon of the unconstrained-feature model; NaN for other networks",
        most=1,
    ),
    "closed_form_nc3": Metric(
        "NC3 of the UFM",
        "nc3 of the unconstrained-feature model; NaN for other networks",
        most=2,
        best=0,
    ),
    "closed_form_norm_sq": Metric(
        "squared norm of the UFM",
        "||W_k||_F^2 of the unconstrained-feature model; NaN for other networks",
    ),
}


@_metric(
    "accuracy",
    "share of examples whose largest output, in eval mode, is their class's",
    dims=_SPLIT,
    most=1,
    needs=("correct",),
)
def accuracy(q: Quantities) -> Array:
    return q.statistics.correct / q.total


@_metric(
    "accuracy by class",
    "share of a class's examples whose largest output is theirs",
    dims=_BY_CLASS,
    most=1,
    needs=("class_correct",),
)
def class_accuracy(q: Quantities) -> Array:
    return q.statistics.class_correct / q.statistics.examples


@_metric(
    "epsilon by class",
    "mean residual y - f of the class's own output",
    dims=_BY_CLASS,
    least=-math.inf,
    scale=_AS_OUTPUTS,
    needs=("mean_residuals",),
)
def class_epsilon(q: Quantities) -> Array:
    return jnp.diagonal(q.statistics.mean_residuals)


@_metric("norm of a class mean", "||mu_c - mu_G||", dims=_BY_CLASS, scale=(1, 0, 0))
def class_norm_means(q: Quantities) -> Array:
    return jnp.linalg.norm(q.centred, axis=1)


@_metric(
    "nearest other class mean",
    "largest cos between the centred mean of the class and another: 1 where two have merged",
    dims=_BY_CLASS,
    least=-1,
    most=1,
)
def class_cosine_means(q: Quantities) -> Array:
    return collapse.largest_cosines(q.centred)


@_metric("norm of a row of the head", "||W_L^c||", dims=("label",), needs=_HEAD, scale=(0, 1, 0))
def class_norm_head(q: Quantities) -> Array:
    return jnp.linalg.norm(q.statistics.head, axis=1)


@_metric(
    "nearest other row of the head",
    "largest cos between the head's row of the class and another: 1 where two have merged",
    dims=("label",),
    least=-1,
    most=1,
    needs=_HEAD,
)
def class_cosine_head(q: Quantities) -> Array:
    return collapse.largest_cosines(q.statistics.head)


@_metric("NC1", "tr(Sigma_W Sigma_B^+)/C", dims=_SPLIT, best=0)
def nc1(q: Quantities) -> Array:
    return collapse.nc1(q.statistics.along_means / q.total, q.statistics.spectrum, q.num_classes)


@_metric("NC1 rank", "rank of the centred class means", dims=_SPLIT)
def nc1_rank(q: Quantities) -> Array:
    return jnp.count_nonzero(q.statistics.spectrum).astype(q.statistics.spectrum.dtype)


@_metric("NC1, ratio of traces", "tr(Sigma_W)/tr(Sigma_B)", dims=_SPLIT, best=0)
def nc1_trace_ratio(q: Quantities) -> Array:
    return q.trace_within / (jnp.sum(q.centred**2) / q.num_classes)


@_metric(
    "scatter in the head's row space",
    "tr(P_W Sigma_W)/tr(Sigma_W), P_W onto the row space of the head",
    dims=_SPLIT,
    most=1,
    needs=("in_row_space",),
)
def nc1_row_space(q: Quantities) -> Array:
    return q.statistics.in_row_space / q.total / q.trace_within


@_metric(
    "bound on NC1",
    "at least nc1, by the scatter of outputs and what deviations from the theorem make of scatter",
    best=0,
    needs=(*_THEORY, *_SCATTER),
    of_equal_classes=True,
)
def nc1_bound(q: Quantities) -> Array:
    return q.scatter_bound.nc1


@_metric(
    "bound on NC1: share of outputs",
    "share of the scatter of outputs in the root of nc1_bound",
    most=1,
    needs=(*_THEORY, *_SCATTER),
    of_equal_classes=True,
)
def nc1_bound_outputs(q: Quantities) -> Array:
    return q.scatter_bound.share_outputs


@_metric(
    "bound on scatter in the head's row space",
    "mean ||W_L (h - mu_c)||^2/(sigma_min(W_L)^2 tr(Sigma_W)): at least nc1_row_space",
    dims=_SPLIT,
    best=0,
    needs=("head", "head_scatter", "head_spectrum"),
)
def nc1_row_space_bound(q: Quantities) -> Array:
    spectrum = q.statistics.head_spectrum
    least = jnp.min(jnp.where(spectrum > 0, spectrum, jnp.inf))
    return q.logit_scatter / (least**2 * q.trace_within)


@_metric(
    "CDNV", "mean over pairs of classes of (v_c + v_c')/(2 ||mu_c - mu_c'||^2)", dims=_SPLIT, best=0
)
def cdnv(q: Quantities) -> Array:
    return q.pairs["cdnv"]


@_metric("NC2 norms, class means", "std/mean over classes of ||mu_c - mu_G||", dims=_SPLIT, best=0)
def nc2_equinorm_means(q: Quantities) -> Array:
    return q.pairs["nc2_equinorm_means"]


@_metric("NC2 norms, head", "std/mean over classes of ||W_L^c||", best=0, needs=_HEAD)
def nc2_equinorm_head(q: Quantities) -> Array:
    return q.head_geometry["nc2_equinorm_head"]


@_metric(
    "NC2 angles, class means",
    "mean over pairs of |cos + 1/(C-1)|, centred class means",
    dims=_SPLIT,
    best=0,
)
def nc2_equiangular_means(q: Quantities) -> Array:
    return q.pairs["nc2_equiangular_means"]


@_metric(
    "NC2 angles, head", "mean over pairs of |cos + 1/(C-1)|, rows of the head", best=0, needs=_HEAD
)
def nc2_equiangular_head(q: Quantities) -> Array:
    return q.head_geometry["nc2_equiangular_head"]


@_metric(
    "NC2 spread of angles, class means",
    "std over pairs of cos, centred class means",
    dims=_SPLIT,
    best=0,
)
def nc2_cosine_std_means(q: Quantities) -> Array:
    return q.pairs["nc2_cosine_std_means"]


@_metric(
    "NC2 spread of angles, head", "std over pairs of cos, rows of the head", best=0, needs=_HEAD
)
def nc2_cosine_std_head(q: Quantities) -> Array:
    return q.head_geometry["nc2_cosine_std_head"]


@_metric(
    "distance to a simplex ETF",
    "||K/||K||_F - (I - J/C)/sqrt(C-1)||_F, K the Gram matrix of the centred means",
    dims=_SPLIT,
    best=0,
)
def etf_error(q: Quantities) -> Array:
    return q.pairs["etf_error"]


_NC2_BOUND = "from the parts that the budget's terms have in the Gram matrix of the centred means"


@_metric(
    "bound on the distance to a simplex ETF",
    f"at least etf_error; {_NC2_BOUND}",
    most=math.sqrt(2),
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def nc2_bound_etf(q: Quantities) -> Array:
    return q.gram_bounds.etf


@_metric(
    "bound on NC2 norms, class means",
    f"at least nc2_equinorm_means; {_NC2_BOUND}",
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def nc2_bound_equinorm(q: Quantities) -> Array:
    return q.gram_bounds.equinorm


@_metric(
    "bound on NC2 angles, class means",
    f"at least nc2_equiangular_means; {_NC2_BOUND}",
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def nc2_bound_equiangular(q: Quantities) -> Array:
    return q.gram_bounds.equiangular


# Causes that keep the class means from a simplex ETF, in the order of `bounds.gram_deviations`.
GRAM_CAUSES = {
    "asymmetry": "P asymmetry Mdot: residuals differ between classes",
    "within": "P within Mdot: examples of a class differ",
    "gradient": "P gradient Mdot: not at equilibrium yet",
    "outputs": "lambda P E P, E of the class-mean outputs: they differ between classes",
}
for _place, (_cause, _definition) in enumerate(GRAM_CAUSES.items()):
    _metric(
        f"bounds on NC2: share of {_cause}",
        f"share in the bounds on NC2 of {_definition}",
        name=f"nc2_share_{_cause}",
        most=1,
        needs=_THEORY,
        of_equal_classes=True,
    )(lambda q, place=_place: q.gram_bounds.shares[place])


@_metric(
    "NC3", "||W_L/||W_L||_F - Mdot^T/||Mdot||_F||_F^2", dims=_SPLIT, most=4, best=0, needs=_HEAD
)
def nc3(q: Quantities) -> Array:
    return collapse.self_duality(q.statistics.head, q.centred)


@_metric(
    "NC3, centred head",
    "nc3 with the rows of W_L centred",
    dims=_SPLIT,
    most=4,
    best=0,
    needs=_HEAD,
)
def nc3_centered(q: Quantities) -> Array:
    return collapse.self_duality(collapse.centred_means(q.statistics.head), q.centred)


@_metric(
    "floor of NC3",
    "2 - 2 ||P W_L||_F/||W_L||_F, P = I - J/C: the least nc3 that any class means leave this head",
    most=2,
    best=0,
    needs=_HEAD,
)
def nc3_floor(q: Quantities) -> Array:
    return collapse.nc3_floor(q.statistics.head, q.class_weights)


@_metric(
    "bound on NC3",
    "at least nc3, by nc3_centered_bound and nc3_floor, or by angles between terms of the budget",
    most=2,
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def nc3_bound(q: Quantities) -> Array:
    return q.duality_bounds.nc3


@_metric(
    "bound on NC3, centred head",
    "at least nc3_centered, by angles between terms of the budget with rows centred",
    most=2,
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def nc3_centered_bound(q: Quantities) -> Array:
    return q.duality_bounds.nc3_centered


@_metric(
    "NC4",
    "share of examples whose largest output is not that of the nearest class mean",
    dims=_SPLIT,
    most=1,
    best=0,
    needs=("disagreements",),
)
def nc4(q: Quantities) -> Array:
    return q.statistics.disagreements / q.total


@_metric(
    "bound on NC4",
    "1 - accuracy + share of examples too far from their class mean to be certain: at least nc4",
    dims=_SPLIT,
    most=1,
    best=0,
    needs=("correct", "outlying"),
)
def nc4_bound(q: Quantities) -> Array:
    return jnp.minimum(1 - accuracy(q) + q.statistics.outlying / q.total, 1)


@_metric(
    "bound on NC4 by NC1",
    "1 - accuracy + nc1/r^2, r the radius about class means: at least nc4; r^2 = 1/2 of an ETF",
    dims=_SPLIT,
    most=1,
    best=0,
    needs=("correct", "outlying"),
)
def nc4_bound_nc1(q: Quantities) -> Array:
    return bounds.bound_nc4(nc1(q), q.centred, accuracy(q))


@_metric(
    "epsilon",
    "mean residual y - f of an example's own class (f: probabilities with cross-entropy)",
    dims=_SPLIT,
    least=-math.inf,
    needs=("mean_residuals",),
    scale=_AS_OUTPUTS,
)
def epsilon(q: Quantities) -> Array:
    return q.interpolation["epsilon"]


@_metric(
    "delta",
    "minus the mean residual of the other classes",
    dims=_SPLIT,
    least=-math.inf,
    needs=("mean_residuals",),
    scale=_AS_OUTPUTS,
)
def delta(q: Quantities) -> Array:
    return q.interpolation["delta"]


@_metric(
    "gap to symmetric quasi-interpolation",
    "|delta - epsilon/(C-1)|: 0 under symmetric quasi-interpolation",
    dims=_SPLIT,
    best=0,
    needs=("mean_residuals",),
    scale=_AS_OUTPUTS,
)
def sqi_gap(q: Quantities) -> Array:
    return q.interpolation["sqi_gap"]


@_metric(
    "spread of outputs",
    "sqrt(mean ||r - rbar_c||^2/C)",
    dims=_SPLIT,
    best=0,
    needs=("residual_norm",),
    scale=_AS_OUTPUTS,
)
def output_spread(q: Quantities) -> Array:
    return q.statistics.residual_norm / jnp.sqrt(q.total * q.num_classes)


@_metric(
    "asymmetry of outputs",
    "||E||_F/C, E what of the mean residuals is not symmetric between classes",
    dims=_SPLIT,
    best=0,
    needs=("mean_residuals",),
    scale=_AS_OUTPUTS,
)
def output_asymmetry(q: Quantities) -> Array:
    return q.interpolation["output_asymmetry"]


@_metric("squared norm of a layer", "||W_k||_F^2", dims=_LAYER, needs=_HEAD, scale=_AS_HEAD_SQ)
def weight_norm_sq(q: Quantities) -> Array:
    return jnp.sum(q.statistics.head**2)


@_metric(
    "squared norm at equilibrium",
    "mean<r, f - b>/lambda: ||W_k||_F^2 of every layer at equilibrium",
    least=-math.inf,
    needs=("residual_dot_logit", "weight_decay"),
    scale=_AS_PREDICTED_HEAD_SQ,
)
def norm_target(q: Quantities) -> Array:
    return theory.norm_target(q.statistics.residual_dot_logit, q.statistics.weight_decay)


@_metric(
    "equilibrium residual",
    "||lambda W_k + dFit/dW_k||/||lambda W_k||, Fit in eval mode",
    dims=_LAYER,
    best=0,
    needs=_EQUILIBRIUM,
)
def equilibrium_residual(q: Quantities) -> Array:
    split = q.statistics
    return theory.equilibrium_residual(split.head, split.fit_gradient, split.weight_decay)


@_metric(
    "floor of the fit loss",
    "mean<r, f - b>^2/(2 mean ||f - b||^2) <= fit_loss; mean<r, f - b> is lambda ||W_k||_F^2 of "
    "every layer at equilibrium",
    needs=("residual_dot_logit", "head_scatter", "covariance"),
    scale=(0, 0, 2),
)
def fit_loss_floor(q: Quantities) -> Array:
    return bounds.fit_loss_floor(q.statistics.residual_dot_logit, q.mean_square_logit)


@_metric(
    "error of the theorem",
    "||W_L - epsilon/(lambda (C-1)) Mdot^T||/||W_L||: 0 where the theorem holds",
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def theorem_residual(q: Quantities) -> Array:
    split = q.statistics
    epsilon = q.interpolation["epsilon"]
    return theory.theorem_residual(epsilon, split.head, q.centred, split.weight_decay)


@_metric(
    "NC3 of a symmetric solution",
    "nc3 of a symmetric solution at equilibrium with the same mean outputs",
    most=2,
    best=0,
    needs=_THEORY,
    of_equal_classes=True,
)
def symmetric_nc3(q: Quantities) -> Array:
    return q.solution.nc3


@_metric(
    "predicted squared norm of the head",
    "||W_L||_F^2 of a symmetric solution at equilibrium with the same mean outputs",
    needs=_THEORY,
    scale=_AS_PREDICTED_HEAD_SQ,
    of_equal_classes=True,
)
def predicted_head_norm_sq(q: Quantities) -> Array:
    return q.solution.head_norm_sq


@_metric(
    "predicted cosine of the head",
    "cos between rows of its head",
    least=-1,
    most=1,
    needs=_THEORY,
    of_equal_classes=True,
)
def predicted_head_cosine(q: Quantities) -> Array:
    return q.solution.head_cosine


BUDGET_TERMS = {
    "theorem": "(t/C) Mdot^T, the theorem's",
    "mean": "(q/C) 1 mu_G^T: the mean residual does not vanish",
    "asymmetry": "E M^T/C: residuals differ between classes",
    "within": "mean (r - rbar_c)(h - mu_c)^T: examples of a class differ",
    "gradient": "dL/dW_L: not at equilibrium yet",
}


def _enter_budget(name: str, definition: str, **fields) -> None:
    """Enters a number that `theory.budget_account` has under this name."""
    _metric(
        name.replace("_", ": ", 1).replace("_", " "),
        definition,
        name=name,
        needs=_THEORY,
        of_equal_classes=True,
        **fields,
    )(lambda q: q.budget[name])


for _term, _words in BUDGET_TERMS.items():
    _enter_budget(
        f"budget_{_term}", f"share of lambda W_L by projection: {_words}", least=-math.inf
    )
for _term, _words in BUDGET_TERMS.items():
    _enter_budget(f"budget_{_term}_norm", f"Frobenius norm of {_words}", scale=_AS_GRADIENT)
_enter_budget(
    "budget_residual",
    "||lambda W_L - sum of the budget's terms|| over the largest term's norm",
    best=0,
)


@_metric(
    "NC0",
    "||1^T W_L||: the rows of the head add up to 0",
    best=0,
    scale=(0, 1, 0),
    needs=_HEAD,
)
def nc0(q: Quantities) -> Array:
    return jnp.linalg.norm(q.statistics.head.sum(axis=0))


@_metric(
    "norm of features",
    "(mean ||h||^2)^(1/2)",
    dims=_SPLIT,
    scale=(1, 0, 0),
    of_features_alone=True,
)
def mean_feature_norm(q: Quantities) -> Array:
    squares = q.statistics.examples @ jnp.sum(q.statistics.means**2, axis=1)
    return jnp.sqrt((squares + q.statistics.within.sum()) / q.total)


@_metric(
    "effective rank of the class means",
    "exp of the entropy of s_j/sum(s), s the singular values of Mdot: C-1 of a simplex ETF",
    least=1.0,
    of_features_alone=True,
)
def effective_rank(q: Quantities) -> Array:
    return geometry.effective_rank(q.statistics.spectrum)


@_metric(
    "condition of the class means",
    "largest over smallest of the min(C-1, p) singular values of Mdot",
    least=1.0,
    best=1,
    of_features_alone=True,
)
def condition_number(q: Quantities) -> Array:
    return geometry.condition_number(q.statistics.spectrum)


@_metric(
    "GNC2, spread of distances on the sphere",
    "std over pairs of log 1/||u_c - u_c'||, u the normalized centred means",
    best=0,
    of_features_alone=True,
)
def hyperspherical_uniformity(q: Quantities) -> Array:
    return geometry.hyperspherical_uniformity(geometry.normalized(q.centred))


@_metric(
    "UNC3, spread of the cosines of duality",
    "std over classes of cos(W_L^c, mu_c - mu_G)",
    most=1.0,
    best=0,
    needs=_HEAD,
    of_features_alone=True,
)
def uniform_duality(q: Quantities) -> Array:
    return geometry.uniform_duality(q.statistics.head, geometry.normalized(q.centred))


# Computed on the host: the margin by `features.measurement`, the rest by `features.outliers`.
_OF_FEATURES_ALONE |= {
    "one_vs_rest_margin": Metric(
        "GNC2, margin of one class against the rest",
        "least distance of a normalized centred mean from the convex hull of the others; C > p",
        most=2.0,
    ),
    "nc5": Metric(
        "NC5",
        "mean over classes of |cos(mu_c, mu_ood)|, mu_ood the mean of outliers' features",
        most=1.0,
        best=0,
    ),
    "ood_auroc": Metric(
        "separation of outliers",
        "AUROC of ||P (h - mu_G)||/||h - mu_G||, P onto the span of the centred means, as in NECO",
        most=1.0,
        best=1,
    ),
}
FEATURE_VOCABULARY = VOCABULARY | _OF_FEATURES_ALONE

# A singular value of weights below this share of the largest does not count in their rank: weight
# decay makes it ever smaller, and never 0.
RANK_SHARE = 1e-2

_BY_LAYER = ("split", "layer")
_AFTER = "the features after the layer, which the next one takes; of the head, the outputs"

# What a history records besides where `log.layers` is on; what has no function is computed by
# `training.every_layer`.
LAYER_VOCABULARY: dict[str, Metric] = {
    "layer_nc1": Metric(
        "NC1 after each layer",
        f"nc1 of {_AFTER}",
        _BY_LAYER,
        best=0,
    ),
    "layer_cdnv": Metric(
        "CDNV after each layer",
        f"cdnv of {_AFTER}",
        _BY_LAYER,
        best=0,
    ),
    "layer_nc4": Metric(
        "NC4 after each layer",
        f"share of examples whose largest output is not that of the nearest class mean of {_AFTER}",
        _BY_LAYER,
        most=1,
        best=0,
    ),
    "mean_feature_norm": _OF_FEATURES_ALONE["mean_feature_norm"],
    "class_mean_singular_values": Metric(
        "singular values of the class means",
        "singular values of Mdot, the centred class means, descending; the last is 0",
        ("split", "mode"),
        function=lambda q: q.statistics.spectrum * jnp.sqrt(q.num_classes),
    ),
    "layer_rank": Metric(
        "rank of the weights",
        f"number of singular values of W_k above {RANK_SHARE:g} of the largest",
        _LAYER,
    ),
    "layer_effective_rank": Metric(
        "effective rank of the weights",
        "exp of the entropy of s_j/sum(s), s the singular values of W_k",
        _LAYER,
        least=1.0,
    ),
    "layer_condition": Metric(
        "condition of the weights", "largest over smallest singular value of W_k", _LAYER, least=1.0
    ),
    "layer_imbalance": Metric(
        "imbalance of neighbouring layers",
        "||W_{k+1}^T W_{k+1} - W_k W_k^T||_F of layers with nothing or a ReLU between them: which, "
        "the attribute `pairs` of `layer` says",
        _LAYER,
        best=0,
    ),
}


def metrics_in(history: Container[str]) -> dict[str, Metric]:
    """Returns the metrics of a history: `VOCABULARY`, and what of `LAYER_VOCABULARY` it has."""
    layers = {name: metric for name, metric in LAYER_VOCABULARY.items() if name in history}
    return VOCABULARY | layers


def assemble(quantities: Quantities, names: Iterable[str] | None = None) -> dict[str, Array]:
    """Computes the metrics that a split's statistics determine.

    Args:
      quantities: of the split.
      names: metrics that are wanted, of `FEATURE_VOCABULARY` and `LAYER_VOCABULARY`; None: those
        of `VOCABULARY` that are not by class.

    Returns:
      name -> float64 scalar, by class (C,). Metrics whose `needs` are not all there are left out,
      and so are those that have no function.
    """
    if names is None:
        names = [name for name, metric in VOCABULARY.items() if "label" not in metric.dims]
    known = FEATURE_VOCABULARY | LAYER_VOCABULARY
    entries = {name: known[name] for name in names}
    return {
        name: metric.function(quantities)
        for name, metric in entries.items()
        if metric.function is not None and quantities.statistics.has(metric.needs)
    }
