"""Every measurement of one run, in two passes over each split."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ncjax.metrics import collapse, theory
from ncjax.metrics.statistics import Statistics, statistics_of_passes
from ncjax.metrics.vocabulary import VOCABULARY, Quantities, assemble
from ncjax.training import models
from ncjax.training.mesh import Share
from ncjax.training.objective import Objective, decay_penalty

# Most rows in a batch of a measurement: enough for matmuls at full rate, few enough to stay in a
# core's cache.
_ROWS = 256
# A split of at most so many rows keeps its features for the second pass; a larger one computes them
# again.
_HELD_ROWS = 2048

T = TypeVar("T")


class Split(NamedTuple):
    """M examples on the device: images (M, ...) uint8 or float, labels (M,) int32."""

    images: Shaped[Array, "M *image"]
    labels: Int[Array, " M"]


class Data(NamedTuple):
    """Both splits and what normalizes them: inputs are (images - center) * scale, in the type of
    `center`.

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
    """Sums over examples."""

    classes: collapse.ClassSums
    fit: Float[Array, ""]
    residual_dot_logit: Float[Array, ""]
    correct: Float[Array, " C"]


def evaluate(
    variables: dict,
    weight_decay: Float[Array, ""],
    data: Data,
    *,
    model: models.Network,
    decayed: dict,
    objective: Objective = Objective(),  # noqa: B008 (immutable)
    is_balanced: bool = True,
    share: Share = Share(),  # noqa: B008
) -> dict[str, Array]:
    """Measures one run on both splits; each split uses its own class means.

    Args:
      variables: flax's: `params`, and `batch_stats` where there is batch normalization, which is
        then in eval mode.
      weight_decay: lambda of the loss that is minimized, `optim.effective_decay`.
      is_balanced: whether all classes have as many training examples.
      share: of the examples, where several devices measure one run: sums are added up, features
        stay where they are.

    Returns:
      name -> scalar, (2,) over train and test, (L,) over layers in forward order, (C,) or (2, C) by
      class, or (C, C): `class_mean_cosine` and `class_mean_logits` (row c is W mu_c) of the
      training split. All in the type of the parameters. NaN throughout, but for `finite`, where
      parameters or training loss are not finite. NaN where batch normalization leaves no meaning:
      `equilibrium_residual` of all layers but the head, `lemma2_residual`, `normalized_margin`. NaN
      where classes are of different sizes and a metric is of equal ones.
    """
    with jax.default_matmul_precision("highest"):
        params = variables["params"]
        names = models.layer_names(params)
        head = params["head"]["kernel"].T

        def first_pass(params: dict, images: Array, labels: Array) -> tuple[Array, tuple]:
            at = variables | {"params": params}
            return _first_pass(at, data.normalize(images), labels, model=model, objective=objective)

        def with_gradient(images: Array, labels: Array) -> tuple:
            gradient, (sums, held) = jax.grad(first_pass, has_aux=True)(params, images, labels)
            return (gradient, sums), held

        (gradient_sum, train_sums), train_held = _sum_over_batches(with_gradient, data.train, share)
        test_sums, test_held = _sum_over_batches(
            lambda *batch: first_pass(params, *batch)[1], data.test, share
        )
        train_means, test_means = (
            collapse.class_means(sums.classes) for sums in (train_sums, test_sums)
        )
        frame_train, frame_test, frame_head = collapse.frames((train_means, test_means), head)

        def split_statistics(
            split: Split,
            first: _FirstPass,
            means: collapse.ClassMeans,
            frame: collapse.Frame,
            held: tuple,
        ) -> Statistics:
            def second_pass(images: Array, labels: Array, *held: Array) -> tuple:
                h, f = held if held else _forward(variables, data.normalize(images), model)
                residuals = objective.residual(f, objective.target(labels, f.shape[1], f.dtype))
                return collapse.class_scatter(
                    h, residuals, jnp.argmax(f, 1), labels, means, frame, frame_head
                ), ()

            scatter, _ = _sum_over_batches(second_pass, split, share, held)
            return statistics_of_passes(means, frame, scatter, head, first.correct)

        gradients = jax.tree.map(lambda g: g / len(data.train.labels), gradient_sum)
        train = dataclasses.replace(
            split_statistics(data.train, train_sums, train_means, frame_train, train_held),
            residual_dot_logit=train_sums.residual_dot_logit / train_sums.classes.examples.sum(),
            fit_gradient=gradients["head"]["kernel"].T,
            weight_decay=weight_decay,
        )
        test = split_statistics(data.test, test_sums, test_means, frame_test, test_held)
        fits = (train_sums.fit / len(data.train.labels), test_sums.fit / len(data.test.labels))
        penalty = decay_penalty(params, decayed, weight_decay)
        loss = jnp.stack([fit + penalty for fit in fits])
        with jax.enable_x64(True):
            quantities = Quantities(train)
            metrics = _by_split(quantities, Quantities(test))
            metrics |= {"loss": loss, "fit_loss": jnp.stack(fits)}
            metrics |= _of_network(
                params, gradients, quantities, train_sums, loss[0], weight_decay, names, decayed
            )
        if objective.loss != "square":  # an identity of the square loss alone
            metrics["lemma2_residual"] = jnp.full((), jnp.nan)
        if not model.is_homogeneous:
            metrics |= {
                name: jnp.full((), jnp.nan) for name in ("lemma2_residual", "normalized_margin")
            }
            metrics["equilibrium_residual"] = metrics["equilibrium_residual"].at[:-1].set(jnp.nan)
        if not is_balanced:
            metrics |= {
                name: jnp.full((), jnp.nan)
                for name, metric in VOCABULARY.items()
                if metric.of_equal_classes
            }
        return _masked(metrics, params, loss[0], head.dtype)


