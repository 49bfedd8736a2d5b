"""Networks built in, against NumPy and against PyTorch with ported weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.config import ModelConfig
from ncjax.training import layers, models

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def network(image, **fields):
    """A float64 network with generic parameters and statistics, and inputs."""
    model = models.make(ModelConfig(**fields), 3, "float64")
    x = np.random.default_rng(0).standard_normal((6, *image))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))
    rng = np.random.default_rng(1)
    leaves = {
        path: rng.uniform(0.5, 2, leaf.shape)
        if leaf.ndim < 2
        else rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        for path, leaf in layers.by_path(shapes).items()
    }
    return model, layers.nest(leaves), x


def normalize(h, parameters, epsilon, mean, var):
    return (h - mean) / np.sqrt(var + epsilon) * parameters["scale"] + parameters["bias"]


def layer_normalized(h, parameters):
    return normalize(h, parameters, 1e-6, h.mean(1, keepdims=True), h.var(1, keepdims=True))


def expected_features(x, params, join, normalization, before_head):
    """By NumPy, in training mode."""

    def normalized(kind, h, name):
        match kind:
            case "none":
                return h
            case "layer":
                return layer_normalized(h, params[name])
            case "batch":
                return normalize(h, params[name], 1e-5, h.mean(0), h.var(0))

    h = x.reshape(len(x), -1)
    for k in (1, 2, 3):
        update = h @ params[f"layer_{k}"]["kernel"]
        update = np.maximum(normalized(normalization, update, f"norm_{k}"), 0)
        h = h + update if join and k > 1 else update
    return normalized(before_head, h, "feature_norm")


@pytest.mark.parametrize("kind", ["mlp", "residual"])
@pytest.mark.parametrize(
    ("normalization", "before_head"),
    [("none", "batch"), ("batch", "none"), ("layer", "layer"), ("none", "none")],
)
def test_dense_networks_equal_numpy(kind, normalization, before_head):
    fields = {"normalization": normalization, "feature_normalization": before_head}
    model, variables, x = network((2, 4), kind=kind, widths=(5, 5, 5), **fields)
    params, stats = variables["params"], variables.get("batch_stats", {})
    found, noted = model.apply(
        variables, jnp.asarray(x), True, method="features", mutable=["batch_stats"]
    )
    expected = expected_features(x, params, kind == "residual", *fields.values())
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert set(noted.get("batch_stats", {})) == set(stats)
    np.testing.assert_allclose(
        model.apply(variables, found, method="logits"), expected @ params["head"]["kernel"]
    )


def torch_resnet(torch, widths):
    """torchvision's ResNet18 (models/resnet.py) with the stem of Papyan's notebooks: conv1 3x3 of
    stride 1, no pooling after it.
    """

    def conv(a, b, side, stride):
        return torch.nn.Conv2d(a, b, side, stride, side // 2, bias=False)

    class BasicBlock(torch.nn.Module):
        def __init__(self, a, b, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(a, b, 3, stride), torch.nn.BatchNorm2d(b)
            self.conv2, self.bn2 = conv(b, b, 3, 1), torch.nn.BatchNorm2d(b)
            self.downsample = (
                torch.nn.Sequential(conv(a, b, 1, stride), torch.nn.BatchNorm2d(b))
                if stride > 1 or a != b
                else None
            )

        def forward(self, x):
            h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(h + (x if self.downsample is None else self.downsample(x)))

    blocks = [
        BasicBlock(
            widths[max(0, stage - 1)] if place == 0 else b, b, 2 if stage and not place else 1
        )
        for stage, b in enumerate(widths)
        for place in range(2)
    ]
    return torch.nn.ModuleDict(
        {
            "conv1": conv(3, widths[0], 3, 1),
            "bn1": torch.nn.BatchNorm2d(widths[0]),
            "blocks": torch.nn.ModuleList(blocks),
            "fc": torch.nn.Linear(widths[-1], 3),
        }
    )


def port(torch, net, variables):
    """Copies weights, scales and shifts, and running statistics."""
    params, stats = variables["params"], variables["batch_stats"]

    def conv(theirs, ours):
        theirs.weight.copy_(torch.tensor(ours["kernel"].transpose(3, 2, 0, 1).copy()))

    def norm(theirs, ours, running):
        theirs.weight.copy_(torch.tensor(ours["scale"]))
        theirs.bias.copy_(torch.tensor(ours["bias"]))
        theirs.running_mean.copy_(torch.tensor(running["mean"]))
        theirs.running_var.copy_(torch.tensor(running["var"]))

    with torch.no_grad():
        conv(net["conv1"], params["stem"])
        norm(net["bn1"], params["stem_norm"], stats["stem_norm"])
        for k, block in enumerate(net["blocks"], start=1):
            ours, running = params[f"block_{k}"], stats[f"block_{k}"]
            pairs = [("conv_1", block.conv1, block.bn1), ("conv_2", block.conv2, block.bn2)]
            if block.downsample is not None:
                pairs.append(("shortcut", *block.downsample))
            assert len(ours) == 2 * len(pairs)
            for name, theirs, normalization in pairs:
                conv(theirs, ours[name])
                norm(normalization, ours[f"{name}_norm"], running[f"{name}_norm"])
        net["fc"].weight.copy_(torch.tensor(params["head"]["kernel"].T.copy()))
        net["fc"].bias.copy_(torch.tensor(params["head"]["bias"]))


@pytest.mark.parametrize(
    "widths", [(4, 6, 8, 10), pytest.param((64, 128, 256, 512), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("train", [False, True])
def test_resnet18_equals_pytorch_with_ported_weights(widths, train):
    torch = pytest.importorskip("torch")
    fields = {"kind": "resnet18", "normalization": "batch", "head_bias": "free"}
    model, variables, x = network((16, 16, 3), widths=widths, **fields)
    net = torch_resnet(torch, widths).double().train(train)
    port(torch, net, variables)
    with torch.no_grad():
        h = torch.relu(net["bn1"](net["conv1"](torch.tensor(x.transpose(0, 3, 1, 2).copy()))))
        for block in net["blocks"]:
            h = block(h)
        features = h.mean((2, 3))
        outputs = net["fc"](features)
    found, noted = model.apply(
        variables, jnp.asarray(x), train, method="features", mutable=["batch_stats"]
    )
    np.testing.assert_allclose(found, features.numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        model.apply(variables, found, method="logits"), outputs.numpy(), rtol=1e-5
    )
    running = noted["batch_stats"]["stem_norm"]["mean"]
    np.testing.assert_allclose(running, net["bn1"].running_mean.numpy(), rtol=1e-5)
    layer_names = [path[0] for path in layers.by_path(variables["params"]) if "kernel" in path]
    assert len(layer_names) == 1 + 16 + 3 + 1


def test_resnet18_has_the_parameters_of_papyans():
    """11,173,962 with ten classes and a bias, the count of torchvision's net with this stem."""
    model = models.ResNet18(widths=(64, 128, 256, 512), num_classes=10, use_head_bias=True)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962
