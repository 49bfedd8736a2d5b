"""Computes all metrics of one run: two passes over the examples of each split, then arithmetic on
the small arrays that they leave.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

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


class _Frames(NamedTuple):
    """Holds what the second pass measures the examples of a split against.

    Attributes:
      means: the class means of the split.
      span, head_span: the row spaces of the centred class means and of the head.
      reach: the certificate of the class means.
      layers: the frames of every layer, if there is a probe.
    """

    means: collapse.ClassMeans
    span: collapse.Frame
    head_span: collapse.Frame
    reach: collapse.Certificate
    layers: Sequence[every_layer.Frame]


class LayerSums(NamedTuple):
    """Holds what is measured of L layers' weights W_k and of the gradients G_k of the fit term.

    Attributes:
      norms_sq: ||W_k||_F^2.
      dot_gradients: <W_k, G_k>; NaN where no law of homogeneous layers holds.
      equilibrium_residuals: see `theory.equilibrium_residual`; NaN where a layer has none.
      decay_factors: the factors on lambda.
    """

    norms_sq: Float[Array, " L"]
    dot_gradients: Float[Array, " L"]
    equilibrium_residuals: Float[Array, " L"]
    decay_factors: Float[Array, " L"]


class SplitSums(NamedTuple):
    """Holds what both passes over a split find.

    Attributes:
      means: the class means.
      span: the row space of the centred class means.
      scatter: the sums of the second pass.
      correct: the number of examples of each class whose largest output is their class's.
    """

    means: collapse.ClassMeans
    span: collapse.Frame
    scatter: collapse.Scatter
    correct: Float[Array, " C"]


class RunSums(NamedTuple):
    """Holds what the passes over the examples find of one run; `metrics` makes numbers of it.

    Attributes:
      splits: of train and test, along a leading axis.
      head: W_L.
      head_span: its row space.
      head_gradient: the gradient of the fit term with respect to W_L.
      residual_dot_logit: the mean of <r, f - b> over training examples.
      loss, fit_loss: of train and test, with and without weight decay.
      layers: what is measured of the layers.
      residual_dot_target: mean<r, y - b> over training examples.
      other_penalty: lambda/2 times the squared norm of what is decayed and no layer's weights.
      finite: whether all parameters are.
      every_layer: what `every_layer.metrics` finds of both splits; empty without a probe.
    """

    splits: SplitSums
    head: Float[Array, "C p"]
    head_span: collapse.Frame
    head_gradient: Float[Array, "C p"]
    residual_dot_logit: Float[Array, ""]
    loss: Float[Array, "2"]
    fit_loss: Float[Array, "2"]
    layers: LayerSums
    residual_dot_target: Float[Array, ""]
    other_penalty: Float[Array, ""]
    finite: Bool[Array, ""]
    every_layer: dict[str, Array]


def collect(
    variables: dict,
    weight_decay: Float[Array, ""],
    data: Data,
    *,
    model: nn.Module,
    structure: Structure,
    decayed: dict,
    objective: Objective = Objective(),  # noqa: B008 (immutable)
    share: Share = Share(),  # noqa: B008
    probe: Probe | None = None,
    most_held: int = 0,
) -> RunSums:
    """Passes twice over both splits; each split uses its own class means.

    Args:
      variables: the variables of the flax model: `params`, and `batch_stats` with batch
        normalization, which is evaluated in eval mode.
      weight_decay: lambda of the loss that is minimized, see `optim.effective_decay`.
      data: both splits.
      model: the network.
      structure: the layers of the network.
      decayed: the factor on lambda of every leaf, see `layers.decay_factors`.
      objective: the loss and its targets.
      share: this device's share of the examples, if several devices measure one run. Their sums are
        added up; features stay on their device.
      probe: what is measured of every layer; None: nothing.
      most_held: the bytes of a split's features that may be kept from the first pass to the
        second; those of a larger split are computed again.
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

        (gradient_sum, train), train_held = _sum_over_batches(
            with_gradient, data.train, share, most_held=most_held
        )
        test, test_held = _sum_over_batches(
            lambda *batch: first_pass(params, *batch)[1], data.test, share, most_held=most_held
        )
        frames = _frames((train, test), head)

        def sums_of_split(
            split: Split, first: _FirstPass, frames: _Frames, held: tuple
        ) -> tuple[SplitSums, dict[str, Array]]:
            def second_pass(images: Array, labels: Array, *held: Array) -> tuple:
                states = held or _forward(variables, data.normalize(images), model, probe)
                return _second_pass(states, labels, frames, objective), ()

            (scatter, scatters), _ = _sum_over_batches(second_pass, split, share, held)
            measured = every_layer.metrics(scatter.examples, frames.layers, scatters)
            return SplitSums(frames.means, frames.span, scatter, first.correct), measured

        splits, measured = jax.tree.map(
            lambda *fields: jnp.stack(fields),
            sums_of_split(data.train, train, frames[0], train_held),
            sums_of_split(data.test, test, frames[1], test_held),
        )
        gradients = jax.tree.map(lambda g: g / len(data.train.labels), gradient_sum)
        examples = train.classes.examples.sum()
        fits = (train.fit / len(data.train.labels), test.fit / len(data.test.labels))
        penalty = decay_penalty(params, decayed, weight_decay)
        others = _without(decayed, [layer.path for layer in structure.layers])
        return RunSums(
            splits=splits,
            head=head,
            head_span=frames[0].head_span,
            head_gradient=gradients["head"]["kernel"].T,
            residual_dot_logit=train.residual_dot_logit / examples,
            loss=jnp.stack([fit + penalty for fit in fits]),
            fit_loss=jnp.stack(fits),
            layers=_layer_sums(params, gradients, weight_decay, structure, decayed),
            # <r, y - b> = ||r||^2 + <r, f - b>
            residual_dot_target=(2 * train.fit + train.residual_dot_logit) / examples,
            other_penalty=decay_penalty(params, others, weight_decay),
            finite=jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all(),
            every_layer=measured,
        )