def _by_split(train: Quantities, test: Quantities) -> dict[str, Array]:
    """Returns the metrics of both splits together, and those of training alone.

    What has a number for every layer is left to `_of_network`.
    """
    of_splits = [name for name, metric in VOCABULARY.items() if "split" in metric.dims]
    of_training = [name for name, metric in VOCABULARY.items() if metric.dims in ((), ("label",))]
    pairs = assemble(train, of_splits), assemble(test, of_splits)
    return jax.tree.map(lambda *values: jnp.stack(values), *pairs) | assemble(train, of_training)


def _of_network(
    params: dict,
    gradients: dict,
    quantities: Quantities,
    sums: _FirstPass,
    loss: Array,
    weight_decay: Array,
    names: tuple[str, ...],
    decayed: dict,
) -> dict[str, Array]:
    """Returns metrics of all layers, and (C, C) matrices of the class means."""
    pairs = [(params[name]["kernel"], gradients[name]["kernel"]) for name in names]
    norms_sq = jnp.stack([jnp.sum(kernel**2) for kernel, _ in pairs])
    lemma2 = theory.lemma2_residual(
        loss,
        norms_sq,
        jnp.stack([jnp.sum(kernel * gradient) for kernel, gradient in pairs]),
        # <r, y - b> = ||r||^2 + <r, f - b>
        (2 * sums.fit + sums.residual_dot_logit) / sums.classes.examples.sum(),
        decay_penalty({"head": _bias(params)}, {"head": _bias(decayed)}, weight_decay),
        weight_decay,
    )
    residuals = [theory.equilibrium_residual(*pair, weight_decay) for pair in pairs]
    return {
        "weight_norm_sq": norms_sq,
        "equilibrium_residual": jnp.stack(residuals),
        "lemma2_residual": lemma2,
        "normalized_margin": theory.normalized_margin(
            quantities.logit_part, norms_sq.astype(jnp.float64)
        ),
        "class_mean_cosine": collapse.cosines(quantities.centred),
        "class_mean_logits": quantities.class_mean_logits,
    }


def _forward(variables: dict, x: Array, model: models.Network) -> tuple[Array, Array]:
    features = jnp.asarray(model.apply(variables, x, method="features"))
    return features, jnp.asarray(model.apply(variables, features, method="logits"))


def _first_pass(
    variables: dict, x: Array, labels: Array, *, model: models.Network, objective: Objective
) -> tuple[Array, tuple]:
    """Sum of the fit term over a batch, differentiable; then the sums that need no class means,
    and (h, f).
    """
    features, outputs = _forward(variables, x, model)
    y = objective.target(labels, outputs.shape[1], outputs.dtype)
    residuals, valid = objective.residual(outputs, y), labels >= 0
    fit = jnp.sum(valid * objective.fit(outputs, y))
    correct = (valid & (jnp.argmax(outputs, axis=1) == labels)).astype(outputs.dtype)
    bias = variables["params"]["head"].get("bias")
    logits = outputs if bias is None else outputs - bias[None]
    sums = _FirstPass(
        collapse.class_sums(features, residuals, labels),
        fit,
        jnp.sum(valid * jnp.sum(residuals * logits, axis=1)),
        correct @ jax.nn.one_hot(labels, outputs.shape[1], dtype=outputs.dtype),
    )
    return fit, (sums, (features, outputs))


def _sum_over_batches(
    f: Callable[..., tuple[T, tuple]], split: Split, share: Share, held: tuple = ()
) -> tuple[T, tuple]:
    """Sum over a split of the first result of f(images, labels, *held), and what it gives to be
    held, per batch.

    Where devices share the split, each goes over its own rows, and their sums are added up at the
    end. The last batch is filled up with label -1, which `f` must leave out. Only a small split's
    second results are kept.
    """
    size = len(split.labels)
    mine = -(-size // share.devices)
    batches = -(-mine // _ROWS)
    rows = -(-mine // batches)
    keep = size <= _HELD_ROWS

    def add(total: T, batch: tuple) -> tuple[T, tuple]:
        number, *held = batch
        place = number * rows + jnp.arange(rows)
        index = share.first(mine) + place
        images = split.images.at[index].get(mode="clip")
        labels = jnp.where(
            (place < mine) & (index < size), split.labels.at[index].get(mode="clip"), -1
        )
        term, to_hold = f(images, labels, *held)
        return jax.tree.map(jnp.add, total, term), to_hold if keep else ()

    shapes, _ = jax.eval_shape(f, split.images[:rows], split.labels[:rows], *(a[0] for a in held))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, to_hold = lax.scan(add, zeros, (jnp.arange(batches), *held))
    return share.sum(total), to_hold


def _bias(tree: dict) -> dict:
    return {name: leaf for name, leaf in tree["head"].items() if name == "bias"}


def _masked(metrics: dict[str, Array], params: dict, loss: Array, dtype) -> dict[str, Array]:
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(params):
        finite &= jnp.isfinite(leaf).all()
    masked = {
        name: jnp.where(finite, value.astype(dtype), jnp.nan) for name, value in metrics.items()
    }
    return masked | {"finite": finite.astype(dtype)}
