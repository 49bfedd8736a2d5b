"""Deep networks split where collapse is measured: `features(x, train)` below, `logits(h)` above.

Those that are built in, and `make`, which returns what a config asks for. A user's own network is
a `flax.linen.Module` with the same two methods (`training.own`).
"""

from typing import Any, get_args

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from ncjax.config import Activation, ModelConfig, ModelKind, Normalization, Precision
from ncjax.errors import unknown_choice
from ncjax.training import conv, own

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


def make_norm(
    kind: Normalization, name: str, dtype: Dtype, batch_axis: str | None
) -> nn.Module | None:
    """Returns a normalization with scale and shift (Ioffe & Szegedy 2015; Ba et al. 2016), or None.

    Running means and variances of batches, the collection `batch_stats`, forget 10% a step.
    """
    # E[x^2] - E[x]^2 in float32 can come out negative.
    common: dict[str, Any] = {
        "use_fast_variance": False,
        "dtype": dtype,
        "param_dtype": dtype,
        "name": name,
    }
    match kind:
        case "none":
            return None
        case "batch":
            return nn.BatchNorm(momentum=0.9, axis_name=batch_axis, **common)
        case "layer":
            return nn.LayerNorm(**common)
        case unknown:
            raise unknown_choice("normalization", unknown, Normalization)


def normalized(norm: nn.Module | None, h: Array, train: bool) -> Array:
    """Returns h after a normalization of `make_norm`; `train`: by the statistics of this batch."""
    if norm is None:
        return h
    if isinstance(norm, nn.BatchNorm):
        return norm(h, use_running_average=not train)
    return norm(h)


class Network(nn.Module):
    """f(x) = W_L h(x) + b with h = s(W_{L-1} ... s(W_1 x)); what W_1 to W_{L-1} are, a subclass
    says.

    With a linear head of depth d, the last d - 1 layers below W_L have no activation: h = W_{L-1}
    ... W_{L-d+1} s(...). With a linear input of depth e, neither have the first e - 1. Weights are
    drawn from N(0, 2/fan_in) (He et al. 2015), the head bias starts at 0. Parameters are named
    `layer_1`, `norm_1`, `layer_2`, ... in forward order, then `feature_norm` and `head`.

    Without normalization the network is homogeneous: logits scale with every W_k. Kernels below a
    normalization act through their directions alone and have no equilibrium of finite norm.

    Attributes:
      widths: width of each hidden layer; the last is p, the dimension of the features.
      num_classes: C.
      activation: `relu` or `linear`.
      normalization: between W_k and its activation.
      feature_normalization: of h, straight before the head (Pan & Cao 2023).
      linear_head_depth: d, layers after the last activation, the head among them (Jacot et al.
        2024).
      linear_input_depth: e, layers before the first activation; with e = 2 and inputs x_n = e_n
        the network is a deep unconstrained-feature model (Sukenik et al. 2024).
      use_head_bias: whether b exists.
      batch_axis: mesh axis over which a batch is spread, so that its statistics are those of the
        whole; None: it is on one device.
      dtype: float32 or float64, of parameters and arithmetic.
    """

    widths: tuple[int, ...]
    num_classes: int
    activation: Activation = "relu"
    normalization: Normalization = "none"
    feature_normalization: Normalization = "none"
    linear_head_depth: int = 1
    linear_input_depth: int = 1
    use_head_bias: bool = False
    batch_axis: str | None = None
    dtype: Dtype = jnp.float32

    def setup(self):
        depth = len(self.widths)
        self.layers = [self._layer(k) for k in range(1, depth + 1)]
        self.norms = [self._norm(self.normalization, f"norm_{k}") for k in range(1, depth + 1)]
        self.feature_norm = self._norm(self.feature_normalization, "feature_norm")
        self.head = nn.Dense(self.num_classes, use_bias=self.use_head_bias, **self._common("head"))

    def _common(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "kernel_init": _he_normal,
            "dtype": self.dtype,
            "param_dtype": self.dtype,
        }

    def _norm(self, kind: Normalization, name: str) -> nn.Module | None:
        return make_norm(kind, name, self.dtype, self.batch_axis)

    def _layer(self, k: int) -> nn.Module:
        raise NotImplementedError

    def _inputs(self, x: Array) -> Array:
        return x

    def _joined(self, h: Array, update: Array, k: int) -> Array:
        """Returns the output of layer k, of its input h and of s(W_k h)."""
        return update

    def features(self, x: Float[Array, "B *image"], train: bool = False) -> Float[Array, "B p"]:
        """h(x). `train` matters to batch normalization alone: by the statistics of this batch,
        which it notes.
        """
        h = self._inputs(x)
        last_activation = len(self.layers) - (self.linear_head_depth - 1)
        for k, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), start=1):
            update = normalized(norm, layer(h), train)
            if self.linear_input_depth <= k <= last_activation:
                update = activate(self.activation, update)
            h = self._joined(h, update, k)
        return normalized(self.feature_norm, h.reshape(len(h), -1), train)

    def logits(self, h: Float[Array, "B p"]) -> Float[Array, "B C"]:
        return self.head(h)

    def __call__(self, x: Float[Array, "B *image"], train: bool = False) -> Float[Array, "B C"]:
        return self.logits(self.features(x, train))


