"""Computes all metrics of one run, in two passes over each split."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ncjax.metrics import collapse, theory
from ncjax.metrics.statistics import Statistics, statistics_of_passes
from ncjax.metrics.vocabulary import VOCABULARY, Quantities, assemble
from ncjax.training import every_layer
from ncjax.training.every_layer import Probe
from ncjax.training.layers import Structure, by_path, nest
from ncjax.training.objective import Objective, decay_penalty
from ncjax.training.parallel import Share

# The most rows in a batch of a measurement: enough for matmuls at full rate, few enough to stay in
# a core's cache.
_ROWS = 256
# A split of at most this many rows keeps its features for the second pass; a larger one computes
# them again.
_HELD_ROWS = 2048

T = TypeVar("T")


class Split(NamedTuple):
    """Holds M examples on the device: images (M, ...) uint8 or float, labels (M,) int32."""

    images: Shaped[Array, "M *image"]
    labels: Int[Array, " M"]


class Data(NamedTuple):
    """Holds both splits and their normalization to inputs (images - center) * scale.

    Attributes:
      train, test: the splits.
      center: the subtracted image, whose type is that of the inputs.
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
    """Holds the sums of the first pass over examples."""

    classes: collapse.ClassSums
    fit: Float[Array, ""]
    residual_dot_logit: Float[Array, ""]
    correct: Float[Array, " C"]
    layers: tuple[Float[Array, "C _"], ...]


def evaluate(
    variables: dict,
    weight_decay: Float[Array, ""],
    data: Data,
    *,
    model: nn.Module,
    structure: Structure,
    decayed: dict,
    objective: Objective = Objective(),  # noqa: B008 (immutable)
    is_balanced: bool = True,
    share: Share = Share(),  # noqa: B008
    probe: Probe | None = None,
) -> dict[str, Array]:
    """Measures one run on both splits; each split uses its own class means.

    Args:
      variables: the variables of the flax model: `params`, and `batch_stats` with batch
        normalization, which is evaluated in eval mode.
      weight_decay: lambda of the loss that is minimized, see `optim.effective_decay`.
      data: both splits.
      model: the network.
      structure: the layers of the network.
      decayed: the factor on lambda of every leaf, see `layers.decay_factors`.
      objective: the loss and its targets.
      is_balanced: whether all classes have the same number of training examples.
      share: this device's share of the examples, if several devices measure one run. Their sums are
        added up; features stay on their device.
      probe: what is measured of every layer; None: nothing.

    Returns:
      The metrics by name, in the type of the parameters. Each is a scalar, (2,) over train and
      test, (L,) over layers in forward order, (C,) or (2, C) by class, or (C, C):
      `class_mean_cosine` and `class_mean_logits` (W mu_c in row c) of the training split. If
      parameters or training loss are not finite, all but `finite` are NaN. With batch
      normalization, three have no meaning and are NaN: `equilibrium_residual` of all layers but the
      head, `lemma2_residual` and `normalized_margin`. If classes are of different sizes, metrics
      that need equal ones are NaN.
    """
    with jax.default_matmul_precision("highest"):
        params = variables["params"]
        head = params["head"]["kernel"].T

        def first_pass(params: dict, images: Array, labels: Array) -> tuple[Array, tuple]:
            at = variables | {"params": params}
            return _first_pass(
                at, data.normalize(images), labels, model=model, objective=objective, probe=probe
            )

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
        # Of both splits; without a probe there is no layer.
        layers = every_layer.frames(
            [(sums.classes.examples, sums.layers) for sums in (train_sums, test_sums)]
        )

        def split_statistics(
            split: Split,
            first: _FirstPass,
            means: collapse.ClassMeans,
            frame: collapse.Frame,
            held: tuple,
            layers: Sequence[every_layer.Frame],
        ) -> tuple[Statistics, tuple[every_layer.Scatter, ...]]:
            reach = collapse.certificate_of_split(means, frame)

            def second_pass(images: Array, labels: Array, *held: Array) -> tuple:
                states = held or _forward(variables, data.normalize(images), model, probe)
                h, f = states[:2]
                residuals = objective.residual(f, objective.target(labels, f.shape[1], f.dtype))
                predictions, is_linear = jnp.argmax(f, 1), objective.loss == "square"
                scatter = collapse.class_scatter(
                    h, residuals, predictions, labels, means, frame, frame_head, reach, is_linear
                )
                return (scatter, every_layer.scatters(states, layers, labels)), ()

            (scatter, layer_scatters), _ = _sum_over_batches(second_pass, split, share, held)
            statistics = statistics_of_passes(
                means, frame, frame_head, scatter, head, first.correct
            )
            return statistics, layer_scatters

        gradients = jax.tree.map(lambda g: g / len(data.train.labels), gradient_sum)
        train, train_scatters = split_statistics(
            data.train, train_sums, train_means, frame_train, train_held, layers[0]
        )
        train = dataclasses.replace(
            train,
            residual_dot_logit=train_sums.residual_dot_logit / train_sums.classes.examples.sum(),
            fit_gradient=gradients["head"]["kernel"].T,
            weight_decay=weight_decay * decayed["head"]["kernel"],
        )
        test, test_scatters = split_statistics(
            data.test, test_sums, test_means, frame_test, test_held, layers[1]
        )
        fits = (train_sums.fit / len(data.train.labels), test_sums.fit / len(data.test.labels))
        penalty = decay_penalty(params, decayed, weight_decay)
        loss = jnp.stack([fit + penalty for fit in fits])
        with jax.enable_x64(True):
            quantities = Quantities(train)
            metrics = _by_split(quantities, Quantities(test))
            metrics |= {"loss": loss, "fit_loss": jnp.stack(fits)}
            metrics |= _of_network(
                params, gradients, quantities, train_sums, loss[0], weight_decay, structure, decayed
            )
            if probe is not None:
                metrics |= _stacked(
                    every_layer.metrics(probe, *part)
                    for part in zip(
                        (train.examples, test.examples),
                        layers,
                        (train_scatters, test_scatters),
                        strict=True,
                    )
                )
        if objective.loss != "square":  # the identity holds only for the square loss
            metrics["lemma2_residual"] = jnp.full((), jnp.nan)
        if not is_balanced:
            metrics |= {
                name: jnp.full((), jnp.nan)
                for name, metric in VOCABULARY.items()
                if metric.of_equal_classes
            }
        return _masked(metrics, params, loss[0], head.dtype)


