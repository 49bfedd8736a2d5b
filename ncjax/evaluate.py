"""Every measurement of one run, in two passes over each split."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ncjax import collapse, models, objective, theory

# Most rows in a batch of a measurement: enough for matmuls at full rate, few enough to stay in a core's cache.
_ROWS = 256
# A split of at most so many rows keeps its features for the second pass; a larger one computes them again.
_HELD_ROWS = 2048

T = TypeVar("T")


class Split(NamedTuple):
    """M examples on the device: images (M, ...) uint8 or float, labels (M,) int32."""

    images: Shaped[Array, "M *image"]
    labels: Int[Array, " M"]


class Data(NamedTuple):
    """Both splits and what normalizes them: inputs are (images - center) * scale, in the type of `center`.

    scale: one number, or one per pixel.
    """

    train: Split
    test: Split
    center: Float[Array, "*image"]
    scale: Float[Array, "*scale"]

    def normalize(self, images: Shaped[Array, "B *image"]) -> Float[Array, "B *image"]:
        scale = jnp.broadcast_to(self.scale, self.center.shape)
        return (images.astype(self.center.dtype) - self.center[None]) * scale[None]


class _FirstPass(NamedTuple):
    """Sums over examples; r = y - f."""

    classes: collapse.ClassSums
    fit: Float[Array, ""]
    residual_dot_logit: Float[Array, ""]
    correct: Float[Array, ""]


def evaluate(
    params: dict, weight_decay: Float[Array, ""], data: Data, *, model: nn.Module, decayed: dict
) -> dict[str, Array]:
    """Measures one run on both splits; each split uses its own class means.

    Returns:
      name -> scalar, (2,) over train and test, (L,) over layers in forward order, or (C, C) for `class_mean_cosine`
      (of the training split), in the type of the parameters. NaN throughout, but for `finite`, where parameters or
      training loss are not finite.
    """
    with jax.default_matmul_precision("highest"):
        names = models.layer_names(params)
        head, bias = params["head"]["kernel"].T, params["head"].get("bias")

        def first_pass(params: dict, images: Array, labels: Array) -> tuple[Array, tuple]:
            return _first_pass(params, data.normalize(images), labels, model=model, bias=bias)

        def with_gradient(images: Array, labels: Array) -> tuple:
            gradient, (sums, held) = jax.grad(first_pass, has_aux=True)(params, images, labels)
            return (gradient, sums), held

        (gradient_sum, train_sums), train_held = _sum_over_batches(with_gradient, data.train)
        test_sums, test_held = _sum_over_batches(lambda *batch: first_pass(params, *batch)[1], data.test)
        train_means, test_means = (collapse.class_means(sums.classes) for sums in (train_sums, test_sums))
        frame_train, frame_test, frame_head = collapse.frames((train_means, test_means), head)

        def split_metrics(split, first, means, frame, held) -> dict[str, Array]:
            def second_pass(images: Array, labels: Array, *held: Array) -> tuple:
                h, f = held if held else _forward(params, data.normalize(images), model)
                return collapse.class_scatter(h, f, labels, means, frame, frame_head), ()

            scatter, _ = _sum_over_batches(second_pass, split, held)
            fit, penalty = first.fit / len(split.labels), objective.decay_penalty(params, decayed, weight_decay)
            metrics = {"loss": fit + penalty, "fit_loss": fit, "accuracy": first.correct / len(split.labels)}
            return metrics | collapse.measure(means, scatter, frame, head)

        train = split_metrics(data.train, train_sums, train_means, frame_train, train_held)
        test = split_metrics(data.test, test_sums, test_means, frame_test, test_held)
        class_mean_cosine = train.pop("class_mean_cosine")
        del test["class_mean_cosine"]
        metrics = jax.tree.map(lambda *values: jnp.stack(values), train, test)

        gradients = jax.tree.map(lambda g: g / len(data.train.labels), gradient_sum)
        metrics |= collapse.measure_head(head) | {"class_mean_cosine": class_mean_cosine}
        metrics |= _equilibrium(params, gradients, train_sums, train["loss"], weight_decay, names, decayed)
        return _masked(metrics, params, train["loss"], head.dtype)


def _forward(params: dict, x: Array, model: nn.Module) -> tuple[Array, Array]:
    features = jnp.asarray(model.apply({"params": params}, x, method="features"))
    return features, jnp.asarray(model.apply({"params": params}, features, method="logits"))


def _first_pass(params: dict, x: Array, labels: Array, *, model: nn.Module, bias: Array | None) -> tuple[Array, tuple]:
    """Sum of the fit term over a batch, differentiable; then the sums that need no class means, and (h, f)."""
    features, outputs = _forward(params, x, model)
    targets = jax.nn.one_hot(labels, outputs.shape[1], dtype=outputs.dtype)
    valid = targets.sum(1)
    fit = jnp.sum(valid * objective.square_loss(outputs, targets))
    logits = outputs if bias is None else outputs - bias[None]
    sums = _FirstPass(
        collapse.class_sums(features, outputs, labels),
        fit,
        jnp.sum(valid * jnp.sum((targets - outputs) * logits, axis=1)),
        jnp.sum(valid * (jnp.argmax(outputs, axis=1) == labels)),
    )
    return fit, (sums, (features, outputs))


def _sum_over_batches(f: Callable[..., tuple[T, tuple]], split: Split, held: tuple = ()) -> tuple[T, tuple]:
    """Sum over a split of the first result of f(images, labels, *held), and what it gives to be held, per batch.

    The last batch is filled up with label -1, which `f` must leave out. Only a small split's second results are kept.
    """
    size = len(split.labels)
    batches = -(-size // _ROWS)
    rows = -(-size // batches)
    keep = size <= _HELD_ROWS

    def add(total: T, batch: tuple) -> tuple[T, tuple]:
        number, *held = batch
        index = number * rows + jnp.arange(rows)
        images = split.images.at[index].get(mode="clip")
        labels = jnp.where(index < size, split.labels.at[index].get(mode="clip"), -1)
        term, to_hold = f(images, labels, *held)
        return jax.tree.map(jnp.add, total, term), to_hold if keep else ()

    shapes, _ = jax.eval_shape(f, split.images[:rows], split.labels[:rows], *(a[0] for a in held))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(add, zeros, (jnp.arange(batches), *held))


def _equilibrium(
    params: dict,
    gradients: dict,
    sums: _FirstPass,
    loss: Array,
    weight_decay: Array,
    names: tuple[str, ...],
    decayed: dict,
) -> dict[str, Array]:
    """Per-layer and global equilibrium quantities from the full-batch gradient of the fit term."""
    size = sums.classes.examples.sum()
    weights = [params[name]["kernel"] for name in names]
    slopes = [gradients[name]["kernel"] for name in names]
    norms_sq = jnp.stack([jnp.sum(weight**2) for weight in weights])
    residual_dot_logit = sums.residual_dot_logit / size
    return {
        "weight_norm_sq": norms_sq,
        "equilibrium_residual": jnp.stack(
            [theory.equilibrium_residual(w, g, weight_decay) for w, g in zip(weights, slopes, strict=True)]
        ),
        "norm_target": theory.norm_target(residual_dot_logit, weight_decay),
        "lemma2_residual": theory.lemma2_residual(
            loss,
            norms_sq,
            jnp.stack([jnp.sum(w * g) for w, g in zip(weights, slopes, strict=True)]),
            # <r, y - b> = ||r||^2 + <r, f - b>
            2 * sums.fit / size + residual_dot_logit,
            objective.decay_penalty({"head": _bias(params)}, {"head": _bias(decayed)}, weight_decay),
            weight_decay,
        ),
    }


def _bias(tree: dict) -> dict:
    return {name: leaf for name, leaf in tree["head"].items() if name == "bias"}


def _masked(metrics: dict[str, Array], params: dict, loss: Array, dtype) -> dict[str, Array]:
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(params):
        finite &= jnp.isfinite(leaf).all()
    masked = {name: jnp.where(finite, value.astype(dtype), jnp.nan) for name, value in metrics.items()}
    return masked | {"finite": finite.astype(dtype)}
