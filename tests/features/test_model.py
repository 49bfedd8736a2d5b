"""`ncjax.measure_model`: a PyTorch model's features are those that float64 NumPy measures, and the
model is afterwards bit for bit what it was.
"""

import copy
import doctest
import itertools
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest

import ncjax
from ncjax.errors import InputError
from ncjax.features import kept
from ncjax.features import model as module
from tests.features.test_measure import oracle
from tests.helpers import ROOT

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
C, N = 5, 60


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A small one; its head is registered first and runs last."""

    def __init__(self, classes=C):
        super().__init__()
        self.fc = nn.Linear(8, classes)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2 = Block(8), Block(8)
        self.squeeze = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.block2(self.block1(self.stem(x)))
        return self.fc(self.drop(F.relu(self.squeeze(x.mean((2, 3))))))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.permutation(np.arange(N) % C))
    images = rng.standard_normal((C, 3, 6, 6))[labels] + 0.3 * rng.standard_normal((N, 3, 6, 6))
    return torch.from_numpy(images.astype(np.float32)), labels


@pytest.fixture
def model(data):
    torch.manual_seed(0)
    model = ResNet().train()
    for _ in range(3):  # running statistics that are no defaults
        model(data[0])
    return model


def loader(data, **options):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data), **{"batch_size": 16, **options}
    )


def hooked(model, images, name="fc"):
    """Features that a hook of our own sees, all examples in one batch."""
    other, seen = copy.deepcopy(model).eval(), []
    module = dict(other.named_modules())[name]
    module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        other(images)
    taken = seen[0][0] if isinstance(module, nn.Linear) else seen[0][1]
    return taken.numpy().astype(np.float64)


def expected_of(model, data):
    features = hooked(model, data[0])
    weight, bias = model.fc.weight.detach().numpy(), model.fc.bias.detach().numpy()
    return oracle(features, data[1].numpy(), weight, bias)


def assert_close(got, expected, rtol=1e-5):
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol, atol=rtol, err_msg=name)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_it_was(model, state, modes):
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(now[name], tensor), name
    assert [module.training for module in model.modules()] == modes
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(itertools.chain(*hooks))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resnet_with_batch_norm_and_dropout_equals_float64_numpy(model, data):
    model.block1.eval()  # a part that its owner keeps frozen
    expected, state = expected_of(model, data), state_of(model)
    modes = [module.training for module in model.modules()]
    random, probe = torch.get_rng_state(), copy.deepcopy(model).eval()(data[0])
    for options in ({}, {"shuffle": True}):
        got = ncjax.measure_model(model, loader(data, **options))
        assert_close(got, expected)
        assert_as_it_was(model, state, modes)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(copy.deepcopy(model).eval()(data[0]), probe)
    assert {"nc3", "nc4", "accuracy"} <= {*got}


def test_run_twice_it_gives_the_same_as_kept(model, data):
    once = ncjax.measure_model(model, loader(data), "fc")
    twice = ncjax.measure_model(model, loader(data, shuffle=True), keep=False)
    assert_close(twice, once)
    with pytest.raises(InputError, match="keep: got False"):
        ncjax.measure_model(model, loader(data), layers=["stem", "fc"], keep=False)
    with pytest.raises(InputError, match="loader: got 'list_iterator'"):
        ncjax.measure_model(model, iter([data]), keep=False)


def test_layers_are_rows_each_pooled_and_the_last_with_its_head(model, data):
    names = ["block1", "block2", "fc"]
    got = ncjax.measure_model(model, loader(data), layers=names)
    assert [*got] == names
    for name in names[:2]:
        features = hooked(model, data[0], name).mean((2, 3))
        assert_close(got[name], ncjax.measure(features, data[1].numpy()), 1e-4)
        assert "nc3" not in got[name]
    assert_close(got["fc"], expected_of(model, data))
    frame, dataset = got.to_dataframe(), got.to_dataset()
    assert frame.loc["fc", "nc3"] == got["fc"].nc3 == dataset["nc3"].sel(layer="fc")
    assert np.isnan(frame.loc["block1", "nc3"])
    assert all(name in repr(got) and name in got._repr_html_() for name in names)


def test_a_class_without_examples_is_missing_in_every_layer(model, data):
    kept = data[1] != C - 1
    got = ncjax.measure_model(model, [(data[0][kept], data[1][kept])], layers=["block1", "fc"])
    assert got["block1"].missing == got["fc"].missing == [C - 1]


class Counted(nn.Module):
    """Counts what it does in a buffer, in eval mode too, and fails where it is told to."""

    def __init__(self, fails_at):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.fails_at = fails_at

    def forward(self, x):
        self.count = self.count + 1
        if self.count == self.fails_at:
            raise RuntimeError("out of memory")
        return self.fc(self.norm(x))


@pytest.mark.parametrize("keep", [True, False])
def test_after_an_error_the_model_is_as_it_was(keep):
    model = Counted(fails_at=3).train()
    model.norm.eval()
    state, modes = state_of(model), [module.training for module in model.modules()]
    batches = [(torch.randn(6, 4), torch.arange(6) % 2)] * 4
    with pytest.raises(RuntimeError, match="out of memory"):
        ncjax.measure_model(model, batches, keep=keep)
    assert_as_it_was(model, state, modes)


def test_what_runs_without_an_error_and_counts_in_a_buffer_is_as_it_was():
    model = Counted(fails_at=-1).train()
    state, modes = state_of(model), [module.training for module in model.modules()]
    ncjax.measure_model(model, [(torch.randn(20, 4), torch.arange(20) % 2)])
    assert_as_it_was(model, state, modes)


class Output(dict):
    """Behaves as an output of Hugging Face's models does."""


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.classifier = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        states = self.encoder(self.embed(input_ids))
        return Output(loss=torch.zeros(()), logits=self.classifier(states[:, 0]))


