"""One run of a WORKDIR in Python: its weights against the whole checkpoint, its outputs against
NumPy, the example.
"""

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import xarray as xr

import ncjax
from ncjax import config as configuration
from ncjax import plan
from ncjax.errors import InputError
from ncjax.runs import inspect
from ncjax.storage import checkpoint
from tests.helpers import ROOT, flip, forge, whole_checkpoint

RUN = {"weight_decay": 1e-3, "seed": 0}  # the third of the grid: number 2


def test_a_run_has_the_weights_and_the_history_of_its_coordinates(trained):
    run = ncjax.load_run(trained, **RUN)
    whole = whole_checkpoint(trained, 6)
    assert set(whole) == {"layer_1.kernel", "layer_2.kernel", "head.kernel", "head.bias"}
    for name, leaf in whole.items():
        layer, _, part = name.partition(".")
        np.testing.assert_array_equal(run.params[layer][part], leaf[2])
    assert run.epoch == 6
    assert run.coordinates == {**RUN, "learning_rate": 0.1, "momentum": 0.9, "init_scale": 1.0}
    assert run.config == json.loads((trained / "config.json").read_text())
    recorded = xr.load_dataset(trained / "history.nc", engine="scipy")
    xr.testing.assert_identical(run.history, recorded.isel(weight_decay=1, seed=0))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_features_and_logits_are_those_of_a_forward_pass_in_numpy(copied, precision):
    config = checkpoint.read_metadata(copied / "checkpoints", 6).config
    config["train"]["precision"] = precision
    (copied / "config.json").write_text(json.dumps(config))
    forge(copied, 6, lambda leaf: leaf.astype(precision) * (1 + 1e-10), config=config)
    run = ncjax.load_run(copied, **RUN)
    # More than one batch of rows.
    images = np.random.default_rng(1).standard_normal((2500, 32)).astype(np.float32)
    training = run.dataset.train.images.astype(np.float64)
    center = training.mean(0)
    x = (images - center) * 2 / np.linalg.norm(training - center, axis=1).mean()
    for name in ("layer_1", "layer_2"):
        x = np.maximum(x @ run.params[name]["kernel"].astype(np.float64), 0)
    f = x @ run.params["head"]["kernel"] + run.params["head"].get("bias", 0)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if precision == "float64" else {"rtol": 1e-4, "atol": 1e-5}
    )
    for found, expected in ((run.features(images), x), (run.logits(images), f)):
        assert found.dtype == precision
        np.testing.assert_allclose(found, expected, **tolerance)


def test_its_accuracy_is_the_one_in_its_history(trained):
    run = ncjax.load_run(trained, **RUN)
    images, labels = run.dataset.test
    accuracy = np.mean(run.logits(images).argmax(1) == labels)
    assert float(run.history.accuracy.sel(split="test", epoch=6)) == pytest.approx(accuracy)


def test_lists_of_images_are_taken_and_what_is_no_array_is_one_line(trained, without_type_checks):
    run = ncjax.load_run(trained, **RUN)
    images = run.dataset.test.images[:3]
    np.testing.assert_array_equal(run.features(images.tolist()), run.features(images))
    for wrong in ([[1.0], [1.0, 2.0]], "image.png", None, [["a"] * 32]):
        with pytest.raises(InputError, match=r"^images: ") as caught:
            run.logits(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^dataset: .*Dataset\.from_arrays"):
        ncjax.load_run(trained, dataset=(images, [0, 1, 2]), **RUN)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_its_features_and_its_verification_are_measured_alike(trained, split):
    """The history, `measure` on the run's features, and `--verify` agree to float32's rounding."""
    run = ncjax.load_run(trained, **RUN)
    data, head = getattr(run.dataset, split), run.params["head"]
    measured = ncjax.measure(
        run.features(data.images),
        data.labels,
        head=head["kernel"].T,
        bias=head["bias"],
        weight_decay=RUN["weight_decay"],
    )
    recorded = run.history.sel(epoch=run.epoch, layer="head")
    both = [
        name
        for name in measured.metrics.keys() & recorded.keys()
        if split == "train" or "split" in recorded[name].dims
    ]
    assert len(both) == {"train": 56, "test": 21}[split]
    for name in both:
        variable = recorded[name]
        one = variable.sel(split=split) if "split" in variable.dims else variable
        np.testing.assert_allclose(
            measured[name], float(one), rtol=2e-6, atol=1e-6, err_msg=name, equal_nan=True
        )
    assert inspect.verify(inspect.read(trained, {}), run.epoch).deviation < 1e-5


def test_only_its_own_chunks_are_read(copied, recwarn):
    damaged = whole_checkpoint(copied, 6)["layer_1.kernel"][1]
    flip(copied, 6, damaged)
    assert ncjax.load_run(copied, **RUN).epoch == 6
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"checkpoint 6 in .* is not used: .*layer_1\.kernel"):
        assert ncjax.load_run(copied, weight_decay=0, seed=1).epoch == 4
    with pytest.raises(InputError, match=r"epoch: got 6; this checkpoint is damaged"):
        ncjax.load_run(copied, epoch=6, weight_decay=0, seed=1)


