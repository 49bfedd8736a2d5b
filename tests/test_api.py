"""The public names of `ncjax`: what they are, that they wait for no JAX, and training by them."""

import doctest
import subprocess
import sys

import pytest
import xarray as xr

import ncjax
from ncjax import api, config, errors
from ncjax.data import dataset
from ncjax.features import measure, result
from ncjax.metrics import functions
from ncjax.runs import load
from tests.helpers import ROOT, small_config


def test_dir_lists_the_public_names_and_each_is_there():
    assert {name for name in dir(ncjax) if not name.startswith("_")} == set(ncjax.__all__)
    assert all(getattr(ncjax, name) is not None for name in ncjax.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        ncjax.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_slow():
    code = """if 1:
        import sys
        import ncjax
        dir(ncjax), ncjax.InputError, ncjax.train
        assert not {"jax", "xarray", "matplotlib"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_training_returns_the_history_continues_and_reads_what_is_complete(tmp_path):
    first = ncjax.train(small_config(**{"train.schedule_epochs": 6, "train.epochs": 3}), tmp_path)
    longer = small_config(**{"train.schedule_epochs": 6})
    history = ncjax.train(longer, tmp_path)
    assert (first.epoch[-1], history.epoch[-1]) == (3, 6)
    assert history.nc1.sel(split="train", epoch=6).shape == (2, 2)
    xr.testing.assert_identical(ncjax.train(longer, str(tmp_path)), history)
    run = ncjax.load_run(tmp_path, weight_decay=1e-2, seed=1)
    assert run.epoch == 6


@pytest.mark.parametrize("config", ["no_such_config", small_config(**{"train.epochs": 0})])
def test_bad_input_raises_and_leaves_no_folder(config, tmp_path):
    with pytest.raises(ncjax.InputError):
        ncjax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"config": {"train.epochs": 2}}, "config"),
        ({"config": None}, "config"),
        ({"dataset": ([[0.0], [1.0]], [0, 1])}, "dataset"),
        ({"on_measurement": 3}, "on_measurement"),
        ({"vary": 3}, "vary"),
        ({"vary": {3: (1, 2)}}, "vary"),
        ({"workdir": 3}, "--workdir"),
    ],
)
def test_an_argument_of_another_type_is_one_line(options, argument, tmp_path, without_type_checks):
    arguments = {"config": small_config(), "workdir": tmp_path / "run"} | options
    with pytest.raises(ncjax.InputError, match=rf"^{argument}: ") as caught:
        ncjax.train(**arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert argument != "dataset" or "Dataset.from_arrays" in str(caught.value)


def test_a_name_is_a_config_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("ncjax.runs.loop.train", lambda plan, callback: seen.append(plan))
    ncjax.train("digits:smoke", "run")
    assert seen[0].config.train.epochs == 10
    assert seen[0].workdir.is_dir()


@pytest.mark.parametrize(
    "module",
    [
        *(config, dataset, errors, functions, measure, result),
        *(pytest.param(module, marks=pytest.mark.slow) for module in (api, load)),  # these train
    ],
    ids=lambda module: module.__name__,
)
def test_examples_in_docstrings_give_what_they_say(module):
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


def test_every_public_name_has_an_example():
    functions_and_classes = [getattr(ncjax, name) for name in ncjax.__all__ if name != "metrics"]
    functions_and_classes += [getattr(ncjax.metrics, name) for name in ncjax.metrics.__all__]
    without = [f.__name__ for f in functions_and_classes if ">>>" not in (f.__doc__ or "")]
    assert without == ["Run"]  # load_run returns it, and has the example