def test_batches_are_mappings_and_outputs_as_hugging_face_has_them():
    torch.manual_seed(0)
    model, ids, labels = Texts(), torch.randint(50, (30, 7)), torch.arange(30) % 3
    mask = torch.ones_like(ids)
    batches = [
        {
            "input_ids": ids[i : i + 10],
            "attention_mask": mask[i : i + 10],
            "labels": labels[i : i + 10],
        }
        for i in range(0, 30, 10)
    ]
    expected = ncjax.measure_model(model, batches)
    for options in (
        {"inputs": "input_ids"},
        {"inputs": ["input_ids", "attention_mask"], "labels": "labels"},
        {
            "inputs": lambda b: (b["input_ids"], b["attention_mask"]),
            "labels": lambda b: b["labels"],
        },
        {"inputs": lambda b: {"input_ids": b["input_ids"]}},
    ):
        assert ncjax.measure_model(model, batches, **options) == expected
    # The encoder has no head; the model's outputs are the logits.
    tokens = ncjax.measure_model(model, batches, "encoder", pool="cls")
    assert tokens.nc1 == pytest.approx(expected.nc1, rel=1e-4)
    assert tokens.accuracy == expected.accuracy
    assert "nc3" not in tokens
    mean = ncjax.measure_model(model, batches, "encoder")
    flat = ncjax.measure_model(model, batches, "encoder", pool="flatten")
    assert (flat.centred.shape[1], mean.centred.shape[1]) == (42, 6)


def test_tokens_with_a_label_each_are_examples_by_a_function():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(10, 7, 4), torch.randint(3, (10, 7))
    y[:, 0] = -100
    got = ncjax.measure_model(
        model,
        [{"x": x, "tags": y}],
        inputs="x",
        labels=lambda batch: batch["tags"].reshape(-1),
        pool=lambda h: h.reshape(-1, h.shape[-1]),
        ignore_label=-100,
    )
    kept = (y != -100).numpy().ravel()
    assert got.examples.sum() == kept.sum() == 60
    h = model[1](model[0](x)).detach().numpy().reshape(-1, 6)[kept]
    assert_close(got, ncjax.measure(h, y.numpy().ravel()[kept]), 1e-4)