class Meaning(NamedTuple):
    """Holds what decides which metrics of a network have a meaning, and which are NaN.

    Attributes:
      structure, objective, probe: as in `collect`.
      is_balanced: whether all classes have the same number of training examples.
    """

    structure: Structure
    objective: Objective = Objective()
    is_balanced: bool = True
    probe: Probe | None = None


def metrics(run: RunSums, weight_decay: Float[Array, ""], meaning: Meaning) -> dict[str, Array]:
    """Computes all metrics of one run from what `collect` found at this weight decay.

    Returns:
      The metrics by name, in the type of the parameters. Each is a scalar, (2,) over train and
      test, (L,) over layers in forward order, (C,) or (2, C) by class, or (C, C):
      `class_mean_cosine` and `class_mean_logits` (W mu_c in row c) of the training split. If
      parameters or training loss are not finite, all but `finite` are NaN. With batch
      normalization, three have no meaning and are NaN: `equilibrium_residual` of all layers but the
      head, `lemma2_residual` and `normalized_margin`. If classes are of different sizes, metrics
      that need equal ones are NaN.
    """
    dtype = run.loss.dtype
    with jax.default_matmul_precision("highest"), jax.enable_x64(True):
        train = dataclasses.replace(
            _statistics(run, jax.tree.map(lambda field: field[0], run.splits)),
            residual_dot_logit=run.residual_dot_logit,
            fit_gradient=run.head_gradient,
            # The head is the last of the layers.
            weight_decay=weight_decay * run.layers.decay_factors[-1],
        )
        quantities = Quantities(train)
        values = _by_split(run, quantities) | {"loss": run.loss, "fit_loss": run.fit_loss}
        values |= _of_network(run, quantities, weight_decay, meaning.structure)
        if meaning.probe is not None:
            values |= meaning.probe.by_layer(values, run.every_layer)
    if meaning.objective.loss != "square":  # the identity holds only for the square loss
        values["lemma2_residual"] = jnp.full((), jnp.nan)
    if not meaning.is_balanced:
        values |= {
            name: jnp.full((), jnp.nan)
            for name, metric in VOCABULARY.items()
            if metric.of_equal_classes
        }
    finite = run.finite & jnp.isfinite(run.loss[0])
    values = {
        name: jnp.where(finite, value.astype(dtype), jnp.nan) for name, value in values.items()
    }
    return values | {"finite": finite.astype(dtype)}


def _layer_sums(
    params: dict, gradients: dict, weight_decay: Array, structure: Structure, decayed: dict
) -> LayerSums:
    kernels, slopes, factors = (
        [layer.of(tree) for layer in structure.layers] for tree in (params, gradients, decayed)
    )
    # A gradient that nothing needs is not computed.
    none = jnp.full((), jnp.nan, kernels[0].dtype)
    residuals = [
        theory.equilibrium_residual(kernel, slope, weight_decay * factor) if has_one else none
        for kernel, slope, factor, has_one in zip(
            kernels, slopes, factors, structure.equilibria(), strict=True
        )
    ]
    dots = [
        jnp.sum(kernel * slope) if scales else none
        for kernel, slope, scales in zip(kernels, slopes, structure.scaling(), strict=True)
    ]
    return LayerSums(
        norms_sq=jnp.stack([jnp.sum(kernel**2) for kernel in kernels]),
        dot_gradients=jnp.stack(dots),
        equilibrium_residuals=jnp.stack(residuals),
        decay_factors=jnp.stack(factors),
    )


def _statistics(run: RunSums, split: SplitSums) -> Statistics:
    return statistics_of_passes(
        split.means, split.span, run.head_span, split.scatter, run.head, split.correct
    )


