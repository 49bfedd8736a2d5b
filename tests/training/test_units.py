"""units = torch: the numbers of a PyTorch recipe give PyTorch's trajectory. PyTorch itself where it
is installed, and always its documented update rules, written out in its own units."""

import functools

import jax
import numpy as np
import pytest

from ncjax import plan
from ncjax.config import default_config
from ncjax.runs import loop
from tests.helpers import unmeasured

STEPS, CLASSES = 10, 3
# loss, optimizer, learning rate, momentum or beta_1, weight decay, mean norm of an input.
CASES = {
    "sgd": ("square", "sgd", 0.3, 0.9, 2e-2, 2.0),
    "adam": ("square", "adam", 0.02, 0.8, 5e-2, 2.0),
    "adamw": ("square", "adamw", 0.02, 0.9, 0.5, 2.0),
    "adamw_at_eps": (
        "square",
        "adamw",
        0.02,
        0.9,
        0.5,
        1e-7,
    ),  # gradients no larger than Adam's eps
    "cross_entropy": ("cross_entropy", "sgd", 0.3, 0.9, 2e-2, 2.0),
    "cross_entropy_adam": ("cross_entropy", "adam", 0.02, 0.8, 5e-2, 2.0),
}


@functools.cache
def trained_by_us(case, folder):
    """Start, inputs, labels and end of ten full-batch steps in float64; weights (in, out), the
    head's bias last.
    """
    loss, optimizer, learning_rate, momentum, weight_decay, input_scale = CASES[case]
    config = default_config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", CLASSES, 8
    config.data.input_scale = input_scale
    config.model.widths, config.model.head_bias = (6,), "decayed"
    config.loss, config.train.optimizer, config.units = loss, optimizer, "torch"
    config.train.epochs, config.train.batch_size, config.train.schedule = STEPS, 0, "constant"
    config.train.precision = "float64"
    config.sweep.learning_rate, config.sweep.momentum, config.sweep.weight_decay = (
        learning_rate,
        momentum,
        weight_decay,
    )
    sweep = loop.Sweep(plan.prepare(config, folder))

    def weights():
        params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], sweep.states.params)
        return [params["layer_1"]["kernel"], params["head"]["kernel"], params["head"]["bias"]]

    start = weights()
    with jax.enable_x64(True):
        inputs = np.asarray(sweep.data.normalize(sweep.data.train.images)).reshape(
            -1, len(start[0])
        )
    with unmeasured():
        sweep.advance(STEPS, measured=False)
    return start, inputs, np.asarray(sweep.data.train.labels), weights()


def torch_gradients(weights, x, labels, loss):
    """Of MSELoss(), the mean over examples and outputs, or CrossEntropyLoss(), the mean over
    examples.
    """
    first, head, bias = weights
    z = x @ first
    h = np.maximum(z, 0)
    f, y = h @ head + bias, np.eye(CLASSES)[labels]
    shares = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    back = 2 * (f - y) / f.size if loss == "square" else (shares - y) / len(f)
    return [x.T @ (back @ head.T * (z > 0)), h.T @ back, back.sum(0)]


def trained_by_the_rules(start, x, labels, case):
    """torch.optim.SGD, Adam and AdamW as their documentation states them."""
    loss, optimizer, learning_rate, momentum, weight_decay, _ = CASES[case]
    weights, buffers = [w.copy() for w in start], [np.zeros_like(w) for w in start]
    squares = [np.zeros_like(w) for w in start]
    for step in range(1, STEPS + 1):
        for k, g in enumerate(torch_gradients(weights, x, labels, loss)):
            if optimizer == "adamw":
                decayed = weights[k] * (1 - learning_rate * weight_decay)
            else:
                decayed, g = weights[k], g + weight_decay * weights[k]
            if optimizer == "sgd":
                buffers[k] = momentum * buffers[k] + g
                weights[k] = decayed - learning_rate * buffers[k]
            else:
                buffers[k] = momentum * buffers[k] + (1 - momentum) * g
                squares[k] = 0.999 * squares[k] + 0.001 * g**2
                m, v = buffers[k] / (1 - momentum**step), squares[k] / (1 - 0.999**step)
                weights[k] = decayed - learning_rate * m / (np.sqrt(v) + 1e-8)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("units")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "sgd" else pytest.mark.slow) for case in CASES],
)
def test_ten_steps_in_torch_units_equal_pytorchs_update_rules(case, folder):
    start, inputs, labels, end = trained_by_us(case, folder)
    for ours, first, expected in zip(
        end, start, trained_by_the_rules(start, inputs, labels, case), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
        assert np.linalg.norm(expected - first) > 0.01 * np.linalg.norm(first)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_in_torch_units_equal_pytorch(case, folder):
    torch = pytest.importorskip("torch")
    loss, optimizer, learning_rate, momentum, weight_decay, _ = CASES[case]
    start, inputs, labels, end = trained_by_us(case, folder)
    net = torch.nn.Sequential(
        torch.nn.Linear(*start[0].shape, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(*start[1].shape),
    ).double()
    parameters = [net[0].weight, net[2].weight, net[2].bias]
    with torch.no_grad():
        for parameter, w in zip(parameters, start, strict=True):
            parameter.copy_(torch.tensor(w.T.copy()))
    choice = {"lr": learning_rate, "weight_decay": weight_decay}
    if optimizer == "sgd":
        tx = torch.optim.SGD(parameters, momentum=momentum, **choice)
    else:
        tx = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](
            parameters, betas=(momentum, 0.999), **choice
        )
    y = torch.tensor(labels, dtype=torch.int64)
    for _ in range(STEPS):
        tx.zero_grad()
        outputs = net(torch.tensor(inputs))
        if loss == "square":
            torch.nn.MSELoss()(outputs, torch.nn.functional.one_hot(y, CLASSES).double()).backward()
        else:
            torch.nn.CrossEntropyLoss()(outputs, y).backward()
        tx.step()
    for ours, parameter in zip(end, parameters, strict=True):
        np.testing.assert_allclose(ours, parameter.detach().numpy().T, rtol=1e-9, atol=1e-12)


def test_pytorchs_numbers_taken_for_ours_give_another_trajectory(folder):
    """The premise: what the factors do is not small."""
    start, inputs, labels, end = trained_by_us("sgd", folder)
    loss, optimizer, learning_rate, *rest = CASES["sgd"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, "wrong", (loss, optimizer, learning_rate * 2 / CLASSES, *rest))
        expected = trained_by_the_rules(start, inputs, labels, "wrong")
    assert max(np.abs(a - b).max() for a, b in zip(end, expected, strict=True)) > 1e-2
