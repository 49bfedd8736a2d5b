"""Measures neural collapse of features from anywhere, in one call or in two passes one by one."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ncjax.errors import InputError
from ncjax.features.arguments import check_whole
from ncjax.features.pooling import Pool, check_pool

if TYPE_CHECKING:
    from ncjax.features.measurement import find
    from ncjax.features.reference import prepare
    from ncjax.features.result import Measurement
    from ncjax.features.statistics import load, merge, save
    from ncjax.features.streaming import first_pass, second_pass

# Classes that labels alone may ask for: of more they are no numbers of classes, but some other id.
_MOST_INFERRED = 2**22

__all__ = [
    "find",
    "first_pass",
    "load",
    "measure",
    "measure_batches",
    "merge",
    "prepare",
    "save",
    "second_pass",
]


def __getattr__(name: str) -> Any:
    """The two passes one by one. They import JAX, for which a command line must not wait."""
    if name in __all__:
        from ncjax.features import measurement, reference, statistics, streaming

        return next(
            getattr(module, name)
            for module in (measurement, reference, statistics, streaming)
            if hasattr(module, name)
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def measure(
    features: Any,
    labels: Any,
    logits: Any = None,
    *,
    num_classes: int | None = None,
    head: Any = None,
    bias: Any = None,
    loss: str = "square",
    weight_decay: float | None = None,
    global_mean: str = "classes",
    pool: Pool = None,
    ignore_label: int | None = None,
    ood: Any = None,
    float64: bool | None = None,
    rows: int | None = None,
    devices: Sequence[Any] | None = None,
) -> "Measurement":
    """Measures neural collapse of features in memory.

    Computes NC1 and NC2 of any features; with a head NC3 too, with a head or outputs NC4, accuracy
    and quasi-interpolation; with a head and its weight decay the distance from gradient-flow
    equilibrium. Warns of numbers that would mislead, as where they are 0 for another reason than
    collapse.

    Args:
      features: h, (N, p), of NumPy (memory-mapped too), JAX, pandas or DLPack (PyTorch, CuPy).
      labels: (N,), integers from 0 on, or one-hot rows.
      logits: outputs f, (N, C), where they are not W h + b of the head.
      num_classes: C; None: the head's or the logits', else one more than the largest label.
      head: W, (C, p), a row per class, as PyTorch's `Linear.weight`.
      bias: b, (C,), of the head.
      loss: what residuals are of: `square` or `cross_entropy`; see `measure_batches`.
      weight_decay: lambda that the head was trained with, in the units of `measure_batches`.
      global_mean: mu_G is the mean of the class means (`classes`) or of all `examples`.
      pool: makes (N, p) of features of more axes: `mean` over the positions of (N, C, H, W) or
        the tokens of (N, T, p), `flatten`, `cls` (the first token), or a function.
      ignore_label: examples of this label are left out, as -1 or -100.
      ood: features (M, p) of out-of-distribution examples: nc5, and how well they are told apart.
      float64: compute in float64; None: where float32 does not hold the numbers of these types.
      rows: at most so many examples at once; None: 16 to 64 MiB of them.
      devices: JAX devices that share the work; None: all of this process.

    Returns:
      A `Measurement`: `m.nc1`, `m["nc1"]`, `print(m)`, `m.to_dataset()`.

    Raises:
      InputError: a ValueError of one line that names the argument, its value and the way out.

    References:
      Papyan, Han & Donoho, "Prevalence of neural collapse during the terminal phase of deep
      learning training", PNAS 2020; Rangamani & Banburski, "Neural collapse in deep homogeneous
      classifiers and the role of weight decay", ICASSP 2022.

    Examples:
      >>> import numpy as np, ncjax
      >>> features = np.array([[1.5, 0.0], [0.5, 0.0], [-0.5, 0.0], [-1.5, 0.0]])
      >>> m = ncjax.measure(features, np.array([0, 0, 1, 1]), head=np.array([[1.0, 0], [-1, 0]]))
      >>> m.nc1, m["nc4"], m.accuracy
      (0.125, 0.0, 1.0)
    """
    found = measure_batches(
        [(features, labels) if logits is None else (features, labels, logits)],
        num_classes=num_classes,
        head=head,
        bias=bias,
        loss=loss,
        weight_decay=weight_decay,
        global_mean=global_mean,
        pool=pool,
        ignore_label=ignore_label,
        ood=ood,
        float64=float64,
        rows=rows,
        devices=devices,
    )
    for caution in found.cautions:
        warnings.warn(caution, stacklevel=2)
    return found


def measure_batches(
    batches: Iterable,
    *,
    num_classes: int | None = None,
    head: Any = None,
    bias: Any = None,
    loss: str = "square",
    weight_decay: float | None = None,
    global_mean: str = "classes",
    pool: Pool = None,
    ignore_label: int | None = None,
    ood: Any = None,
    float64: bool | None = None,
    rows: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> "Measurement":
    """Measures neural collapse of features that come in batches.

    Batches are iterated twice and must be the same both times: a list, a data loader without random
    augmentation, anything but a generator.

    Args:
      batches: (features, labels) or (features, labels, logits) each, see `measure`, or a mapping
        with these names.
      num_classes: C; None: as the head or the logits of a list have, else one more than its largest
        label.
      head: W, (C, p): nc3, nc1_row_space, nc2_*_head, and outputs W h + b unless there are logits.
      bias: b, (C,).
      loss: what residuals are of: `square` (one-hot targets, r = y - f), `cross_entropy` (r = y -
        softmax(f)).
      weight_decay: lambda of loss + lambda/2 ||W||^2, the loss a mean over examples of 1/2 ||y -
        f||^2, or of the cross-entropy: equilibrium residual, predictions and budget. PyTorch's
        MSELoss has another unit, docs/theory.md.
      global_mean: mu_G is the mean of the class means (`classes`) or of all `examples`; the same
        for balanced classes.
      pool: what makes (N, p) of features of more axes, as in `measure`.
      ignore_label: examples of this label are left out.
      ood: features (M, p) of out-of-distribution examples, of which the batches are read once more.
      float64: compute in float64; None: where float32 does not hold features or logits of their
        type.
      rows: at most so many examples at once; None: 16 MiB of features, or 64 MiB that can be read
        in place.
      devices: JAX devices that share the work; None: all of this process.
      progress: called with the number of examples of every chunk, in both passes.

    Returns:
      A `Measurement`: `m.nc1`, `m["nc1"]`, `print(m)`, `m.to_dataset()`; it says in `cautions`
      what would mislead.

    Raises:
      InputError: a ValueError of one line that names the argument, its value and the way out.

    Examples:
      >>> import numpy as np, ncjax
      >>> rng = np.random.default_rng(0)
      >>> labels = np.arange(300) % 3
      >>> features = np.eye(3)[labels] + 0.1 * rng.standard_normal((300, 3))
      >>> batches = [(features[i : i + 50], labels[i : i + 50]) for i in range(0, 300, 50)]
      >>> m = ncjax.measure_batches(batches, num_classes=3)
      >>> round(m.nc1, 3) == round(ncjax.metrics.nc1(features, labels), 3)
      True
    """

    from ncjax.features import outliers, streaming
    from ncjax.features.measurement import find
    from ncjax.features.reference import Asked, check_asked, prepare

    check_pool(pool)
    _check_types(rows, ignore_label, float64, devices, progress)
    check_asked(Asked(loss, weight_decay, global_mean), head is not None)
    for name, array in (("head", head), ("bias", bias)):
        if array is not None:
            streaming.as_array(name, array)
    outside = None if ood is None else outliers.as_outliers(ood, pool)
    is_held = isinstance(batches, list | tuple)
    if pool is not None or ignore_label is not None:
        batches = streaming.Cleaned(batches, pool, ignore_label)
    if num_classes is None and head is not None:
        kernel = streaming.as_array("head", head)
        num_classes = len(kernel) if kernel.ndim else None
    if num_classes is None and is_held:
        num_classes = max((_classes_in(batch) for batch in batches), default=1)
        if num_classes > _MOST_INFERRED:
            raise InputError(
                "labels", num_classes - 1, "number classes from 0 on, or say how many there are"
            )
    if num_classes is None:
        raise InputError("num_classes", None, "give the number of classes, or a head")
    work = {"rows": rows, "devices": devices, "progress": progress}
    sums = streaming.first_pass(batches, num_classes, float64=float64, **work)
    reference = prepare(
        sums, head=head, bias=bias, loss=loss, weight_decay=weight_decay, global_mean=global_mean
    )
    del sums
    found = find(reference, streaming.second_pass(batches, reference, **work))
    if outside is None:
        return found
    extra = outliers.measure_outliers(reference, batches, outside)
    return dataclasses.replace(found, metrics=found.metrics | extra)


def _check_types(rows: Any, ignore_label: Any, float64: Any, devices: Any, progress: Any) -> None:
    """Raises InputError for arguments of a wrong type."""
    if rows is not None:
        check_whole("rows", rows, 1)
    if ignore_label is not None:
        check_whole("ignore_label", ignore_label)
    if float64 not in (None, True, False):
        raise InputError("float64", float64, "give True, False or None")
    if devices is not None and not isinstance(devices, Sequence):
        raise InputError("devices", devices, "give a list of JAX devices, as jax.devices()")
    if progress is not None and not callable(progress):
        raise InputError("progress", progress, "give a function of a number of examples")


def _classes_in(batch: Any) -> int:
    """Returns the columns of a batch's logits, or one more than its largest label.

    It is 1 where the batch is none, as will be said of it.
    """
    from ncjax.features import streaming

    try:
        _, labels, *rest = streaming.as_parts(batch)
        if rest:
            logits = streaming.as_array("logits", rest[0])
            return logits.shape[-1] if logits.ndim else 1
        labels = streaming.label_array(labels)
    except InputError:
        return 1
    return max(1, int(labels.max()) + 1) if labels.size else 1