def test_a_head_of_one_output_is_left_out_and_said():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    got = ncjax.measure_model(model, [(torch.randn(20, 4), torch.arange(20) % 2)])
    assert "nc3" not in got
    assert any("one output" in note for note in got.notes)


def test_examples_in_docstrings_give_what_they_say():
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert (results.attempted, results.failed) == (6, 0)


def test_bfloat16_models_and_autocast_are_measured(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, C))
    exact = ncjax.measure_model(model, [data])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_autocast = ncjax.measure_model(model, [data])
    half = ncjax.measure_model(model.bfloat16(), [(data[0].bfloat16(), data[1])])
    for got in (by_autocast, half):
        assert got.nc1 == pytest.approx(exact.nc1, rel=0.05)
        assert got.nc1 != exact.nc1


def test_random_augmentation_is_measured_on_the_features_of_one_pass(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, C))
    seen = []

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            seen.append((data[0][i] + 0.1 * torch.randn(3, 6, 6), data[1][i]))
            return seen[-1]

    got = ncjax.measure_model(model, torch.utils.data.DataLoader(Noisy(), 20))
    x, y = (torch.stack(part) for part in zip(*seen, strict=True))
    assert len(x) == N
    assert_close(got, ncjax.measure_model(model, [(x, y)]))
    with pytest.raises(InputError, match="both passes must see the same examples"):
        ncjax.measure_model(model, torch.utils.data.DataLoader(Noisy(), 20), keep=False)


def test_features_beyond_memory_are_kept_in_a_file(model, data, monkeypatch):
    expected = ncjax.measure_model(model, loader(data))
    monkeypatch.setattr(kept, "_BLOCK", 7 * 8 * 4)
    monkeypatch.setattr(kept.environment, "physical_memory", lambda: 4 * 7 * 8 * 4)
    features = kept.KeptFeatures()
    rows = np.arange(40 * 8, dtype=np.float32).reshape(40, 8)
    for i in range(0, 40, 16):
        features.add(rows[i : i + 16], np.arange(i, min(40, i + 16)))
    blocks = list(features)
    assert isinstance(blocks[1][0], np.memmap)
    np.testing.assert_array_equal(np.concatenate([h for h, _ in blocks]), rows)
    np.testing.assert_array_equal(np.concatenate([y for _, y in blocks]), np.arange(40))
    monkeypatch.setattr(kept.environment, "physical_memory", lambda: 10**7)
    assert_close(ncjax.measure_model(model, loader(data)), expected)


class Heads(nn.Module):
    """A body, a head, an auxiliary `Linear`, and a function of them that gives the outputs."""

    def __init__(self, outputs, aux=3):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 8), nn.Linear(8, C), nn.Linear(8, aux)
        self.outputs = outputs

    def forward(self, x):
        return self.outputs(self, F.relu(self.body(x)))


def of_heads(outputs, *shape, **options):
    """A model, its batches, and its decisions about them."""
    torch.manual_seed(3)
    model = Heads(outputs, **options)
    x, y = torch.randn(N, *shape, 6), torch.arange(N) % C
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    output = model(x)
    decided = output.argmax(1) if isinstance(output, torch.Tensor) else None
    return model, batches, None if decided is None else (decided == y).double().mean().item()


OTHERWISE = {
    "another sign": (lambda m, h: -m.head(h), (), {}),
    "a scale": (lambda m, h: m.head(h) / 2, (), {}),
    "one token": (lambda m, h: m.head(h)[:, 0], (4,), {}),
    "an auxiliary head last": (lambda m, h: (m.head(h), m.aux(h))[0], (), {}),
    "one of as many classes": (lambda m, h: (m.head(h), m.aux(h))[0], (), {"aux": C}),
}


