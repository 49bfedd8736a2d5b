"""The one place where lambda acts on an update."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def schedule_shape(name: str, step: Int[Array, "..."], total_steps: int) -> Float[Array, "..."]:
    """Learning rate as a share of its initial value: `constant`, `cosine` to 0, or `step` (x0.1 at 1/3 and 2/3)."""
    progress = step.astype(jnp.result_type(float)) / total_steps
    if name == "cosine":
        return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1)))
    if name == "step":
        return jnp.where(progress < 1 / 3, 1.0, jnp.where(progress < 2 / 3, 0.1, 0.01))
    return jnp.ones_like(progress)


def sgd(
    weight_decay: Float[Array, ""],
    learning_rate: Float[Array, ""],
    momentum: Float[Array, ""],
    *,
    decayed: dict,
    schedule: str,
    total_steps: int,
) -> optax.GradientTransformation:
    """SGD with momentum and coupled decay: m <- momentum m + (g + lambda w); w <- w - lr(step) m.

    Decay joins the gradient before momentum, so the regularized loss is what is minimized. The numbers may be traced:
    make the transformation inside the step and carry only its state.
    """

    def rate(step: ArrayLike) -> Float[Array, ""]:
        # The shape has the widest type that is on; parameters must keep their own.
        return learning_rate * schedule_shape(schedule, jnp.asarray(step), total_steps).astype(learning_rate.dtype)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(rate),
    )
