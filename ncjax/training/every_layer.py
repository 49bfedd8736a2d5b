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

# Singular values of class means below this share of the largest are lost in the rounding of their
# squares.
_RESOLVED = 1e-7
# Metrics of the head's input that are recorded where every layer is measured.
OF_FEATURES = ("mean_feature_norm", "class_mean_singular_values")


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

    def by_layer(
        self, of_head_input: Mapping[str, Array], elsewhere: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Returns `layer_nc1`, `layer_cdnv` and `layer_nc4` (2, L) over layers in forward order.

        Args:
          of_head_input: nc1, cdnv and nc4, (2,): those after the layer below the head.
          elsewhere: the result of `metrics`.
        """
        # In the order of what `forward` returns.
        places = {self.head: 0} | {index: 2 + i for i, index in enumerate(self.below)}
        after = np.array([*(places[index] for index in self.wiring.following), 1])
        return {
            f"layer_{name}": jnp.concatenate([of_head_input[name][:, None], values], 1)[:, after]
            for name, values in elsewhere.items()
        }

    def forward(self, variables: dict, x: Float[Array, "B *image"]) -> tuple[Array, ...]:
        """Returns h(x), f(x), and the inputs of the layers `below`, each (B, p)."""
        found = wiring.forward(self.model, variables, x, self.structure)
        inputs = (found.calls[index].input for index in (self.head, *self.below))
        features, *others = inputs
        return features, found.outputs, *others


def sums(states: Sequence[Float[Array, "B _"]], labels: Int[Array, " B"]) -> tuple[Array, ...]:
    """Returns the sums (C, p) by class of all that `Probe.forward` returns but h, which
    `collapse.class_sums` has; a label outside [0, C) leaves its example out.
    """
    outputs = states[1]
    one_hot = jax.nn.one_hot(labels, outputs.shape[1], dtype=outputs.dtype)
    return tuple(one_hot.T @ h for h in states[1:])


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
        kept = collapse.counts_as_nonzero(spectra, tolerance, most)
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
    """Sums one batch, of what `sums` sums; nothing without frames."""
    predictions = jnp.argmax(states[1], axis=1)
    pairs = zip(states[1:], frames_of, strict=True) if frames_of else ()
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
    nearest = collapse.nearest_by_deviation(along_centred, centred, labels)
    return Scatter(
        within=one_hot.T @ jnp.sum(deviation**2, axis=1),
        along_means=jnp.sum(along_means**2, axis=0),
        disagreements=jnp.sum(valid * (predictions != nearest)),
    )


def metrics(
    examples: Float[AnyArray, " C"],
    frames_of: Sequence[Frame],
    scatters_of: Sequence[Scatter],
) -> dict[str, Array]:
    """Returns nc1, cdnv and nc4 of one split wherever there is a frame, in float64; nothing without
    frames.
    """
    with jax.enable_x64(True):
        found = [
            _metrics(*jax.tree.map(lambda a: a.astype(jnp.float64), (examples, frame, scatter)))
            for frame, scatter in zip(frames_of, scatters_of, strict=True)
        ]
        return jax.tree.map(lambda *values: jnp.stack(values), *found) if found else {}


def _metrics(
    examples: Float[AnyArray, " C"], frame: Frame, scatter: Scatter
) -> dict[str, Float[Array, ""]]:
    total = examples.sum()
    pairs = collapse.between_means(frame.centred, scatter.within / examples)
    return {
        "nc1": collapse.nc1(scatter.along_means / total, frame.spectrum, len(examples)),
        "cdnv": pairs["cdnv"],
        "nc4": scatter.disagreements / total,
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