@pytest.mark.parametrize("case", OTHERWISE)
@pytest.mark.parametrize("keep", [True, False])
def test_a_head_that_is_not_the_models_output_is_left_out_and_warned_of(case, keep):
    outputs, shape, options = OTHERWISE[case]
    model, batches, accuracy = of_heads(outputs, *shape, **options)
    with pytest.warns(UserWarning, match="its head is left out") as warned:
        got = ncjax.measure_model(model, batches, keep=keep, weight_decay=0.1)
    assert [str(one.message) for one in warned] == got.cautions
    assert "pool=" in got.cautions[0]
    assert "layer=" in got.cautions[0]
    assert got.accuracy == pytest.approx(accuracy)
    assert got.missing == []
    assert not {"nc3", "nc2_norm_head", "equilibrium_residual"} & {*got}


def test_one_token_is_measured_with_its_head_by_the_right_pool():
    model, batches, accuracy = of_heads(lambda m, h: m.head(h)[:, 0], 4)
    got = ncjax.measure_model(model, batches, pool="cls")
    first = [(x[:, 0], y) for x, y in batches]
    assert got.accuracy == pytest.approx(accuracy)
    assert_close(got, ncjax.measure_model(of_heads(lambda m, h: m.head(h))[0], first))


SAME = {
    "log_softmax": lambda m, h: F.log_softmax(m.head(h), 1),
    "softmax": lambda m, h: m.head(h).softmax(1),
    "a mapping": lambda m, h: {"logits": m.head(h), "states": h},
    "a tuple": lambda m, h: (h, m.head(h)),
    "nothing to compare with": lambda m, h: m.head(h).unsqueeze(1),
}


@pytest.mark.parametrize("case", SAME)
def test_a_head_that_is_the_models_output_is_measured(case):
    plain, batches, _ = of_heads(lambda m, h: m.head(h))
    model = copy.deepcopy(plain)
    model.outputs = SAME[case]
    assert ncjax.measure_model(model, batches) == ncjax.measure_model(plain, batches)


def test_a_head_that_is_the_models_output_in_some_batches_alone_is_refused():
    model, batches, _ = of_heads(lambda m, h: m.head(h)[:, 0], 4)
    batches = [(x[:, : 1 + 3 * i], y) for i, (x, y) in enumerate(batches)]
    with pytest.raises(InputError, match="layer: got 'head'; its W h"):
        ncjax.measure_model(model, batches)


def test_rounding_of_half_precision_is_no_difference():
    model, batches, _ = of_heads(lambda m, h: m.head(h))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "nc3" in ncjax.measure_model(model, batches)
    model.outputs = lambda m, h: m.head.bfloat16()(h.bfloat16()).float()
    assert "nc3" in ncjax.measure_model(model, batches)


def test_a_hidden_linear_is_no_head():
    model, batches, accuracy = of_heads(lambda m, h: m.head(h))
    got = ncjax.measure_model(model, batches, "body")
    features = np.concatenate([x.numpy() for x, _ in batches])
    labels = np.concatenate([y.numpy() for _, y in batches])
    assert_close(got, ncjax.measure(features, labels), 1e-4)
    assert (got.missing, "nc3" in got, got.cautions) == ([], False, [])
    assert got.accuracy == pytest.approx(accuracy)


def test_layers_are_in_the_order_in_which_they_run():
    model, batches, _ = of_heads(lambda m, h: m.head(h))
    got = ncjax.measure_model(model, batches, layers=["head", "body"])
    assert [*got] == ["body", "head"]
    assert ("nc3" in got["body"], "nc3" in got["head"]) == (False, True)


