"""Convolutional networks through the whole program: trained, resumed, measured, loaded, checked,
exported.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy

import ncjax
from ncjax import plan
from ncjax.cli import show, train
from ncjax.config import default_config
from ncjax.runs import loop
from ncjax.storage import history
from tests.helpers import oracle_split, unmeasured


def make_config(**fields):
    """Two layers of 8 x 8 digits, two runs; fields with __ for a dot."""
    config = default_config()
    config.data.per_class, config.model.kind, config.model.widths = 12, "conv", (3, 4)
    config.train.epochs, config.train.batch_size, config.checkpoint.every = 4, 24, 2
    config.log.epochs = (0, 2, 4)
    config.sweep.weight_decay, config.sweep.learning_rate = (0.0, 1e-2), 0.02
    config.update({name.replace("__", "."): value for name, value in fields.items()})
    return config


def start(folder, **fields):
    return loop.Sweep(plan.prepare(make_config(**fields), folder))


@pytest.fixture(scope="module")
def normalized(tmp_path_factory):
    """WORKDIR of a network with batch normalization, in float64."""
    fields = {
        "model__normalization": "batch",
        "train__precision": "float64",
        "data__standardize": True,
        "sweep__learning_rate": 0.003,
    }
    folder = tmp_path_factory.mktemp("normalized")
    loop.train(plan.prepare(make_config(**fields), folder))
    return folder


def trained_only(sweep, *chunks):
    with unmeasured():
        for epochs in chunks:
            sweep.advance(epochs, measured=False)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(sweep.states))]


@pytest.mark.slow
def test_chunks_of_any_length_are_bitwise_the_same(tmp_path):
    fields = {"model__normalization": "batch", "train__augment": "crop_flip"}
    whole, parts = (trained_only(start(tmp_path, **fields), *chunks) for chunks in ((3,), (1, 2)))
    for a, b in zip(whole, parts, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.slow
def test_augmentation_changes_what_is_trained_on_and_not_the_order(tmp_path):
    plain, cropped = (
        trained_only(start(tmp_path / a, train__augment=a), 1) for a in ("none", "crop")
    )
    assert any(not np.array_equal(a, b) for a, b in zip(plain, cropped, strict=True))


@pytest.mark.slow
def test_batch_statistics_are_each_runs_own(tmp_path):
    sweep = start(
        tmp_path,
        model__normalization="batch",
        sweep__init_scale=(1.0, 3.0),
        sweep__weight_decay=(0.0,),
    )
    trained_only(sweep, 1)
    variance = np.asarray(sweep.states.model_state["batch_stats"]["norm_1"]["var"])
    assert variance.shape == (2, 3)
    # Three times the kernel, nine times the variance before normalization, as far as it is noted:
    # two steps of 10%.
    assert (variance[1] > 1.2 * variance[0]).all()


@pytest.mark.slow
def test_init_scale_is_a_factor_on_kernels_alone(tmp_path):
    params = start(
        tmp_path, model__normalization="batch", sweep__init_scale=(1.0, 4.0)
    ).states.params
    for name, leaves in params.items():
        for leaf, value in leaves.items():
            first, second = np.asarray(value)[:2]
            np.testing.assert_array_equal(
                second, 4 * first if leaf == "kernel" else first, err_msg=name
            )


def test_five_steps_equal_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    fields = {
        "model__normalization": "batch",
        "train__precision": "float64",
        "units": "torch",
        "model__widths": (3, 4),
    }
    sweep = start(
        tmp_path,
        **fields,
        train__batch_size=0,
        train__schedule="constant",
        sweep__weight_decay=(1e-2,),
    )
    before = jax.tree.map(lambda leaf: np.asarray(leaf)[0], sweep.states.params)
    with jax.enable_x64(True):
        x = np.asarray(sweep.data.normalize(sweep.data.train.images))
    convs = [torch.nn.Conv2d(a, b, 3, 2, 1, bias=False).double() for a, b in ((1, 3), (3, 4))]
    norms = [torch.nn.BatchNorm2d(b).double() for b in (3, 4)]
    head = torch.nn.Linear(16, 10, bias=False).double()
    with torch.no_grad():
        for k, conv in enumerate(convs, start=1):
            conv.weight.copy_(
                torch.tensor(before[f"layer_{k}"]["kernel"].transpose(3, 2, 0, 1).copy())
            )
        head.weight.copy_(torch.tensor(before["head"]["kernel"].T.copy()))
    parameters = [p for part in (*convs, *norms, head) for p in part.parameters()]
    tx = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-2)
    y = torch.nn.functional.one_hot(
        torch.tensor(np.asarray(sweep.data.train.labels), dtype=torch.int64), 10
    ).double()
    for _ in range(5):
        h = torch.tensor(x.transpose(0, 3, 1, 2).copy())
        for conv, norm in zip(convs, norms, strict=True):
            h = torch.relu(norm(conv(h)))
        tx.zero_grad()
        torch.nn.MSELoss()(head(h.permute(0, 2, 3, 1).flatten(1)), y).backward()
        tx.step()
    trained_only(sweep, 5)
    after, states = sweep.states.params, sweep.states.model_state["batch_stats"]
    for k, (conv, norm) in enumerate(zip(convs, norms, strict=True), start=1):
        kernel = np.asarray(after[f"layer_{k}"]["kernel"])[0]
        np.testing.assert_allclose(
            kernel, conv.weight.detach().numpy().transpose(2, 3, 1, 0), rtol=1e-9, atol=1e-12
        )
        for ours, theirs in (("scale", norm.weight), ("bias", norm.bias)):
            found = np.asarray(after[f"norm_{k}"][ours])[0]
            np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            np.asarray(states[f"norm_{k}"]["mean"])[0], norm.running_mean, rtol=1e-9
        )
    np.testing.assert_allclose(
        np.asarray(after["head"]["kernel"])[0], head.weight.detach().numpy().T, rtol=1e-9
    )


@pytest.mark.slow
def test_measurements_are_of_eval_mode_and_nan_where_normalization_leaves_no_meaning(normalized):
    recorded = history.load(normalized / "history.nc")
    run = ncjax.load_run(normalized, weight_decay=1e-2, seed=0)
    images, labels = run.dataset.train
    features = run.features(images)
    head = run.params["head"]["kernel"].T
    final = recorded.sel(weight_decay=1e-2, seed=0, epoch=4)
    for name, value in oracle_split(features, features @ head.T, labels, head).items():
        if name != "class_mean_cosine":
            assert final[name].sel(split="train").item() == pytest.approx(
                value, rel=1e-8, abs=1e-12
            ), name
    # lambda W_L = mean(r h^T) - G, with the h of eval mode.
    residuals = np.eye(10)[labels] - features @ head.T
    gap = 1e-2 * head - residuals.T @ features / len(labels)
    residual = np.linalg.norm(gap) / np.linalg.norm(1e-2 * head)
    assert final["equilibrium_residual"].sel(layer="head").item() == pytest.approx(
        residual, rel=1e-8
    )
    assert np.isnan(final["equilibrium_residual"].sel(layer=["layer_1", "layer_2"])).all()
    assert {n for n in ("lemma2_residual", "normalized_margin") if np.isnan(final[n])} == {
        "lemma2_residual",
        "normalized_margin",
    }
    # 1/2 lambda ||.||^2 of all parameters, those of normalization among them.
    squares = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(run.params))
    loss, fit = (final[name].sel(split="train").item() for name in ("loss", "fit_loss"))
    assert loss == pytest.approx(fit + 0.5e-2 * squares, rel=1e-10)


@pytest.mark.slow
def test_without_normalization_every_layer_has_its_equilibrium(tmp_path):
    recorded = loop.train(plan.prepare(make_config(train__precision="float64"), tmp_path))
    final = recorded.sel(weight_decay=1e-2).isel(epoch=-1)
    assert np.isfinite(final["equilibrium_residual"]).all()
    assert abs(final["lemma2_residual"]).item() < 1e-12
    assert np.isfinite(final["normalized_margin"]).all()


@pytest.mark.slow
def test_free_norms_do_not_decay(tmp_path):
    """One step from scale 1 and shift 0 at a large lambda: only what decays has felt it."""
    fields = {
        "train__batch_size": 0,
        "sweep__weight_decay": (0.0, 5.0),
        "model__normalization": "batch",
    }
    scale = {}
    for norms in ("decayed", "free"):
        sweep = start(tmp_path / norms, model__norms=norms, **fields)
        trained_only(sweep, 1)
        scale[norms] = np.asarray(sweep.states.params["norm_1"]["scale"])
    np.testing.assert_array_equal(*scale["free"])
    # w <- w - lr (g + lambda w)
    np.testing.assert_allclose(scale["decayed"][1], scale["decayed"][0] - 0.02 * 5.0, rtol=1e-5)


@pytest.mark.slow
def test_show_verifies_and_exports_statistics_with_the_weights(normalized, tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    run = "--run=weight_decay=1e-2,seed=0"
    assert show.main([str(normalized), run, "--verify", "--export", str(file)]) == 0
    assert "PASS" in capsys.readouterr().out
    exported, variables = (
        safetensors.numpy.load_file(file),
        ncjax.load_run(normalized, weight_decay=1e-2).variables,
    )
    names = {f"norm_{k}.{leaf}" for k in (1, 2) for leaf in ("scale", "bias", "mean", "var")}
    assert set(exported) == {"layer_1.kernel", "layer_2.kernel", "head.kernel"} | names
    np.testing.assert_array_equal(exported["norm_2.var"], variables["batch_stats"]["norm_2"]["var"])
    np.testing.assert_array_equal(exported["norm_2.bias"], variables["params"]["norm_2"]["bias"])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--config.model.kind=conv", "--config.model.normalization=layer"],
            "config.model.normalization: got 'layer'; of dense layers alone",
        ),
        (
            ["--config.data.name=synthetic", "--config.model.kind=conv"],
            "config.model.kind: got 'conv'; synthetic has",
        ),
        (
            ["--config.data.name=synthetic", "--config.train.augment=crop"],
            "config.train.augment: got 'crop'; synthetic",
        ),
        (["--config.data.pad=7"], "config.data.pad: got 7; its examples have shape (8, 8, 1)"),
        (
            ["--config.data.name=synthetic", "--config.data.pad=9"],
            "config.data.pad: got 9; its examples have shape",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, line, tmp_path, capsys):
    assert train.main(["main", "--config=configs/digits.py", *flags, f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_padding_is_a_border_of_zeros(tmp_path):
    plain, padded = (
        plan.prepare(make_config(data__pad=side), tmp_path / str(side)).dataset for side in (0, 11)
    )
    assert padded.train.images.shape[1:] == padded.center.shape == (11, 11, 1)
    np.testing.assert_array_equal(padded.train.images[:, 1:9, 1:9], plain.train.images)
    assert padded.train.images.sum() == plain.train.images.sum()
