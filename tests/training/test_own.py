"""A user's own network: found by its path, trained in a sweep, measured, resumed, verified,
exported.
"""

import dataclasses
import json
import shutil
import sys
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy

import ncjax
from ncjax import plan
from ncjax.cli import show, train
from ncjax.config import default_config, validate
from ncjax.errors import InputError
from ncjax.runs import loop
from ncjax.storage import history
from ncjax.training import own, program
from tests.helpers import oracle_split, unmeasured
from tests.networks import Own

ASKED = {
    "num_classes": 3,
    "widths": (4, 4),
    "activation": "relu",
    "normalization": "none",
    "feature_normalization": "none",
    "linear_head_depth": 1,
    "linear_input_depth": 1,
    "use_head_bias": False,
    "dtype": np.dtype("float32"),
}


def make_config(network="tests.networks:Own", **fields):
    config = default_config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", 3, 20
    config.model.network, config.model.widths = network, (6, 6)
    config.train.epochs, config.train.batch_size, config.checkpoint.every = 4, 16, 2
    config.log.epochs = (0, 2, 4)
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-2), (0, 1)
    config.sweep.learning_rate = 0.02
    config.update({name.replace("__", "."): value for name, value in fields.items()})
    return config


def trained_only(folder, epochs=1, **fields):
    """A sweep that has been trained and not measured."""
    with unmeasured():
        sweep = loop.Sweep(plan.prepare(make_config(**fields), folder))
        sweep.advance(epochs, measured=False)
    return jax.device_get(sweep.states)


def test_a_path_and_a_class_are_one_network():
    model = own.make("tests.networks:Own", ASKED)
    assert (type(model), model.widths, model.num_classes) == (Own, (4, 4), 3)
    config = default_config()
    config.model.network = Own
    assert validate(config).model.network == "tests.networks:Own"


def test_attributes_are_set_by_the_config_where_the_network_has_them():
    assert own.make("tests.networks:Own", ASKED | {"use_head_bias": True}).use_head_bias
    with pytest.raises(InputError, match=r"^config.model.activation: got 'linear'; "):
        own.make("tests.networks:Own", ASKED | {"activation": "linear"})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.to_be:Found", "no module nowhere"),
        ("tests.nowhere:Found", "no module tests.nowhere"),
        ("tests.networks:Absent", "no Absent"),
        ("tests.networks:function", "no flax.linen.Module"),
        ("tests.networks:Unsized", "num_classes"),
        ("tests.networks:Fixed", "rank"),
        ("tests.networks:Featureless", "features"),
    ],
)
def test_what_is_no_network_is_one_line(path, words):
    with pytest.raises(InputError, match=r"^config.model.network: got ") as caught:
        own.make(path, ASKED)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "failing_network.py").write_text("import flax\n\nraise KeyError('x')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"^config.model.network: got .* failed \(KeyError: 'x'\)"):
        own.make("failing_network:Net", ASKED)


def test_a_class_inside_of_a_function_is_one_line():
    class Local(Own):
        pass

    config = default_config()
    config.model.network = Local
    with pytest.raises(InputError, match=r"^config.model.network: got .* top of a module"):
        validate(config)


@pytest.mark.parametrize("value", ["Own", "a:b:c", "a.b", "a b:C", "a:", ":C", "1a:C", 3])
def test_what_is_no_path_is_one_line(value):
    config = default_config()
    config.model.network = value
    with pytest.raises(InputError, match=r"^config.model.network: got "):
        validate(config)


@pytest.mark.slow
def test_other_collections_are_every_runs_own(tmp_path):
    states = trained_only(tmp_path, sweep__weight_decay=(0.0,), sweep__init_scale=(1.0, 3.0))
    statistics = states.model_state["batch_stats"]["BatchNorm_0"]
    assert statistics["var"].shape == (4, 6)
    assert states.params["inputs"]["kernel"].shape == (4, 32, 6)
    # Three times the kernel, nine times the variance, as far as it is noted.
    assert (statistics["var"][2:] > statistics["var"][:2]).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(states.params)} == {np.dtype("float32")}


@pytest.mark.slow
def test_what_is_dropped_is_a_function_of_seed_epoch_and_step(tmp_path):
    fields = {"network": "tests.networks:Dropping", "model__widths": (6,)}
    whole, again = (trained_only(tmp_path / name, 2, **fields) for name in "ab")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes()
    first, second = whole.params["head"]["kernel"][:2]
    assert not np.array_equal(first, second)


def test_statistics_of_a_batch_that_is_spread_over_devices_need_its_axis(tmp_path):
    with pytest.raises(InputError, match=r"^config.mesh.data: got 2; Own .* batch_axis"):
        loop.Sweep(plan.prepare(make_config(mesh__data=2), tmp_path))


@pytest.mark.slow
def test_it_lowers_for_accelerators(tmp_path):
    check_lowers(make_config(), tmp_path)


@pytest.mark.slow
def test_resnet18_lowers_for_accelerators(tmp_path, tfds_dir):
    config = make_config("", data__name="cifar10", data__dir=tfds_dir, data__per_class=8)
    config.update(
        {
            "data.num_classes": 0,
            "model.kind": "resnet18",
            "model.normalization": "batch",
            "model.widths": (64, 128, 256, 512),
        }
    )
    check_lowers(config, tmp_path)


