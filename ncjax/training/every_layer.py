"""Measures every layer of a network, where `log.layers` asks for it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ncjax.metrics import collapse, linalg, weights
from ncjax.metrics.statistics import AnyArray
from ncjax.training import wiring
from ncjax.training.layers import Structure
from ncjax.training.wiring import Wiring

# The most bytes of one example that are kept for the second pass; larger features are computed
# again.
_MOST_HELD = 2**15
# Singular values of class means below this share of the largest are lost in the rounding of their
# squares.
_RESOLVED = 1e-7


class Probe(NamedTuple):
    """Says what is measured of a network: the features after every layer.

    They are what the next layer takes, flattened; after the head they are the outputs. No p x p
    matrix is made of them, so that maps of convolutions are measured whole.
    """

    model: nn.Module
    structure: Structure
    wiring: Wiring

    @property
    def head(self) -> int:
        """The index of the head."""
        return len(self.structure.layers) - 1

    @property
    def below(self) -> list[int]:
        """The indices of layers below the head that take what comes after another."""
        return sorted({*self.wiring.following} - {self.head})

    @property
    def places(self) -> list[int]:
        """The places of the features after every layer in what `forward` returns."""
        of_layers = {self.head: 0} | {index: 2 + i for i, index in enumerate(self.below)}
        return [*(of_layers[index] for index in self.wiring.following), 1]

    def forward(self, variables: dict, x: Float[Array, "B *image"]) -> tuple[Array, ...]:
        """Returns h(x), f(x), and the inputs of the layers `below`, each (B, p)."""
        found = wiring.forward(self.model, variables, x, self.structure)
        inputs = (found.calls[index].input for index in (self.head, *self.below))
        features, *others = inputs
        return features, found.outputs, *others

    def held(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        """Returns what of `forward` is kept for the second pass: all or nothing."""
        per_example = sum(h.nbytes // len(h) for h in states)
        return states if per_example <= _MOST_HELD else ()


def sums(states: Sequence[Float[Array, "B _"]], labels: Int[Array, " B"]) -> tuple[Array, ...]:
    """Returns the sums (C, p) of features by class at every place, the outputs being the second; a
    label outside [0, C) leaves its example out.
    """
    outputs = states[1]
    one_hot = jax.nn.one_hot(labels, outputs.shape[1], dtype=outputs.dtype)
    return tuple(one_hot.T @ h for h in states)


class Frame(NamedTuple):
    """Holds the class means of one layer's features, and the span of the centred means.

    Attributes:
      means: mu_c as rows, in the type of the features.
      centred: mu_c - mu_G as rows, float64.
      basis: the left singular vectors of Mdot as rows, 0 beyond the rank, in the type of the
        features.
      spectrum: the singular values of Mdot/sqrt(C), descending, 0 beyond the rank, float64.
    """

    means: Float[Array, "C p"]
    centred: Float[Array, "C p"]
    basis: Float[Array, "C p"]
    spectrum: Float[Array, " C"]


class Scatter(NamedTuple):
    """Holds sums of squared deviations from the class means, see `collapse.Scatter`."""

    within: Float[Array, " C"]
    along_means: Float[Array, " C"]
    disagreements: Float[Array, ""]


def frames(
    splits: Sequence[tuple[Float[Array, " C"], tuple[Array, ...]]],
) -> list[list[Frame]]:
    """Returns the frame of every place, for every split, from its class sizes and its `sums`; none
    where there are none.
    """
    if not splits[0][1]:
        return [[] for _ in splits]
    means = [total / examples[:, None] for examples, totals in splits for total in totals]
    num_classes, dtype = means[0].shape[0], means[0].dtype
    tolerance = max(collapse.rank_tolerance(dtype), _RESOLVED)
    with jax.enable_x64(True):
        centred = [collapse.centred_means(mu.astype(jnp.float64)) for mu in means]
        # C x C whatever the width of a layer, so that all are factored in one call.
        grams = jnp.stack([rows @ rows.T for rows in centred]) / num_classes
        squares, vectors = jax.vmap(linalg.row_space)(grams)
        spectra = jnp.sqrt(squares)
        most = np.minimum(num_classes - 1, [mu.shape[1] for mu in means])
        kept = spectra > tolerance * spectra[:, :1]
        kept &= jnp.arange(num_classes)[None] < most[:, None]
        factors = jnp.where(kept, 1 / jnp.where(kept, spectra * jnp.sqrt(num_classes), 1), 0)
        bases = [
            (factor[:, None] * (rows @ mdot)).astype(dtype)
            for factor, rows, mdot in zip(factors, vectors, centred, strict=True)
        ]
        found = [Frame(*one) for one in zip(means, centred, bases, spectra * kept, strict=True)]
    places = len(found) // len(splits)
    return [found[first : first + places] for first in range(0, len(found), places)]


def scatters(
    states: Sequence[Float[Array, "B _"]], frames_of: Sequence[Frame], labels: Int[Array, " B"]
) -> tuple[Scatter, ...]:
    """Sums one batch at every place that has a frame; labels as in `sums`."""
    predictions = jnp.argmax(states[1], axis=1)
    pairs = zip(states, frames_of, strict=False)
    return tuple(_scatter(h, frame, predictions, labels) for h, frame in pairs)


def _scatter(
    features: Float[Array, "B p"],
    frame: Frame,
    predictions: Int[Array, " B"],
    labels: Int[Array, " B"],
) -> Scatter:
    """Sums one batch; a label outside [0, C) leaves its example out."""
    num_classes = len(frame.means)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
    valid = one_hot.sum(1)
    deviation = (features - frame.means[labels]) * valid[:, None]
    centred = frame.centred.astype(features.dtype)
    along = deviation @ jnp.concatenate([frame.basis, centred]).T
    along_means, along_centred = jnp.split(along, [num_classes], axis=1)
    gram = centred @ centred.T
    nearest = collapse.nearest_mean(along_centred + gram[labels], jnp.diagonal(gram))
    return Scatter(
        within=one_hot.T @ jnp.sum(deviation**2, axis=1),
        along_means=jnp.sum(along_means**2, axis=0),
        disagreements=jnp.sum(valid * (predictions != nearest)),
    )


def metrics(
    probe: Probe | None,
    examples: Float[AnyArray, " C"],
    frames_of: Sequence[Frame],
    scatters_of: Sequence[Scatter],
) -> dict[str, Array]:
    """Returns the metrics of one split in float64, none without a probe.

    `layer_nc1`, `layer_cdnv` and `layer_nc4` are (L,) over layers in forward order,
    `mean_feature_norm` and `class_mean_singular_values` (C,) are of the head's input.
    """
    if probe is None:
        return {}
    with jax.enable_x64(True):
        examples, scatters_of = jax.tree.map(
            lambda a: a.astype(jnp.float64), (examples, tuple(scatters_of))
        )
        pairs = zip(frames_of, scatters_of, strict=True)
        by_place = [_metrics(examples, frame, scatter) for frame, scatter in pairs]
        frame, scatter = frames_of[0], scatters_of[0]
        squares = examples @ jnp.sum(frame.means.astype(jnp.float64) ** 2, axis=1)
        return {
            name: jnp.stack([by_place[place][name] for place in probe.places])
            for name in by_place[0]
        } | {
            "mean_feature_norm": jnp.sqrt((squares + scatter.within.sum()) / examples.sum()),
            "class_mean_singular_values": frame.spectrum * jnp.sqrt(len(examples)),
        }


def _metrics(
    examples: Float[AnyArray, " C"], frame: Frame, scatter: Scatter
) -> dict[str, Float[Array, ""]]:
    total = examples.sum()
    pairs = collapse.between_means(frame.centred, scatter.within / examples)
    return {
        "layer_nc1": collapse.nc1(scatter.along_means / total, frame.spectrum, len(examples)),
        "layer_cdnv": pairs["cdnv"],
        "layer_nc4": scatter.disagreements / total,
    }


def weight_metrics(
    params: Mapping[str, Any], finite: np.ndarray, structure: Structure, wired: Wiring
) -> dict[str, np.ndarray]:
    """Returns ranks, condition and imbalance of the layers of R runs, each (R, L), on the host.

    Args:
      params: the parameters, NumPy arrays of the shapes (R, ...).
      finite: the metric of this name: where it is 0, all others are NaN.
    """
    pairs = zip(wired.following, wired.between, strict=True)
    following = [None if between == "other" else index for index, between in pairs]
    measured = weights.measure([layer.of(params) for layer in structure.layers], [*following, None])
    is_finite = finite[:, None] == 1
    return {
        name: np.where(is_finite, values, np.nan).astype(finite.dtype)
        for name, values in measured.items()
    }
