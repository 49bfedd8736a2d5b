"""Deep networks split where collapse is measured: `features(x)` below, `logits(h)` above."""

from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from ncjax.config import Activation, HeadBias, ModelConfig, NormDecay, Precision
from ncjax.errors import InputError, unknown_choice
from ncjax.training import conv

_he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def activate(name: Activation, x: Array) -> Array:
    """Returns s(x)."""
    match name:
        case "relu":
            return nn.relu(x)
        case "linear":
            return x
        case unknown:
            raise unknown_choice("activation", unknown, Activation)


class Network(nn.Module):
    """f(x) = W_L h(x) + b with h = s(W_{L-1} ... s(W_1 x)); what W_1 to W_{L-1} are, a subclass
    says.

    With a linear head of depth d, the last d - 1 layers below W_L have no activation: h = W_{L-1}
    ... W_{L-d+1} s(...). Weights are drawn from N(0, 2/fan_in) (He et al. 2015), the head bias
    starts at 0. Parameters are named `layer_1`, `layer_2`, ... in forward order, then `head`.

    Attributes:
      widths: width of each hidden layer; the last is p, the dimension of the features.
      num_classes: C.
      activation: `relu` or `linear`.
      linear_head_depth: d, layers after the last activation, the head among them (Jacot et al.
        2024).
      use_head_bias: whether b exists.
      dtype: float32 or float64, of parameters and arithmetic.
    """

    widths: tuple[int, ...]
    num_classes: int
    activation: Activation = "relu"
    linear_head_depth: int = 1
    use_head_bias: bool = False
    dtype: Dtype = jnp.float32

    is_homogeneous = True

    def setup(self):
        self.layers = [self._layer(k) for k in range(1, len(self.widths) + 1)]
        self.head = nn.Dense(self.num_classes, use_bias=self.use_head_bias, **self._common("head"))

    def _common(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "kernel_init": _he_normal,
            "dtype": self.dtype,
            "param_dtype": self.dtype,
        }

    def _layer(self, k: int) -> nn.Module:
        raise NotImplementedError

    def _inputs(self, x: Array) -> Array:
        return x

    def _normalized(self, h: Array, k: int, train: bool) -> Array:
        """Returns what stands between W_k and its activation."""
        return h

    def features(self, x: Float[Array, "B *image"], train: bool = False) -> Float[Array, "B p"]:
        """h(x). `train` matters to batch normalization alone: by the statistics of this batch,
        which it notes.
        """
        h = self._inputs(x)
        last_activation = len(self.layers) - (self.linear_head_depth - 1)
        for k, layer in enumerate(self.layers, start=1):
            h = self._normalized(layer(h), k, train)
            if k <= last_activation:
                h = activate(self.activation, h)
        return h.reshape(len(h), -1)

    def logits(self, h: Float[Array, "B p"]) -> Float[Array, "B C"]:
        return self.head(h)

    def __call__(self, x: Float[Array, "B *image"], train: bool = False) -> Float[Array, "B C"]:
        return self.logits(self.features(x, train))


class HomogeneousMLP(Network):
    """Dense layers without bias or normalization: degree 1 in every W_k."""

    def _layer(self, k: int) -> nn.Module:
        return nn.Dense(self.widths[k - 1], use_bias=False, **self._common(f"layer_{k}"))

    def _inputs(self, x: Array) -> Array:
        return x.reshape(len(x), -1)


class HomogeneousConvNet(Network):
    """3x3 convolutions of stride 2, zero-padded by 1, below a dense head; no bias below it: degree
    1 in every W_k.

    `widths` are channels; each layer halves the sides (rounding up), so a 32x32 image has
    p = 4 widths[-1] features after four. Kernels are (3, 3, in, out), fan_in = 9 in.
    """

    def _layer(self, k: int) -> nn.Module:
        return nn.Conv(
            self.widths[k - 1],
            (3, 3),
            strides=2,
            padding=1,
            use_bias=False,
            conv_general_dilated=conv.convolve,
            **self._common(f"layer_{k}"),
        )


class BatchNormConvNet(HomogeneousConvNet):
    """Its convolutions with batch normalization (Ioffe & Szegedy 2015) before every activation: no
    longer homogeneous.

    Kernels below a normalization act through their directions alone and have no equilibrium of
    finite norm. Scale and shift are `norm_1`, `norm_2`, ...; running means and variances, the
    collection `batch_stats`, forget 10% a step. With widths 32, 64, 128, 256 on 32x32 images the
    network of Rangamani & Banburski (ICASSP 2022) as far as it is known, whose head is a 2x2
    convolution, dense over the 1024 features.
    """

    # Mesh axis over which a batch is spread, so that its statistics are those of the whole; None:
    # it is on one device.
    batch_axis: str | None = None

    is_homogeneous = False

    def setup(self):
        super().setup()
        self.norms = [
            nn.BatchNorm(
                momentum=0.9,
                # E[x^2] - E[x]^2 in float32 can come out negative.
                use_fast_variance=False,
                axis_name=self.batch_axis,
                dtype=self.dtype,
                param_dtype=self.dtype,
                name=f"norm_{k}",
            )
            for k in range(1, len(self.widths) + 1)
        ]

    def _normalized(self, h: Array, k: int, train: bool) -> Array:
        return self.norms[k - 1](h, use_running_average=not train)


def make(settings: ModelConfig, num_classes: int, precision: Precision) -> Network:
    """Returns the network that a config's `model` section describes."""
    match settings.kind, settings.normalization:
        case "mlp", "none":
            network = HomogeneousMLP
        case "conv", "none":
            network = HomogeneousConvNet
        case "conv", "batch":
            network = BatchNormConvNet
        case unknown:
            ways = "mlp with none, conv with none or batch"
            raise InputError("model.kind and model.normalization", unknown, f"there are {ways}")
    return network(
        widths=tuple(settings.widths),
        num_classes=num_classes,
        activation=settings.activation,
        linear_head_depth=settings.linear_head_depth,
        use_head_bias=settings.head_bias != "none",
        dtype=jnp.dtype(precision),
    )


def over_devices(model: Network, batch_axis: str | None) -> Network:
    """The same network on batches that are spread over a mesh axis."""
    return model.clone(batch_axis=batch_axis) if isinstance(model, BatchNormConvNet) else model


def part_names(params: dict) -> tuple[str, ...]:
    """Names of all that has parameters, in forward order; the last is `head`."""
    below = (name for name in params if name != "head")
    return (*sorted(below, key=lambda name: (int(name.rpartition("_")[2]), name)), "head")


def layer_names(params: dict) -> tuple[str, ...]:
    """Returns the names of those parts that are layers of weights."""
    return tuple(name for name in part_names(params) if not name.startswith("norm_"))


def is_decayed(params: dict, head_bias: HeadBias, norms: NormDecay) -> dict:
    """Marks the leaves that weight decay acts on: all, but for a free head bias and free scales
    and shifts of norms.
    """
    for name, value, choices in (
        ("head_bias", head_bias, HeadBias),
        ("norms", norms, NormDecay),
    ):
        if value not in get_args(choices):
            raise unknown_choice(name, value, choices)

    def mark(path: tuple, _: Any) -> bool:
        layer, leaf = (key.key for key in path)
        if layer == "head":
            return leaf == "kernel" or head_bias != "free"
        return leaf == "kernel" or norms != "free"

    return jax.tree_util.tree_map_with_path(mark, params)