def lowered(platforms, config, folder):
    """The programs of a sweep, for devices that need not be here, and its layers."""
    made = loop.make_program(plan.prepare(config, folder))
    advance = program.make_advance(made.recipe, made.mesh)
    traced = advance.trace(*made._started, made._data)
    with jax.enable_x64(True):
        texts = [one.lower(lowering_platforms=platforms).as_text() for one in traced]
    return "\n".join(texts), made.recipe.structure.layers


@pytest.mark.slow
def test_its_program_is_that_of_the_same_network_built_in(tmp_path):
    """To the letter, and so as fast."""
    paths = ("tests.networks:Plain", "")
    texts = [lowered(("cpu",), make_config(path), tmp_path)[0] for path in paths]
    assert texts[0] == texts[1]


def check_lowers(config, folder):
    text, layers = lowered(("cuda", "tpu"), config, folder)
    assert f"{'x'.join(map(str, layers[0].shape))}xf32" in text
    assert "custom_call" not in text.replace("@Sharding", "").replace("@SPMD", "")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """WORKDIR of a sweep of 6 x 3 runs, by the command."""
    folder = tmp_path_factory.mktemp("own")
    assert command(folder) == 0
    return folder


def command(folder, *flags):
    return train.main(
        [
            "ncjax",
            "--config=digits",
            f"--workdir={folder}",
            "--config.data.per_class=12",
            "--config.model.network=tests.networks:Own",
            "--config.model.widths=6,6",
            "--config.train.epochs=4",
            "--config.train.batch_size=24",
            "--config.checkpoint.every=2",
            "--config.log.epochs=0,2,4",
            "--config.sweep.learning_rate=0.02",
            *flags,
        ]
    )


@pytest.mark.slow
def test_it_trains_in_a_sweep_and_is_measured(swept):
    recorded = history.load(swept / "history.nc")
    assert (recorded.sizes["weight_decay"], recorded.sizes["seed"]) == (6, 3)
    assert recorded["layer"].values.tolist() == ["inputs", "Dense_0", "head"]
    final = recorded.sel(weight_decay=1e-2, seed=2, epoch=4)
    run = ncjax.load_run(swept, weight_decay=1e-2, seed=2)
    images, labels = run.dataset.train
    features, head = run.features(images), run.params["head"]["kernel"].T
    for name, value in oracle_split(features, features @ head.T, labels, head).items():
        if name != "class_mean_cosine":
            found = final[name].sel(split="train").item()
            assert found == pytest.approx(value, rel=2e-3, abs=1e-4), name
    squares = sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(run.params))
    loss, fit = (final[name].sel(split="train").item() for name in ("loss", "fit_loss"))
    assert loss == pytest.approx(fit + 0.5e-2 * squares, rel=1e-5)
    residuals = final["equilibrium_residual"]
    assert np.isnan(residuals.sel(layer=["inputs", "Dense_0"])).all()
    assert np.isfinite(residuals.sel(layer="head"))


@pytest.mark.slow
def test_it_resumes_to_the_same_bits(swept, tmp_path, capsys):
    folder = shutil.copytree(swept, tmp_path / "copy")
    before = (folder / "history.nc").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "4")
    assert command(folder) == 0
    assert "continuing from epoch 2" in capsys.readouterr().out
    assert (folder / "history.nc").read_bytes() == before


@pytest.mark.slow
def test_weights_of_another_network_are_one_line(swept):
    run = ncjax.load_run(swept, weight_decay=1e-2, seed=1)
    params = {name: leaves for name, leaves in run.params.items() if name != "Dense_0"}
    other = dataclasses.replace(run, variables=run.variables | {"params": params})
    with pytest.raises(InputError, match=r"^config.model.network: got 'tests.networks:Own'") as e:
        other.features(run.dataset.test.images)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_it_is_verified_and_exported(swept, tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    flags = ["--run=weight_decay=1e-2,seed=1", "--verify", "--json", f"--export={file}"]
    assert show.main([str(swept), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verification"]["passed"]
    run = ncjax.load_run(swept, weight_decay=1e-2, seed=1)
    exported = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(exported["head.kernel"], run.params["head"]["kernel"])
    np.testing.assert_array_equal(
        exported["BatchNorm_0.var"], run.variables["batch_stats"]["BatchNorm_0"]["var"]
    )
    np.testing.assert_array_equal(exported["inputs.bias"], run.params["inputs"]["bias"])


def test_a_module_that_is_not_there_is_found_before_data_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.preparation, "load", None)
    with pytest.raises(InputError, match=r"^config.model.network: got 'absent:Net'"):
        plan.examine(make_config("absent:Net"), tmp_path)


def test_a_network_is_looked_for_in_the_current_folder_first(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "current.py").write_text("from tests.networks import Own as Mine\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert own.load("beside.current:Mine") is Own
    [(name, checksum)] = own.source("beside.current:Mine").items()
    assert name == "source of beside.current:Mine"
    content = (tmp_path / "beside" / "current.py").read_bytes()
    assert int(checksum, 16) == zlib.crc32(content)
    assert own.source("") == {}
