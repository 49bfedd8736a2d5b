"""Defines the statistics of one split, from which every metric is computed.

`class_statistics` computes them from arrays in memory; `training.evaluate` and
`features.measurement` compute the same `Statistics` from examples that come in batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from ncjax.metrics import collapse

AnyArray: TypeAlias = Array | np.ndarray


def wide() -> jnp.dtype:
    """Returns the widest type that JAX computes with here: float64 if it is enabled."""
    return jax.dtypes.canonicalize_dtype(jnp.float64)


class FactoredResiduals(NamedTuple):
    """Holds the mean residuals target e_c - (W mu_c + b) when a (C, C) array would be too large."""

    head: Num[AnyArray, "C p"]
    bias: Num[AnyArray, " C"]
    target: Num[AnyArray, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Statistics:
    """Holds the class means of C classes that all have examples, and sums of deviations from them.

    A field is None if it is unknown.

    Attributes:
      examples: the number of examples of each class.
      means: the class means mu_c as rows.
      center: mu_G, the mean of the class means, or of all examples.
      spectrum: the singular values of Mdot/sqrt(C), descending; 0 beyond the rank.
      within: the sum of ||h - mu_c||^2 of each class.
      along_means: the sum of (u_j^T (h - mu_c))^2 for the left singular vector u_j of each singular
        value.
      basis: the left singular vectors u_j of Mdot as rows; 0 beyond the rank.
      head: W_L.
      head_spectrum: the singular values of W_L, descending; 0 beyond the rank.
      in_row_space: the sum of ||P_W (h - mu_c)||^2, P_W the projector on the row space of W_L.
      correct: the number of examples whose largest output is their class's.
      class_correct: the number of these examples of each class.
      disagreements: the number of examples whose largest output is not the nearest class mean's.
      mean_residuals: rbar_c, the mean residual of class c, as rows, or in factors.
      residual_norm: the square root of the sum of ||r - rbar_c||^2 over examples.
      outlying: the number of examples whose ||Mdot^+ (h - mu_c)|| is at least their class's radius,
        see `collapse.radii_sq`.
      covariance: the sum of (r - rbar_c)(h - mu_c)^T.
      head_scatter: the sum of W (h - mu_c)(h - mu_c)^T.
      residual_dot_logit: the mean of <r, f - b> over examples.
      fit_gradient: the gradient of the fit term with respect to W_L, which is -mean r h^T.
      weight_decay: lambda.
      class_weights: the weights of the class means in mu_G; None if all are equal.
    """

    examples: Num[AnyArray, " C"]
    means: Num[AnyArray, "C p"]
    center: Num[AnyArray, " p"]
    spectrum: Num[AnyArray, " k"]
    within: Num[AnyArray, " C"]
    along_means: Num[AnyArray, " k"]
    basis: Num[AnyArray, "k p"] | None = None
    head: Num[AnyArray, "C p"] | None = None
    head_spectrum: Num[AnyArray, " r"] | None = None
    in_row_space: Num[AnyArray, ""] | None = None
    correct: Num[AnyArray, ""] | None = None
    class_correct: Num[AnyArray, " C"] | None = None
    disagreements: Num[AnyArray, ""] | None = None
    mean_residuals: Num[AnyArray, "C C"] | FactoredResiduals | None = None
    residual_norm: Num[AnyArray, ""] | None = None
    outlying: Num[AnyArray, ""] | None = None
    covariance: Num[AnyArray, "C p"] | None = None
    head_scatter: Num[AnyArray, "C p"] | None = None
    residual_dot_logit: Num[AnyArray, ""] | None = None
    fit_gradient: Num[AnyArray, "C p"] | None = None
    weight_decay: Num[AnyArray, ""] | None = None
    class_weights: Num[AnyArray, " C"] | None = None

    def has(self, names: Iterable[str]) -> bool:
        """Returns whether none of these fields is None."""
        return all(getattr(self, name) is not None for name in names)


def statistics_of_passes(
    means: collapse.ClassMeans,
    frame: collapse.Frame,
    frame_head: collapse.Frame,
    scatter: collapse.Scatter,
    head: Float[Array, "C p"],
    class_correct: Num[Array, " C"] | None = None,
) -> Statistics:
    """Returns the `Statistics` of a split from the sums of two passes over it.

    Args:
      means: the class means of the split.
      frame, frame_head: the spans of its centred class means and of the head.
      scatter: the sums of its second pass.
      class_correct: the number of examples of each class whose largest output is their class's.
    """
    with jax.enable_x64(True):
        mu = means.features.astype(jnp.float64)
        head_scatter = -scatter.covariance
        if scatter.along_head is not None:
            head_scatter = (head @ frame_head.basis.T) @ scatter.along_head
        return Statistics(
            examples=scatter.examples,
            means=mu,
            center=mu.mean(0),
            spectrum=frame.singular_values,
            within=scatter.within,
            along_means=scatter.along_means,
            basis=frame.basis,
            head=head,
            head_spectrum=frame_head.singular_values,
            in_row_space=scatter.in_row_space,
            correct=None if class_correct is None else class_correct.sum(),
            class_correct=class_correct,
            disagreements=scatter.disagreements,
            mean_residuals=means.residuals,
            residual_norm=jnp.sqrt(scatter.residuals),
            outlying=scatter.outlying,
            covariance=scatter.covariance,
            head_scatter=head_scatter,
        )


def class_statistics(
    features: Float[Array, "N p"],
    labels: Int[Array, " N"],
    num_classes: int,
    head: Float[Array, "C p"] | None = None,
    bias: Float[Array, " C"] | None = None,
    logits: Float[Array, "N C"] | None = None,
    weight_decay: Float[Array, ""] | None = None,
) -> Statistics:
    """Computes the statistics of examples in memory; it works under `jit`, `vmap` and the like.

    The outputs are `logits` if given, else W h + b if there is a head. Residuals are those of the
    square loss with one-hot targets. With a weight decay, the equilibrium of the head is of a loss
    with this lambda. The arithmetic is float64 if JAX has it enabled, else float32.
    """
    h, head, bias, logits, weight_decay = jax.tree.map(
        lambda a: a.astype(wide()), (features, head, bias, logits, weight_decay)
    )
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=wide())
    examples = one_hot.sum(0)
    means = one_hot.T @ h / examples[:, None]
    center = means.mean(0)
    centred, deviation = means - center[None], h - means[labels]
    dim = h.shape[1]
    tolerance = collapse.rank_tolerance(features.dtype)
    spectrum, basis = collapse.span(
        centred / jnp.sqrt(num_classes), tolerance, min(num_classes - 1, dim)
    )
    along_means = deviation @ basis.T
    fields: dict[str, Any] = {
        "within": one_hot.T @ jnp.sum(deviation**2, axis=1),
        "along_means": jnp.sum(along_means**2, axis=0),
        "basis": basis,
    }
    if head is not None:
        _, head_basis = collapse.span(head, tolerance, min(head.shape))
        fields["in_row_space"] = jnp.sum((deviation @ head_basis.T) ** 2)
        logits = h @ head.T + (0 if bias is None else bias[None]) if logits is None else logits
    if logits is not None:
        nearest = collapse.nearest_mean((h - center[None]) @ centred.T, jnp.sum(centred**2, axis=1))
        reach = collapse.certificate(centred, spectrum)
        residuals = one_hot - logits
        mean_residuals = one_hot.T @ residuals / examples[:, None]
        fields |= {
            "correct": jnp.sum(jnp.argmax(logits, 1) == labels),
            "disagreements": jnp.sum(jnp.argmax(logits, 1) != nearest),
            "outlying": jnp.sum(reach.is_outside(along_means, labels)),
            "mean_residuals": mean_residuals,
            "residual_norm": jnp.linalg.norm(residuals - mean_residuals[labels]),
        }
        if head is not None and weight_decay is not None:
            fields |= {
                "covariance": (residuals - mean_residuals[labels]).T @ deviation,
                "fit_gradient": -residuals.T @ h / len(h),
                "head_scatter": (deviation @ head.T).T @ deviation,
                "weight_decay": weight_decay,
            }
    return Statistics(examples, means, center, spectrum, head=head, **fields)