def _by_split(run: RunSums, train: Quantities) -> dict[str, Array]:
    """Returns the metrics of both splits, and those of the training split only.

    Metrics with a number for every layer are computed by `_of_network`.
    """
    of_splits = [name for name, metric in VOCABULARY.items() if "split" in metric.dims]
    of_splits += every_layer.OF_FEATURES if run.every_layer else ()
    of_training = [name for name, metric in VOCABULARY.items() if metric.dims in ((), ("label",))]
    by_split = jax.vmap(lambda split: assemble(Quantities(_statistics(run, split)), of_splits))
    return by_split(run.splits) | assemble(train, of_training)


def _of_network(
    run: RunSums,
    quantities: Quantities,
    weight_decay: Array,
    structure: Structure,
) -> dict[str, Array]:
    """Returns the metrics by layer, and the (C, C) matrices of the class means.

    They are NaN where the network leaves them no meaning, see `Structure`.
    """
    lemma2 = margin = jnp.full((), jnp.nan)
    norms_sq = run.layers.norms_sq
    if any(structure.scaling()):
        lemma2 = theory.lemma2_residual(
            run.loss[0],
            run.layers.decay_factors * norms_sq,
            run.layers.dot_gradients,
            run.residual_dot_target,
            run.other_penalty,
            weight_decay,
            structure.degrees,
        )
    if structure.is_homogeneous:
        margin = theory.normalized_margin(
            quantities.logit_part, norms_sq.astype(jnp.float64), structure.degrees
        )
    return {
        "weight_norm_sq": norms_sq,
        "equilibrium_residual": run.layers.equilibrium_residuals,
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

    These are the sums that need no class means, and what `_forward` returns.
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
    return fit, (sums, states)


def _frames(splits: Sequence[_FirstPass], head: Float[Array, "C p"]) -> list[_Frames]:
    """Returns the frames of splits from their first passes."""
    means = tuple(collapse.class_means(sums.classes) for sums in splits)
    *spans, head_span = collapse.frames(means, head)
    # Without a probe there is no layer.
    layers = every_layer.frames([(sums.classes.examples, sums.layers) for sums in splits])
    return [
        _Frames(mu, span, head_span, collapse.certificate_of_split(mu, span), of_layers)
        for mu, span, of_layers in zip(means, spans, layers, strict=True)
    ]


def _second_pass(
    states: Sequence[Array], labels: Array, frames: _Frames, objective: Objective
) -> tuple[collapse.Scatter, tuple[every_layer.Scatter, ...]]:
    """Returns the sums over a batch of deviations from class means, in the features and after every
    layer; `states` are those of `_forward`.
    """
    h, f = states[:2]
    scatter = collapse.class_scatter(
        h,
        objective.residual(f, objective.target(labels, f.shape[1], f.dtype)),
        jnp.argmax(f, axis=1),
        labels,
        frames.means,
        frames.span,
        frames.head_span,
        frames.reach,
        is_linear=objective.loss == "square",
    )
    return scatter, every_layer.scatters(states, frames.layers, labels)


def _sum_over_batches(
    f: Callable[..., tuple[T, tuple]],
    split: Split,
    share: Share,
    held: tuple = (),
    most_held: int = 0,
) -> tuple[T, tuple]:
    """Sums the first result of f(images, labels, *held) over a split, and stacks the second.

    The second result is kept for each batch if all batches take at most `most_held` bytes, and is
    () otherwise. If devices share the split, each sums its own rows, and their sums are added up at
    the end. The last batch is padded with label -1, which `f` must leave out.
    """
    size = len(split.labels)
    mine = -(-size // share.devices)
    batches = -(-mine // _ROWS)
    rows = -(-mine // batches)
    shapes, to_keep = jax.eval_shape(
        f, split.images[:rows], split.labels[:rows], *(a[0] for a in held)
    )
    bytes_held = batches * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(to_keep))
    keeps = bytes_held <= most_held

    def add(total: T, batch: tuple) -> tuple[T, tuple]:
        number, *held = batch
        place = number * rows + jnp.arange(rows)
        index = share.first(mine) + place
        images = split.images.at[index].get(mode="clip")
        labels = jnp.where(
            (place < mine) & (index < size), split.labels.at[index].get(mode="clip"), -1
        )
        term, to_hold = f(images, labels, *held)
        return jax.tree.map(jnp.add, total, term), to_hold if keeps else ()

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, to_hold = lax.scan(add, zeros, (jnp.arange(batches), *held))
    return share.sum(total), to_hold


def _without(decayed: dict, paths: list[tuple[str, ...]]) -> dict:
    """Returns `decayed` as if some leaves were not."""
    flat = by_path(decayed)
    return nest(flat | dict.fromkeys(paths, False))
