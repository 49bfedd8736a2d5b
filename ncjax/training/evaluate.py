"""Every measurement of one run, in two passes over each split."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ncjax.metrics import collapse, theory
from ncjax.metrics.linalg import symmetric_part
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
    correct: Float[Array, ""]


def evaluate(
    variables: dict,
    weight_decay: Float[Array, ""],
    data: Data,
    *,
    model: models.Network,
    decayed: dict,
    objective: Objective = Objective(),  # noqa: B008 (immutable)
    share: Share = Share(),  # noqa: B008
) -> dict[str, Array]:
    """Measures one run on both splits; each split uses its own class means.

    Args:
      variables: flax's: `params`, and `batch_stats` where there is batch normalization, which is
        then in eval mode.
      weight_decay: lambda of the loss that is minimized, `optim.effective_decay`.
      share: of the examples, where several devices measure one run: sums are added up, features
        stay where they are.

    Returns:
      name -> scalar, (2,) over train and test, (L,) over layers in forward order, or (C, C):
      `class_mean_cosine` and `class_mean_logits` (row c is W mu_c) of the training split. All in
      the type of the parameters. NaN throughout, but for `finite`, where parameters or training
      loss are not finite. NaN where batch normalization leaves no
      meaning: `equilibrium_residual` of all layers but the head, `lemma2_residual`,
        `normalized_margin`.
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

        def split_metrics(
            split, first, means, frame, held
        ) -> tuple[dict[str, Array], collapse.Scatter]:
            def second_pass(images: Array, labels: Array, *held: Array) -> tuple:
                h, f = held if held else _forward(variables, data.normalize(images), model)
                residuals = objective.residual(f, objective.target(labels, f.shape[1], f.dtype))
                return collapse.class_scatter(
                    h, residuals, jnp.argmax(f, 1), labels, means, frame, frame_head
                ), ()

            scatter, _ = _sum_over_batches(second_pass, split, share, held)
            fit, penalty = (
                first.fit / len(split.labels),
                decay_penalty(params, decayed, weight_decay),
            )
            metrics = {
                "loss": fit + penalty,
                "fit_loss": fit,
                "accuracy": first.correct / len(split.labels),
            }
            return metrics | collapse.measure(means, scatter, frame, head), scatter

        train, scatter = split_metrics(data.train, train_sums, train_means, frame_train, train_held)
        test, _ = split_metrics(data.test, test_sums, test_means, frame_test, test_held)
        class_mean_cosine = train.pop("class_mean_cosine")
        del test["class_mean_cosine"]
        metrics = jax.tree.map(lambda *values: jnp.stack(values), train, test)

        gradients = jax.tree.map(lambda g: g / len(data.train.labels), gradient_sum)
        norms_sq = jnp.stack([jnp.sum(params[name]["kernel"] ** 2) for name in names])
        metrics |= collapse.measure_head(head) | {
            "class_mean_cosine": class_mean_cosine,
            "weight_norm_sq": norms_sq,
        }
        metrics |= _equilibrium(params, gradients, train_sums, weight_decay, names)
        metrics |= _predictions(
            train_means, scatter, gradients["head"]["kernel"].T, head, norms_sq, weight_decay
        )
        lemma2 = _lemma2(
            params, gradients, train_sums, train["loss"], norms_sq, weight_decay, names, decayed
        )
        # An identity of the square loss alone.
        metrics["lemma2_residual"] = (
            lemma2 if objective.loss == "square" else jnp.full_like(lemma2, jnp.nan)
        )
        if not model.is_homogeneous:
            metrics |= {
                name: jnp.full_like(metrics[name], jnp.nan)
                for name in ("lemma2_residual", "normalized_margin")
            }
            metrics["equilibrium_residual"] = metrics["equilibrium_residual"].at[:-1].set(jnp.nan)
        return _masked(metrics, params, train["loss"], head.dtype)


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
    bias = variables["params"]["head"].get("bias")
    logits = outputs if bias is None else outputs - bias[None]
    sums = _FirstPass(
        collapse.class_sums(features, residuals, labels),
        fit,
        jnp.sum(valid * jnp.sum(residuals * logits, axis=1)),
        jnp.sum(valid * (jnp.argmax(outputs, axis=1) == labels)),
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


def _equilibrium(
    params: dict, gradients: dict, sums: _FirstPass, weight_decay: Array, names: tuple[str, ...]
) -> dict[str, Array]:
    """How far each layer is from a critical point, and the norm they would all have there."""
    pairs = [(params[name]["kernel"], gradients[name]["kernel"]) for name in names]
    return {
        "equilibrium_residual": jnp.stack(
            [theory.equilibrium_residual(*pair, weight_decay) for pair in pairs]
        ),
        "norm_target": theory.norm_target(
            sums.residual_dot_logit / sums.classes.examples.sum(), weight_decay
        ),
    }


def _predictions(
    means: collapse.ClassMeans,
    scatter: collapse.Scatter,
    head_gradient: Array,
    head: Array,
    norms_sq: Array,
    weight_decay: Array,
) -> dict[str, Array]:
    """What theory says of the head, from the class means and mean residuals of the training
    split. Float64.
    """
    mu, residuals, covariance, gradient, head, norms_sq, weight_decay = (
        a.astype(jnp.float64)
        for a in (
            *(means.features, means.residuals, scatter.covariance / scatter.examples.sum()),
            *(head_gradient, head, norms_sq, weight_decay),
        )
    )
    logits = mu @ head.T
    terms = theory.budget(residuals, mu, covariance, gradient + weight_decay * head)
    logit_part, residual_part = symmetric_part(logits), symmetric_part(residuals)
    solution = theory.symmetric_solution(logit_part, residual_part, len(head), weight_decay)
    epsilon = collapse.quasi_interpolation(residuals)["epsilon"]
    return {
        "theorem_residual": theory.theorem_residual(
            epsilon, head, collapse.centred_means(mu), weight_decay
        ),
        "predicted_head_norm_sq": solution.head_norm_sq,
        "predicted_head_cosine": solution.head_cosine,
        "symmetric_nc3": solution.nc3,
        "normalized_margin": theory.normalized_margin(logit_part, norms_sq),
        "class_mean_logits": logits,
        **theory.budget_account(terms, head, weight_decay),
    }


def _lemma2(
    params: dict,
    gradients: dict,
    sums: _FirstPass,
    loss: Array,
    norms_sq: Array,
    weight_decay: Array,
    names: tuple[str, ...],
    decayed: dict,
) -> Array:
    size = sums.classes.examples.sum()
    return theory.lemma2_residual(
        loss,
        norms_sq,
        jnp.stack([jnp.sum(params[name]["kernel"] * gradients[name]["kernel"]) for name in names]),
        # <r, y - b> = ||r||^2 + <r, f - b>
        (2 * sums.fit + sums.residual_dot_logit) / size,
        decay_penalty({"head": _bias(params)}, {"head": _bias(decayed)}, weight_decay),
        weight_decay,
    )


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
