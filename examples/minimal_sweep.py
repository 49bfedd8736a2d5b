"""The whole idea on one page: a sweep over weight decay x seeds by two vmaps, measured by
`ncjax.metrics`.

    python examples/minimal_sweep.py

Trains twelve bias-free ReLU networks on scikit-learn's digits at once, in one compiled program, by
SGD with momentum on the regularized square loss, and prints NC1 and NC3 against lambda: weight
decay lowers both.
"""

import itertools

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

from ncjax import metrics

WIDTHS = (64, 128, 128, 10)
WEIGHT_DECAYS = jnp.array([0.0, 3e-4, 1e-3, 3e-3])
SEEDS = jnp.arange(3)
EPOCHS, BATCH, LEARNING_RATE, MOMENTUM = 100, 64, 0.1, 0.9

images, labels = load_digits(return_X_y=True)
images = images - images.mean(0)
# Mean norm 2.
images = jnp.asarray(2 * images / jnp.linalg.norm(images, axis=1).mean(), jnp.float32)
labels = jnp.asarray(labels)


def init(key):
    """Returns He-initialized weights, one matrix per layer."""
    shapes = enumerate(itertools.pairwise(WIDTHS))
    return [
        jnp.sqrt(2 / m) * jax.random.normal(jax.random.fold_in(key, k), (m, n))
        for k, (m, n) in shapes
    ]


def features(params, x):
    """Returns h(x), what the head sees."""
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x


def loss(params, x, y, weight_decay):
    """Returns 1/2 mean ||y - f||^2 + lambda/2 sum_k ||W_k||^2."""
    residual = jax.nn.one_hot(y, 10) - features(params, x) @ params[-1]
    return jnp.mean(jnp.sum(residual**2, 1)) / 2 + weight_decay / 2 * sum(
        jnp.sum(w**2) for w in params
    )


def train(weight_decay, seed):
    """Trains one network and returns its metrics. Neither the weights nor the batches at the
    start depend on lambda.
    """
    key = jax.random.key(seed)
    params = init(key)
    steps_per_epoch = len(images) // BATCH

    def step(state, index):
        params, velocity, rate = state
        gradient = jax.grad(loss)(params, images[index], labels[index], weight_decay)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
        return (jax.tree.map(lambda w, v: w - rate * v, params, velocity), velocity, rate), None

    def epoch(state, number):
        params, velocity = state
        order = jax.random.permutation(jax.random.fold_in(key, number), len(images))
        rate = LEARNING_RATE * (1 + jnp.cos(jnp.pi * number / EPOCHS)) / 2
        batches = order[: steps_per_epoch * BATCH].reshape(steps_per_epoch, BATCH)
        (params, velocity, _), _ = jax.lax.scan(step, (params, velocity, rate), batches)
        return (params, velocity), None

    (params, _), _ = jax.lax.scan(
        epoch, (params, jax.tree.map(jnp.zeros_like, params)), jnp.arange(EPOCHS)
    )
    h = features(params, images)
    return {
        "nc1": metrics.nc1(h, labels, num_classes=10),
        "nc3": metrics.nc3(h, labels, head=params[-1].T, num_classes=10),
    }


over_seeds = jax.vmap(train, in_axes=(None, 0))
sweep = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))

if __name__ == "__main__":
    measured = sweep(WEIGHT_DECAYS, SEEDS)  # name -> (lambda, seed)
    print("  lambda      nc1      nc3   (means over seeds)")
    for i, weight_decay in enumerate(WEIGHT_DECAYS):
        print(
            f"{weight_decay:8.0e} {measured['nc1'][i].mean():8.4f} {measured['nc3'][i].mean():8.4f}"
        )