def test_of_a_tuple_the_logits_are_what_the_last_linear_gives():
    model, batches, _ = of_heads(lambda m, h: (h, m.head(h)))
    logits = torch.cat([model(x)[1] for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    got = ncjax.measure_model(model, batches, "body")
    assert got.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert any("element 1" in note for note in got.notes)


@pytest.mark.parametrize("name", ["0", "1", "2", "3"])
def test_channels_of_one_dimensional_convolutions_are_features(name):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(24, C))
    x, y = torch.randn(N, 3, 10), torch.arange(N) % C
    got = ncjax.measure_model(model, [(x, y)], name)
    features = body.eval()[: int(name) + 1](x).detach().mean(2)
    assert_close(got, ncjax.measure(features, y), 1e-4)


def test_a_linear_of_images_that_have_channels_last_is_measured_by_channels():
    torch.manual_seed(0)
    model, x = nn.Linear(6, C), torch.randn(N, 4, 4, 6)
    got = ncjax.measure_model(model, [(x, torch.arange(N) % C)])
    mean = x.mean((1, 2)).numpy()
    right = oracle(
        mean, np.arange(N) % C, model.weight.detach().numpy(), model.bias.detach().numpy()
    )
    assert_close(got, right)


class Sequences(nn.Module):
    """Its recurrent states are (T, N, p)."""

    def __init__(self):
        super().__init__()
        self.states, self.head = nn.GRU(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.states(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("steps", [7, 12])
def test_states_with_time_first_are_refused_even_where_they_are_square(steps):
    batches = [(torch.randn(12, steps, 4), Y)]
    with pytest.raises(InputError, match=rf"features: got \({steps}, 12, 6\).*batch_first=True"):
        ncjax.measure_model(Sequences(), batches, "states")
    last = ncjax.measure_model(Sequences(), batches, "states", pool=lambda h: h[-1])
    assert last.centred.shape == (3, 6)


@pytest.mark.usefixtures("without_type_checks")  # beartype draws random numbers
def test_random_numbers_of_all_kinds_are_what_they_were(data):
    drawn = torch.utils.data.TensorDataset(*data)
    own = torch.Generator().manual_seed(7)

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) + np.random.rand() + random.random()  # noqa: NPY002

    model = Noisy(108, C)
    loaders = (
        torch.utils.data.DataLoader(drawn, 20, shuffle=True, generator=own),
        torch.utils.data.DataLoader(
            drawn, 20, sampler=torch.utils.data.RandomSampler(drawn, generator=own)
        ),
    )
    for one in loaders:
        before = own.get_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its outputs are no W h + b
            ncjax.measure_model(model, one)
        assert torch.equal(own.get_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]


def test_buffers_that_cannot_be_compared_mask_no_error():
    model = Counted(fails_at=2)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    model.register_buffer("empty", torch.zeros(2, device="meta"))
    batches = [(torch.randn(6, 4), torch.arange(6) % 2)] * 2
    with pytest.raises(RuntimeError, match="out of memory"):
        ncjax.measure_model(model, batches)
    model.fails_at = -1
    assert "nc3" in ncjax.measure_model(model, batches)
    assert torch.equal(model.adjacency.to_dense(), torch.eye(3))


def test_a_module_is_found_by_any_of_its_names():
    model, batches, _ = of_heads(lambda m, h: m.head(h))
    model.aux = model.head
    assert ncjax.measure_model(model, batches, "aux") == ncjax.measure_model(model, batches)


def test_a_loader_that_was_used_up_and_labels_all_ignored_are_said():
    once = iter([(X, Y)])
    ncjax.measure_model(linear(), once)
    with pytest.raises(InputError, match="batches: got 'no example'; the loader was used up"):
        ncjax.measure_model(linear(), once)
    with pytest.raises(InputError, match="ignore_label: got 0; all 12 examples"):
        ncjax.measure_model(linear(), [(X, 0 * Y)], ignore_label=0)
    some = [(X, 0 * Y), (X, Y), (X, Y)]
    got = ncjax.measure_model(linear(), some, ignore_label=0)
    assert got.examples.tolist() == [0, 8, 8]


def linear():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


X, Y = torch.randn(12, 4), torch.arange(12) % 3
BAD = {
    "model: got 'function'; give a torch.nn.Module": {"model": lambda x: x},
    "layer: got 'fcc'; the model has no such module; did you mean fc": {
        "model": ResNet(),
        "layer": "fcc",
    },
    "layers: got ['0']; give layer, or layers, not both": {"layer": "2", "layers": ["0"]},
    "layers: got []": {"layers": []},
    "layers: got ['0', '0']": {"layers": ["0", "0"]},
    "layer: got None; the model has no Linear": {"model": nn.Sequential(nn.ReLU())},
    "layer: got '0'; it ran 2 times": {
        "model": nn.Sequential(*[nn.Linear(4, 4)] * 2),
        "layer": "0",
    },
    "pool: got 'max'; choose mean, flatten, cls": {"pool": "max"},
    "labels: got 'target_ids'; a batch has x, y": {
        "loader": [{"x": X, "y": Y}],
        "labels": "target_ids",
    },
    "labels: got 'labels'; a batch has x, y": {"loader": [{"x": X, "y": Y}]},
    "labels: got (11,); give one per example, (12,)": {"loader": [(X, Y[:-1])]},
    "labels: got 3; with 3 classes they are 0 to 2; subtract 1": {"loader": [(X, Y + 1)]},
    "labels: got -1; they count classes from 0 on; ignore_label=-1": {"loader": [(X, Y - 1)]},
    "labels: got 'float32'; give integers": {"loader": [(X, Y.float())]},
    "batches: got 'no example'": {"loader": []},
    "ood: got 'several layers'": {"layers": ["0", "2"], "ood": [X]},
    "weight_decay: got '0.1'; give a number": {"weight_decay": "0.1"},
    "layer: got 2; it is a name of named_modules(), as '2'": {"layer": 2},
    "layer: got ['2']; it is one name; several are layers=['2']": {"layer": ["2"]},
    "layers: got 'head'; give a list: layers=['head']": {"layers": "head"},
    "layers: got [2]; give names, as ['2']": {"layers": [2]},
    "layer: got '2'; the model has no such module; did you mean module.2?": {
        "model": nn.DataParallel(linear()),
        "layer": "2",
    },
    "loader: got 'NoneType'; a loader gives batches of (inputs, labels)": {"loader": None},
    "loader: got 'Tensor'; a loader gives batches of (inputs, labels)": {"loader": X},
    "loader: got 'tuple'; a loader gives batches of (inputs, labels)": {"loader": (X, Y)},
    "inputs: got 'tuple of 2'; the model fails on it; inputs=": {"loader": [((X, X), Y)]},
    "inputs: got 'id'; the model takes no such argument; inputs=['input']": {
        "model": nn.Linear(4, 3),
        "loader": [{"input": X, "id": Y, "labels": Y}],
    },
    "pool: got 'float'; the function returns an array": {
        "loader": [(X[:, None], Y)],
        "pool": lambda h: 1.0,
    },
    "keep: got 'no'; choose True, False": {"keep": "no"},
    "float64: got 64; choose None, True, False": {"float64": 64},
    "ignore_label: got 'pad'; give an integer": {"ignore_label": "pad"},
    "num_classes: got 2.5; give an integer": {"num_classes": 2.5},
    "model: got 'Linear'; it is on the meta device": {"model": nn.Linear(4, 3, device="meta")},
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_with_the_way_out(message):
    arguments = {"model": linear(), "loader": [(X, Y)]} | BAD[message]
    with pytest.raises(InputError) as error:
        ncjax.measure_model(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_ncjax_imports_no_torch_and_refuses_without_it():
    code = """if 1:
        import sys, ncjax
        try:
            ncjax.measure_model(object(), [])
        except ncjax.InputError as error:
            assert str(error).startswith("model: got 'object'")
        assert not {"torch", "jax"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