def test_of_damaged_checkpoints_alone_nothing_is_loaded(copied):
    for epoch in (4, 6):
        (copied / "checkpoints" / str(epoch) / "_CHECKPOINT_METADATA").write_text("{}")
    with (
        pytest.warns(UserWarning, match="is not used"),
        pytest.raises(InputError, match="none of its checkpoints"),
    ):
        ncjax.load_run(copied, **RUN)


def test_an_epoch_may_be_chosen_and_its_config_is_the_checkpoints(copied):
    config = json.loads((copied / "config.json").read_text())
    config["train"]["batch_size"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"config\.train\.batch_size is 7 here and 16 there"):
        run = ncjax.load_run(copied, epoch=4, **RUN)
    assert run.config["train"]["batch_size"] == 16
    np.testing.assert_array_equal(
        run.params["head"]["kernel"], whole_checkpoint(copied, 4)["head.kernel"][2]
    )
    (copied / "config.json").unlink()
    assert ncjax.load_run(copied, **RUN).epoch == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"weight_decay is missing; name one of 0, 0\.001"),
        ({"weight_decay": 0}, "seed is missing; name one of 0, 1"),
        ({"weight_decay": 1e-3 * (1 + 1e-8), "seed": 0}, r"the grid has 0, 0\.001"),
        ({"weight_decay": "much", "seed": 0}, "got 'much'"),
        ({"weight_decay": float("nan"), "seed": 0}, "got nan"),
        ({**RUN, "learning_rate": 0.2}, r"learning_rate: got 0\.2; the grid has 0\.1"),
        ({**RUN, "sed": 0}, "sed: got 0; no such axis; the grid has weight_decay, learning_rate"),
        ({**RUN, "epoch": 5}, "epoch: got 5; there are checkpoints of epochs 4, 6"),
    ],
)
def test_what_names_no_run_is_refused_with_the_values_there_are(trained, arguments, message):
    with pytest.raises(InputError, match=message):
        ncjax.load_run(trained, **arguments)


def test_numbers_are_the_same_up_to_rounding_and_may_come_from_a_history(trained):
    history = xr.load_dataset(trained / "history.nc", engine="scipy")
    for weight_decay in (1e-3 * (1 + 1e-10), np.float64(1e-3), history.weight_decay[1]):
        assert (
            ncjax.load_run(trained, weight_decay=weight_decay, seed=1).coordinates["weight_decay"]
            == 1e-3
        )


def test_folders_without_a_run_and_wrong_images_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        ncjax.load_run(tmp_path / "missing", **RUN)
    with pytest.raises(InputError, match="no checkpoint yet"):
        ncjax.load_run(tmp_path, **RUN)
    for images in (np.zeros((2, 31)), np.zeros(32), np.zeros((0, 32))):
        with pytest.raises(InputError, match=r"synthetic has images \(32\); give \(B, 32\)"):
            ncjax.load_run(trained, **RUN).logits(images)


def test_importing_ncjax_or_asking_for_help_waits_for_no_jax():
    code = (
        "import sys, ncjax, ncjax.cli.show; assert not {'jax', 'xarray', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert ncjax.__version__
    with pytest.raises(AttributeError, match="load_runs"):
        _ = ncjax.load_runs  # pyright: ignore[reportAttributeAccessIssue]


def test_the_examples_of_the_documentation_run_and_find_what_the_history_says(
    trained, tmp_path, monkeypatch, capsys
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained)
    texts = [(ROOT / name).read_text() for name in ("docs/library.md", "docs/workdir.md")]
    examples = [
        e
        for text in texts
        for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "load_run" in e
    ]
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    scope: dict = {}
    for example in examples:
        exec(compile(example, "example", "exec"), scope)
    scope["plt"].close("all")
    recorded = scope["run"].history.sel(split="test", epoch=6)
    for name in ("nc1", "nc3", "cdnv", "nc4"):
        assert float(scope["measured"][name]) == pytest.approx(
            float(recorded[name]), rel=1e-4, abs=1e-6
        )
    assert (tmp_path / "cosines.png").stat().st_size > 1000
    assert "nc1" in capsys.readouterr().out


def test_a_workdir_of_an_older_version_lacks_the_younger_fields_and_is_still_its_own(copied):
    config = json.loads((copied / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = ncjax.load_run(copied, **RUN).params
        for section, field in (
            ("data", "pad"),
            ("model", "normalization"),
            ("model", "norms"),
            ("train", "augment"),
        ):
            del config[section][field]
        (copied / "config.json").write_text(json.dumps(config))
        np.testing.assert_array_equal(
            ncjax.load_run(copied, **RUN).params["head"]["kernel"], expected["head"]["kernel"]
        )
    whole = configuration.from_json(json.dumps(config))
    assert plan.prepare(whole, copied).config.train.augment == "none"
