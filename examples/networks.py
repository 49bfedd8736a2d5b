"""A network of one's own: any flax module with `features(x, train)` and `logits(h)`.

    ncjax train --config=digits --config.model.network=examples.networks:ResidualMLP \
        --workdir=runs/residual

Attributes named as fields of the config's `model` section are set by it: here `widths`. The head is
one dense layer of this name. Any other collection of variables, as running statistics, is every
run's own. What scaling a layer does to the logits is measured at the start, and theory that needs
another network is NaN and says so.
"""

import flax.linen as nn


class ResidualMLP(nn.Module):
    """Dense layers of one width, without bias, each but the first added to its input."""

    num_classes: int
    widths: tuple[int, ...]

    def setup(self):
        self.head = nn.Dense(self.num_classes, use_bias=False)

    @nn.compact
    def features(self, x, train):
        h = nn.Dense(self.widths[0], use_bias=False)(x.reshape(len(x), -1))
        for width in self.widths[1:]:
            h = h + nn.Dense(width, use_bias=False)(nn.relu(h))
        return nn.relu(h)

    def logits(self, h):
        return self.head(h)
