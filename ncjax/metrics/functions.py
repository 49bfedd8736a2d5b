"""Each metric alone, of arrays in memory: `ncjax.metrics.nc1(features, labels)`, the way of
scikit-learn's metrics.

`ncjax.measure` computes all of them in one go, of any amount of data.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer
from jaxtyping import Array

from ncjax.errors import InputError
from ncjax.metrics import collapse
from ncjax.metrics.statistics import class_statistics
from ncjax.metrics.vocabulary import VOCABULARY, Quantities

# NumPy and JAX arrays, nested lists, and whatever becomes an array by itself.
ArrayLike: TypeAlias = npt.ArrayLike | Array


def nc1(features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None) -> Any:
    """Computes NC1, the scatter of features within classes relative to that of the class means.

    tr(Sigma_W Sigma_B^+)/C, with Sigma_W the within-class covariance, Sigma_B = Mdot Mdot^T/C the
    covariance of the class means and ^+ the pseudoinverse. Its range is [0, inf); 0 is collapse.
    NaN where all class means coincide.

    Args:
      features: h, (N, p).
      labels: (N,), integers from 0 to C - 1.
      num_classes: C; None: one more than the largest label. Inside `jax.jit` it must be given.

    Returns:
      A float; inside `jax.jit` or `jax.vmap` an array of the precision there.

    Raises:
      InputError: arrays do not fit together, or a class has no example.

    References:
      Papyan, Han & Donoho, "Prevalence of neural collapse during the terminal phase of deep
      learning training", PNAS 2020.

    Examples:
      Two classes at distance 2 on a line, with variance 1/4 across it:

      >>> import numpy as np
      >>> from ncjax import metrics
      >>> features = np.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
      >>> metrics.nc1(features, [0, 0, 1, 1])
      0.0
      >>> round(metrics.nc1([[1.5, 0.0], [0.5, 0.0], [-0.5, 0.0], [-1.5, 0.0]], [0, 0, 1, 1]), 12)
      0.125
    """
    return _of_features("nc1", features, labels, num_classes)


def nc1_trace_ratio(
    features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None
) -> Any:
    """Computes tr(Sigma_W)/tr(Sigma_B), the scatter within classes over that of the class means,
    directions left aside.

    Its range is [0, inf); 0 is collapse. Arguments, result and errors are those of `nc1`.

    Examples:
      >>> from ncjax import metrics
      >>> features = [[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]]
      >>> metrics.nc1_trace_ratio(features, [0, 0, 1, 1])
      0.25
    """
    return _of_features("nc1_trace_ratio", features, labels, num_classes)


def cdnv(features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None) -> Any:
    """Computes the class-distance normalized variance.

    The mean over pairs of classes of (v_c + v_c')/(2 ||mu_c - mu_c'||^2), where v_c is the mean of
    ||h - mu_c||^2 over class c. Its range is [0, inf); 0 is collapse. Arguments, result and errors
    are those of `nc1`.

    References:
      Galanti, Gyorgy & Hutter, "On the role of neural collapse in transfer learning", ICLR 2022.

    Examples:
      >>> from ncjax import metrics
      >>> metrics.cdnv([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]], [0, 0, 1, 1])
      0.0625
    """
    return _of_features("cdnv", features, labels, num_classes)


def nc2_equinorm(features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None) -> Any:
    """Computes NC2's equal norms: the standard deviation over the mean of ||mu_c - mu_G||.

    Its range is [0, inf); 0 is a set of centred class means of one length. Arguments, result and
    errors are those of `nc1`; the vocabulary's name is `nc2_equinorm_means`.

    Examples:
      >>> from ncjax import metrics
      >>> metrics.nc2_equinorm([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]], [0, 0, 1, 1])
      0.0
    """
    return _of_features("nc2_equinorm_means", features, labels, num_classes)


def nc2_equiangular(
    features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None
) -> Any:
    """Computes NC2's equal angles: the mean over pairs of classes of
    `|cos(mu_c - mu_G, mu_c' - mu_G) + 1/(C-1)|`.

    Its range is [0, 1 + 1/(C-1)]; 0 is the angle of a simplex equiangular tight frame (ETF) between
    every two centred class means. Arguments, result and errors are those of `nc1`; the vocabulary's
    name is `nc2_equiangular_means`.

    Examples:
      >>> from ncjax import metrics
      >>> metrics.nc2_equiangular([[1.0, 0.0], [-1.0, 0.0]], [0, 1])
      0.0
    """
    return _of_features("nc2_equiangular_means", features, labels, num_classes)


def etf_error(features: ArrayLike, labels: ArrayLike, *, num_classes: int | None = None) -> Any:
    """Computes the distance of the centred class means to a simplex ETF, up to scale and rotation.

    ||K/||K||_F - (I - J/C)/sqrt(C-1)||_F with K = Mdot^T Mdot, the Gram matrix of the centred class
    means. Its range is [0, sqrt(2)]; 0 is NC2 in norms and angles. Arguments, result and errors are
    those of `nc1`.

    Examples:
      >>> from ncjax import metrics
      >>> round(metrics.etf_error([[1.0, 0.0], [-1.0, 0.0]], [0, 1]), 12)
      0.0
    """
    return _of_features("etf_error", features, labels, num_classes)


def nc3(
    features: ArrayLike, labels: ArrayLike, head: ArrayLike, *, num_classes: int | None = None
) -> Any:
    """Computes NC3, the squared distance of the normalized head from the normalized centred class
    means.

    ||W_L/||W_L||_F - Mdot^T/||Mdot||_F||_F^2. Its range is [0, 4]; 0 is self-duality: every row of
    the head is proportional to its class's centred mean.

    Args:
      features: h, (N, p).
      labels: (N,), integers from 0 to C - 1.
      head: W_L, (C, p), a row per class, as PyTorch's `Linear.weight`.
      num_classes: C; None: the rows of the head.

    Returns:
      A float; inside `jax.jit` or `jax.vmap` an array of the precision there.

    Raises:
      InputError: arrays do not fit together, or a class has no example.

    Examples:
      >>> from ncjax import metrics
      >>> features, labels = [[2.0, 0.0], [-2.0, 0.0]], [0, 1]
      >>> round(metrics.nc3(features, labels, [[1.0, 0.0], [-1.0, 0.0]]), 12)
      0.0
      >>> round(metrics.nc3(features, labels, [[-1.0, 0.0], [1.0, 0.0]]), 12)
      4.0
    """
    return _of_features("nc3", features, labels, num_classes, head=head)


def nc3_floor(head: ArrayLike) -> Any:
    """Computes the least NC3 that a head can have with any class means.

    2 - 2 ||P W_L||_F/||W_L||_F with P = I - J/C. Its range is [0, 2]; it is 0 where the rows of the
    head add up to 0, and 2 - 2 sqrt((C-1)/C) of an orthogonal frame.

    Args:
      head: W_L, (C, p), a row per class, as PyTorch's `Linear.weight`.

    Returns:
      A float; inside `jax.jit` or `jax.vmap` an array of the precision there.

    Raises:
      InputError: the head is no matrix of finite numbers with two rows or more.

    Examples:
      >>> from ncjax import metrics
      >>> metrics.nc3_floor([[1.0, 0.0], [-1.0, 0.0]])
      0.0
      >>> round(metrics.nc3_floor([[1.0, 0.0], [0.0, 1.0]]), 6)
      0.585786
    """
    if isinstance(head, Tracer):
        return collapse.nc3_floor(head, jnp.ones(len(head)))
    with jax.enable_x64(True):
        array = np.asarray(head)
        _check_numbers("head", array)
        if array.ndim != 2 or len(array) < 2 or array.shape[1] < 1:
            raise InputError("head", array.shape, "give (C, p), a row per class")
        return float(collapse.nc3_floor(jnp.asarray(array, jnp.float64), jnp.ones(len(array))))


def nc4(
    features: ArrayLike,
    labels: ArrayLike,
    head: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    logits: ArrayLike | None = None,
    num_classes: int | None = None,
) -> Any:
    """Computes NC4, the share of examples on which the outputs and the nearest class mean disagree.

    Its range is [0, 1]; at 0 the network classifies as the nearest class mean does.

    Args:
      features: h, (N, p).
      labels: (N,), integers from 0 to C - 1.
      head: W_L, (C, p): outputs are W_L h + b, unless `logits` are given.
      bias: b, (C,).
      logits: outputs, (N, C).
      num_classes: C; None: one more than the largest label, or the rows of the head.

    Returns:
      A float; inside `jax.jit` or `jax.vmap` an array of the precision there.

    Raises:
      InputError: arrays do not fit together, a class has no example, or there are neither head nor
        logits.

    Examples:
      >>> from ncjax import metrics
      >>> logits = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
      >>> metrics.nc4([[2.0], [-2.0], [3.0]], [0, 1, 0], logits=logits)
      0.3333333333333333
    """
    if head is None and logits is None:
        raise InputError("head", None, "give a head or logits: nc4 compares outputs")
    return _of_features("nc4", features, labels, num_classes, head=head, bias=bias, logits=logits)


def nc1_bound(
    features: ArrayLike,
    labels: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weight_decay: float | Array,
    num_classes: int | None = None,
) -> Any:
    """Computes an upper bound on NC1 from the head's distance to equilibrium and symmetry.

    It holds at any weights; its causes are the scatter of outputs and, by what the equilibrium
    budget leaves of the theorem, that of features (docs/theory.md, section 5). The loss is the
    square loss with one-hot targets. Its range is [nc1, inf). It is NaN at lambda = 0, where the
    mean residual shows no difference between classes (t <= 0), and where centred class means have a
    rank below C - 1.

    Args:
      features: h, (N, p).
      labels: (N,), integers from 0 to C - 1, the same number of each.
      head: W_L, (C, p), a row per class: outputs are W_L h + b.
      bias: b, (C,).
      weight_decay: lambda of the loss 1/2 mean ||y - f||^2 + lambda/2 ||W_L||^2.
      num_classes: C; None: the rows of the head.

    Returns:
      A float; inside `jax.jit` or `jax.vmap` an array of the precision there.

    Raises:
      InputError: arrays do not fit together, a class has no example, or classes differ in size.

    Examples:
      Two classes whose features and head are as the theorem says, for lambda = 0.1:

      >>> from ncjax import metrics
      >>> features, labels, head = [[1.0], [-1.0]], [0, 1], [[0.4167], [-0.4167]]
      >>> round(metrics.nc1_bound(features, labels, head, [0.5, 0.5], weight_decay=0.1), 6)
      0.0
    """
    return _of_equilibrium("nc1_bound", features, labels, head, bias, weight_decay, num_classes)


def nc2_bound(
    features: ArrayLike,
    labels: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weight_decay: float | Array,
    num_classes: int | None = None,
) -> Any:
    """Computes an upper bound on `etf_error`, NC2 of the class means, from the equilibrium budget.

    Its causes are asymmetry between classes, scatter within them and what is left of the gradient.
    Its range is [etf_error, sqrt(2)]. It is NaN where t <= 0. Arguments, result and errors are
    those of `nc1_bound`; the vocabulary's name is `nc2_bound_etf`.

    Examples:
      >>> from ncjax import metrics
      >>> features, labels, head = [[1.0], [-1.0]], [0, 1], [[0.4], [-0.4]]
      >>> round(metrics.nc2_bound(features, labels, head, weight_decay=0.1), 6)
      0.0
    """
    return _of_equilibrium("nc2_bound_etf", features, labels, head, bias, weight_decay, num_classes)


def nc3_bound(
    features: ArrayLike,
    labels: ArrayLike,
    head: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    weight_decay: float | Array,
    num_classes: int | None = None,
) -> Any:
    """Computes an upper bound on NC3 from the equilibrium budget and NC3's floor.

    Its range is [nc3, 2]. It is NaN where t <= 0, and where the head makes no acute angle with the
    centred class means. Arguments, result and errors are those of `nc1_bound`.

    Examples:
      >>> from ncjax import metrics
      >>> features, labels, head = [[1.0], [-1.0]], [0, 1], [[0.4], [-0.4]]
      >>> round(metrics.nc3_bound(features, labels, head, weight_decay=0.1), 6)
      0.0
    """
    return _of_equilibrium("nc3_bound", features, labels, head, bias, weight_decay, num_classes)


def nc4_bound(
    features: ArrayLike,
    labels: ArrayLike,
    head: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    logits: ArrayLike | None = None,
    num_classes: int | None = None,
) -> Any:
    """Computes an upper bound on NC4: 1 - accuracy + the share of examples outside their ball.

    The ball about a class mean is one in which no other class mean is nearer; 0 certifies that NC4
    is 0. Its range is [nc4, 1]. Arguments, result and errors are those of `nc4`.

    Examples:
      >>> from ncjax import metrics
      >>> logits = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
      >>> metrics.nc4_bound([[2.1], [1.9], [-2.1], [-1.9]], [0, 0, 1, 1], logits=logits)
      0.0
    """
    if head is None and logits is None:
        raise InputError("head", None, "give a head or logits: nc4 compares outputs")
    return _of_features(
        "nc4_bound", features, labels, num_classes, head=head, bias=bias, logits=logits
    )


def _of_equilibrium(
    name: str,
    features: Any,
    labels: Any,
    head: Any,
    bias: Any,
    weight_decay: Any,
    num_classes: int | None,
) -> Any:
    """Computes a metric of the equilibrium of classes of one size."""
    if not isinstance(labels, Tracer):
        counts = np.unique_counts(np.asarray(labels)).counts
        if counts.size and counts.min() < counts.max():
            found = f"{counts.min()} to {counts.max()} examples of a class"
            raise InputError("labels", found, "the equilibrium budget is of classes of one size")
    return _of_features(
        name, features, labels, num_classes, head=head, bias=bias, weight_decay=weight_decay
    )


def _of_features(
    name: str, features: Any, labels: Any, num_classes: int | None, **others: Any
) -> Any:
    """Computes the metric of this name: in float64, a float; of traced arrays, an array."""
    arrays = {"features": features, "labels": labels} | {
        k: v for k, v in others.items() if v is not None
    }
    if any(isinstance(value, Tracer) for value in arrays.values()):
        if num_classes is None:
            raise InputError(
                "num_classes", None, "give it: inside jax.jit the labels are not known"
            )
        return _metric(
            {k: jnp.asarray(v) for k, v in arrays.items()}, name=name, num_classes=num_classes
        )
    with jax.enable_x64(True):
        arrays = {k: np.asarray(v) for k, v in arrays.items()}
        num_classes = _checked(arrays, num_classes)
        labels = arrays.pop("labels").astype(np.int32)
        wide = {k: v.astype(np.float64) if v.dtype.kind in "iu" else v for k, v in arrays.items()}
        return float(_metric(wide | {"labels": labels}, name=name, num_classes=num_classes))


@functools.partial(jax.jit, static_argnames=("name", "num_classes"))
def _metric(arrays: dict[str, Array], *, name: str, num_classes: int) -> Array:
    function = VOCABULARY[name].function
    assert function is not None
    return function(Quantities(class_statistics(num_classes=num_classes, **arrays)))


def _checked(arrays: dict[str, np.ndarray], num_classes: int | None) -> int:
    """Returns the number of classes of arrays that fit together, or raises InputError."""
    features, labels = arrays["features"], arrays["labels"]
    for name, array in arrays.items():
        _check_numbers(name, array)
    if features.ndim != 2 or 0 in features.shape:
        raise InputError("features", features.shape, "give (N, p), a row per example")
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(
            "labels", f"{labels.dtype} {labels.shape}", f"give integers, ({len(features)},)"
        )
    if num_classes is None:
        num_classes = len(arrays["head"]) if "head" in arrays else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise InputError(
            "labels", wrong, f"with {num_classes} classes they are 0 to {num_classes - 1}"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if empty.size or num_classes < 2:
        way_out = (
            "every class needs an example, and there must be two; ncjax.measure leaves out "
            "classes without one"
        )
        raise InputError(
            "labels", f"no example of class {empty[0]}" if empty.size else "one class", way_out
        )
    shapes = {
        "head": (num_classes, features.shape[1]),
        "bias": (num_classes,),
        "logits": (len(features), num_classes),
        "weight_decay": (),
    }
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise InputError(name, arrays[name].shape, f"give {shape}")
    return num_classes


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "iuf" and array.dtype != jnp.bfloat16:
        raise InputError(name, str(array.dtype), "give an array of numbers")
    if not np.isfinite(array).all():
        raise InputError(name, "a number that is not finite", "leave it out")