class MLP(Network):
    """Dense layers without bias."""

    def _layer(self, k: int) -> nn.Module:
        return nn.Dense(self.widths[k - 1], use_bias=False, **self._common(f"layer_{k}"))

    def _inputs(self, x: Array) -> Array:
        return x.reshape(len(x), -1)


class ResidualMLP(MLP):
    """Dense layers without bias, of one width, each but the first added to its input: h <- h +
    s(W_k h) (He et al. 2016). Logits scale with W_1 and W_L; what lies between has no degree.
    """

    def _joined(self, h: Array, update: Array, k: int) -> Array:
        return update if k == 1 else h + update


class ConvNet(Network):
    """3x3 convolutions of stride 2, zero-padded by 1, below a dense head; no bias below it.

    `widths` are channels; each layer halves the sides (rounding up), so a 32x32 image has
    p = 4 widths[-1] features after four. Kernels are (3, 3, in, out), fan_in = 9 in. With batch
    normalization and widths 32, 64, 128, 256 on 32x32 images it is the network of Rangamani &
    Banburski (ICASSP 2022) as far as that is known, whose head is a 2x2 convolution, dense over the
    1024 features.

    Attributes:
      slices_patches: whether convolutions are matmuls over sliced patches (`conv.convolve`), or
        `lax.conv_general_dilated`. The numbers are the same to rounding; `placed` decides.
    """

    slices_patches: bool = True

    def _layer(self, k: int) -> nn.Module:
        channels, name = self.widths[k - 1], f"layer_{k}"
        return make_conv(channels, 3, 2, self.dtype, name, self.slices_patches)


def make_conv(
    channels: int, side: int, stride: int, dtype: Dtype, name: str, slices_patches: bool
) -> nn.Conv:
    """Returns a square convolution without bias, zero-padded so that stride 1 keeps the sides.

    `slices_patches`: see `ConvNet`.
    """
    return nn.Conv(
        channels,
        (side, side),
        strides=stride,
        padding=side // 2,
        use_bias=False,
        kernel_init=_he_normal,
        conv_general_dilated=conv.convolve if slices_patches else None,
        dtype=dtype,
        param_dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """s(shortcut(x) + norm(conv(s(norm(conv(x)))))), both convolutions 3x3 (He et al. 2016).

    Attributes:
      channels: of the output. The shortcut is x, or, where sides or channels change, a normalized
        1x1 convolution of it.
      stride: of the first convolution and of the shortcut.
      batch_axis, dtype: see `Network`.
      slices_patches: see `ConvNet`.
    """

    channels: int
    stride: int
    batch_axis: str | None
    dtype: Dtype
    slices_patches: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool) -> Float[Array, "B h w d"]:
        def convolved(h: Array, side: int, stride: int, name: str) -> Array:
            h = make_conv(self.channels, side, stride, self.dtype, name, self.slices_patches)(h)
            norm = make_norm("batch", f"{name}_norm", self.dtype, self.batch_axis)
            return normalized(norm, h, train)

        h = nn.relu(convolved(x, 3, self.stride, "conv_1"))
        h = convolved(h, 3, 1, "conv_2")
        if self.stride > 1 or x.shape[-1] != self.channels:
            x = convolved(x, 1, self.stride, "shortcut")
        return nn.relu(x + h)


