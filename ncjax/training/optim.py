"""The one place where lambda acts on an update."""

from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ncjax.config import OPTIMIZERS, Decay, Optimizer, Schedule
from ncjax.errors import InputError, unknown_choice

_BETA2 = 0.999  # of Adam and AdamW, as everywhere

Numbers = TypeVar("Numbers", Array, np.ndarray)


def schedule_shape(
    name: Schedule, step: Int[Array, "..."], total_steps: int
) -> Float[Array, "..."]:
    """Returns the learning rate as a share of its initial value.

    `constant` stays 1, `cosine` falls to 0, and `step` falls to 0.1 at 1/3 and to 0.01 at 2/3.
    """
    progress = step.astype(jnp.result_type(float)) / total_steps
    match name:
        case "constant":
            return jnp.ones_like(progress)
        case "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1)))
        case "step":
            return jnp.where(progress < 1 / 3, 1.0, jnp.where(progress < 2 / 3, 0.1, 0.01))
        case unknown:
            raise unknown_choice("schedule", unknown, Schedule)


def make_optimizer(
    name: Optimizer,
    decay: Decay,
    weight_decay: Float[Array, ""],
    learning_rate: Float[Array, ""],
    momentum: Float[Array, ""],
    *,
    decayed: dict,
    schedule: Schedule,
    total_steps: int,
    adam_eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Returns the update w <- w - lr(step) u, where lambda joins before the optimizer's memory
    (coupled) or after it (decoupled).

    sgd:    coupled    m <- momentum m + (g + lambda w), u = m;
            decoupled  m <- momentum m + g, u = m + lambda w.
    adam:   coupled, u = mhat/(sqrt(vhat) + eps) with beta_1 = `momentum`, beta_2 = 0.999 (Kingma &
            Ba 2015).
    adamw:  decoupled, u = mhat/(sqrt(vhat) + eps) + lambda w (Loshchilov & Hutter 2019).

    `decayed` has the factor on lambda of every leaf; False where it does not act. The numbers may
    be traced: make the transformation inside the step and carry only its state.

    Raises:
      InputError: an unknown name, or a decay that the optimizer does not have.
    """

    def rate(step: ArrayLike) -> Float[Array, ""]:
        # The shape has the widest type that is on; parameters must keep their own.
        return learning_rate * schedule_shape(schedule, jnp.asarray(step), total_steps).astype(
            learning_rate.dtype
        )

    if name in OPTIMIZERS and decay in get_args(Decay) and decay not in OPTIMIZERS[name].decays:
        raise InputError("decay", decay, f"{name} has {' or '.join(OPTIMIZERS[name].decays)}")
    match name:
        case "sgd":
            direction = optax.trace(decay=momentum)
        case "adam" | "adamw":
            direction = optax.scale_by_adam(b1=momentum, b2=_BETA2, eps=adam_eps)
        case unknown:
            raise unknown_choice("optimizer", unknown, Optimizer)
    shrink = _add_decayed_weights(weight_decay, decayed)
    match decay:
        case "coupled":
            order = (shrink, direction)
        case "decoupled":
            order = (direction, shrink)
        case unknown:
            raise unknown_choice("decay", unknown, Decay)
    return optax.chain(*order, optax.scale_by_learning_rate(rate))


def _add_decayed_weights(
    weight_decay: Float[Array, ""], decayed: dict
) -> optax.GradientTransformation:
    """Returns optax.add_decayed_weights with a factor on lambda for every leaf."""

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, w, factor: u if factor is False else u + weight_decay * factor * w,
            updates,
            params,
            decayed,
        )

    return optax.stateless(add)


def effective_decay(
    name: Optimizer, decay: Decay, weight_decay: Numbers, momentum: Numbers
) -> Numbers:
    """Returns the lambda of the loss whose critical points an optimizer seeks.

    Decoupled SGD steps by m + lambda w, and momentum has made m = g/(1 - momentum) of a steady
    gradient: it stands still where g = -(1 - momentum) lambda w. AdamW has no such loss: it stands
    still where g/(|g| + eps) = -lambda w, entry by entry, with g close to 0 or |w| to 1/lambda; its
    own lambda is what it is held against.
    """
    return weight_decay * (1 - momentum) if name == "sgd" and decay == "decoupled" else weight_decay
