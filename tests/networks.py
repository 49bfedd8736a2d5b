"""Networks as a user writes them, named by their import paths in tests."""

import flax.linen as nn
import jax.numpy as jnp


class Own(nn.Module):
    """Residual, with batch normalization and biases, of widths that the config sets."""

    num_classes: int
    widths: tuple[int, ...]
    use_head_bias: bool = False

    def setup(self):
        self.head = nn.Dense(self.num_classes, use_bias=self.use_head_bias)

    @nn.compact
    def features(self, x, train):
        h = nn.Dense(self.widths[0], name="inputs")(x.reshape(len(x), -1))
        for width in self.widths[1:]:
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
            h = h + nn.Dense(width)(nn.relu(norm(h)))
        return nn.relu(h)

    def logits(self, h):
        return self.head(h)


class Plain(Own):
    """The built-in MLP."""

    @nn.compact
    def features(self, x, train):
        h = x.reshape(len(x), -1)
        for k, width in enumerate(self.widths, start=1):
            h = nn.relu(nn.Dense(width, use_bias=False, name=f"layer_{k}")(h))
        return h


class Dropping(Own):
    """Nothing but dropout on a fixed projection of the inputs: what is dropped shows."""

    @nn.compact
    def features(self, x, train):
        h = nn.Dense(self.widths[0], use_bias=False)(x.reshape(len(x), -1))
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(h))


class Fixed(nn.Module):
    """It has an attribute that nobody sets."""

    num_classes: int
    rank: int

    def features(self, x, train):
        return x

    def logits(self, h):
        return jnp.zeros((len(h), self.num_classes))


class Unsized(nn.Module):
    """It cannot be told how many classes there are."""

    def features(self, x, train):
        return x

    def logits(self, h):
        return h


class Featureless(nn.Module):
    num_classes: int

    def logits(self, h):
        return h


function = print