def _by_split(train: Quantities, test: Quantities) -> dict[str, Array]:
    """Returns the metrics of both splits, and those of the training split only.

    Metrics with a number for every layer are computed by `_of_network`.
    """
    of_splits = [name for name, metric in VOCABULARY.items() if "split" in metric.dims]
    of_training = [name for name, metric in VOCABULARY.items() if metric.dims in ((), ("label",))]
    pairs = assemble(train, of_splits), assemble(test, of_splits)
    return _stacked(pairs) | assemble(train, of_training)


def _stacked(parts: Iterable[dict[str, Array]]) -> dict[str, Array]:
    return jax.tree.map(lambda *values: jnp.stack(values), *parts)


def _of_network(
    params: dict,
    gradients: dict,
    quantities: Quantities,
    sums: _FirstPass,
    loss: Array,
    weight_decay: Array,
    structure: Structure,
    decayed: dict,
) -> dict[str, Array]:
    """Returns the metrics by layer, and the (C, C) matrices of the class means.

    They are NaN where the network leaves them no meaning, see `Structure`.
    """
    layers, nan = structure.layers, jnp.full((), jnp.nan)
    pairs = [(layer.of(params), layer.of(gradients)) for layer in layers]
    factors = [layer.of(decayed) for layer in layers]
    norms_sq = jnp.stack([jnp.sum(kernel**2) for kernel, _ in pairs])
    residuals = [
        theory.equilibrium_residual(*pair, weight_decay * factor) if has_equilibrium else nan
        for pair, factor, has_equilibrium in zip(
            pairs, factors, structure.equilibria(), strict=True
        )
    ]
    lemma2 = margin = nan
    if any(structure.scaling()):
        others = _without(decayed, [layer.path for layer in layers])
        lemma2 = theory.lemma2_residual(
            loss,
            jnp.stack(factors) * norms_sq,
            jnp.stack([jnp.sum(kernel * gradient) for kernel, gradient in pairs]),
            # <r, y - b> = ||r||^2 + <r, f - b>
            (2 * sums.fit + sums.residual_dot_logit) / sums.classes.examples.sum(),
            decay_penalty(params, others, weight_decay),
            weight_decay,
            structure.degrees,
        )
    if structure.is_homogeneous:
        margin = theory.normalized_margin(
            quantities.logit_part, norms_sq.astype(jnp.float64), structure.degrees
        )
    return {
        "weight_norm_sq": norms_sq,
        "equilibrium_residual": jnp.stack(residuals),
        "lemma2_residual": lemma2,
        "normalized_margin": margin,
        "class_mean_cosine": collapse.cosines(quantities.centred),
        "class_mean_logits": quantities.class_mean_logits,
    }


def _forward(variables: dict, x: Array, model: nn.Module, probe: Probe | None) -> tuple[Array, ...]:
    """Returns h(x) and f(x), and with a probe what it adds to them."""
    if probe is not None:
        return probe.forward(variables, x)
    features = jnp.asarray(model.apply(variables, x, False, method="features"))
    return features, jnp.asarray(model.apply(variables, features, method="logits"))


def _first_pass(
    variables: dict,
    x: Array,
    labels: Array,
    *,
    model: nn.Module,
    objective: Objective,
    probe: Probe | None,
) -> tuple[Array, tuple]:
    """Returns the sum of the fit term over a batch, which is differentiated, and two more results.

    These are the sums that need no class means, and (h, f), if they are kept.
    """
    states = _forward(variables, x, model, probe)
    features, outputs = states[:2]
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
        () if probe is None else every_layer.sums(states, labels),
    )
    return fit, (sums, states if probe is None else probe.held(states))


def _sum_over_batches(
    f: Callable[..., tuple[T, tuple]], split: Split, share: Share, held: tuple = ()
) -> tuple[T, tuple]:
    """Sums the first result of f(images, labels, *held) over a split, and stacks the second.

    The second result is kept for each batch, but only of a small split, and () otherwise. If
    devices share the split, each sums its own rows, and their sums are added up at the end. The
    last batch is padded with label -1, which `f` must leave out.
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


def _without(decayed: dict, paths: list[tuple[str, ...]]) -> dict:
    """Returns `decayed` as if some leaves were not."""
    flat = by_path(decayed)
    return nest(flat | dict.fromkeys(paths, False))


def _masked(metrics: dict[str, Array], params: dict, loss: Array, dtype) -> dict[str, Array]:
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(params):
        finite &= jnp.isfinite(leaf).all()
    masked = {
        name: jnp.where(finite, value.astype(dtype), jnp.nan) for name, value in metrics.items()
    }
    return masked | {"finite": finite.astype(dtype)}