class ResNet18(nn.Module):
    """ResNet18 (He et al. 2016) with the stem of Papyan, Han & Donoho (2020) for small images: a
    3x3 convolution of stride 1, no pooling. Features are the mean over positions of the last block.

    Weights are drawn from N(0, 2/fan_in), the head bias starts at 0.

    Attributes:
      widths: channels of the four stages, of two blocks each; the original's are 64, 128, 256, 512.
      num_classes, use_head_bias, batch_axis, dtype: see `Network`.
      slices_patches: see `ConvNet`.
    """

    widths: tuple[int, ...]
    num_classes: int
    use_head_bias: bool = False
    batch_axis: str | None = None
    dtype: Dtype = jnp.float32
    slices_patches: bool = True

    def setup(self):
        self.stem = make_conv(self.widths[0], 3, 1, self.dtype, "stem", self.slices_patches)
        self.stem_norm = make_norm("batch", "stem_norm", self.dtype, self.batch_axis)
        self.blocks = [
            ResidualBlock(
                channels,
                stride=2 if stage > 0 and place == 0 else 1,
                batch_axis=self.batch_axis,
                dtype=self.dtype,
                slices_patches=self.slices_patches,
                name=f"block_{2 * stage + place + 1}",
            )
            for stage, channels in enumerate(self.widths)
            for place in range(2)
        ]
        self.head = nn.Dense(
            self.num_classes,
            use_bias=self.use_head_bias,
            kernel_init=_he_normal,
            dtype=self.dtype,
            param_dtype=self.dtype,
        )

    def features(self, x: Float[Array, "B H W c"], train: bool = False) -> Float[Array, "B p"]:
        """h(x). `train`: normalized by the statistics of this batch, which it notes."""
        h = nn.relu(normalized(self.stem_norm, self.stem(x), train))
        for block in self.blocks:
            h = block(h, train)
        return h.mean((1, 2))

    def logits(self, h: Float[Array, "B p"]) -> Float[Array, "B C"]:
        return self.head(h)

    def __call__(self, x: Float[Array, "B H W c"], train: bool = False) -> Float[Array, "B C"]:
        return self.logits(self.features(x, train))


def make(settings: ModelConfig, num_classes: int, precision: Precision) -> nn.Module:
    """Returns the network that a config's `model` section describes."""
    asked = {
        "num_classes": num_classes,
        "widths": tuple(settings.widths),
        "activation": settings.activation,
        "normalization": settings.normalization,
        "feature_normalization": settings.feature_normalization,
        "linear_head_depth": settings.linear_head_depth,
        "linear_input_depth": settings.linear_input_depth,
        "use_head_bias": settings.head_bias != "none",
        "dtype": jnp.dtype(precision),
    }
    if settings.network:
        return own.make(settings.network, asked)
    if settings.normalization not in get_args(Normalization):
        raise unknown_choice("model.normalization", settings.normalization, Normalization)
    match settings.kind:
        case "mlp":
            return MLP(**asked)
        case "conv":
            return ConvNet(**asked)
        case "residual":
            return ResidualMLP(**asked)
        case "resnet18":
            fields = ResNet18.__dataclass_fields__
            return ResNet18(**{name: value for name, value in asked.items() if name in fields})
        case unknown:
            raise unknown_choice("model.kind", unknown, ModelKind)


def placed(model: nn.Module, platform: str, batch_axis: str | None) -> nn.Module:
    """Returns the same network as it runs on a platform, on batches that are spread over a mesh
    axis.

    On a CPU sliced patches are faster by far (docs/performance.md). By XLA's count `lax.conv` moves
    a twentieth of their bytes on a TPU, and a third more on a GPU; neither was timed
    (docs/scaling.md).
    """
    wanted = {"batch_axis": batch_axis, "slices_patches": platform != "tpu"}
    return model.clone(**{name: value for name, value in wanted.items() if hasattr(model, name)})


def outputs(
    model: nn.Module, x: Float[Array, "B *image"], train: bool = False
) -> Float[Array, "B C"]:
    """Returns f(x), as a `method` of a network's `init` and `apply`."""
    features: Any = model
    return features.logits(features.features(x, train))
