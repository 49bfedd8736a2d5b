"""A sweep that grows trains the missing runs and no others, to the bits of all from the start."""

import json
import os
import shutil

import numpy as np
import pytest
import xarray as xr

import ncjax
from ncjax import config as configuration
from ncjax.cli import merge
from ncjax.errors import InputError
from ncjax.runs import growth, inspect
from ncjax.storage import checkpoint
from ncjax.training import sweep


def config_of(weight_decay, seed, **fields):
    """A config of `trained`, of conftest."""
    config = ncjax.Config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", 3, 20
    config.model.widths, config.model.head_bias = (8, 8), "free"
    config.train.epochs, config.train.batch_size, config.checkpoint.every = 6, 16, 2
    config.sweep.weight_decay, config.sweep.seed = weight_decay, seed
    config.sweep.runs_per_program = 2
    config.update(fields)
    return config


def runs_of(config):
    factors = dict.fromkeys(configuration.DECAY_FACTORS, 1.0)
    places = configuration.make_grid(config, 3).places()
    return {tuple(sorted((factors | place.coordinates).items())) for place in places}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"sweep.seed": (0,)}, {"sweep.seed": (0, 1, 2)}),
        (
            {"sweep.weight_decay": (1e-3, 0.0), "sweep.seed": (1,)},
            {"sweep.weight_decay": (0.0, 1e-4, 1e-3), "sweep.seed": (0, 1)},
        ),
        (
            {"sweep.learning_rate": (0.1,)},
            {"sweep.learning_rate": (0.2, 0.1), "decay.head": (1.0, 2.0), "sweep.seed": (0, 1)},
        ),
    ],
)
def test_blocks_are_the_missing_runs_each_once(old, new):
    small, large = (config_of((0.0, 1e-3), (0,), **fields) for fields in (old, new))
    assert configuration.grows(large, configuration.to_mapping(small))
    assert not configuration.grows(small, configuration.to_mapping(large))
    blocks = [runs_of(block) for block in configuration.missing_blocks(large, small)]
    whole, there = runs_of(large), runs_of(small)
    assert sum(map(len, blocks)) == len(whole) - len(there)
    assert set().union(*blocks) == whole - there


@pytest.mark.parametrize(
    "fields",
    [{"sweep.seed": (1, 2)}, {"sweep.seed": (0, 1), "train.batch_size": 8}, {"model.widths": (9,)}],
)
def test_what_is_no_superset_of_the_same_config_does_not_grow(fields):
    small, large = config_of((0.0,), (0,)), config_of((0.0,), (0,), **fields)
    assert not configuration.grows(large, configuration.to_mapping(small))


def count_compiled(monkeypatch):
    """A list that gets the number of runs of every sweep that is compiled."""
    found, compiled = [], sweep.Sweep.compile

    def counted(self):
        found.append(self.plan.grid.size)
        return compiled(self)

    monkeypatch.setattr(sweep.Sweep, "compile", counted)
    return found


def raising(*_):
    raise KeyboardInterrupt


def half_replaced(workdir, joined):
    for name in ("checkpoints", "history.nc"):
        if (workdir / name).is_dir():
            shutil.rmtree(workdir / name)
        os.replace(joined / name, workdir / name)
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [{}, {"join": raising}, {"_replace": half_replaced}])
def test_a_grown_sweep_is_that_of_all_runs_from_the_start(interrupted, tmp_path, monkeypatch):
    whole = ncjax.train(config_of((1e-3, 0.0, 1e-2), (0, 1)), tmp_path / "whole")
    workdir = tmp_path / "grown"
    ncjax.train(config_of((0.0, 1e-3), (0,)), workdir)
    large = config_of((1e-3, 0.0, 1e-2), (0, 1))
    for name, function in interrupted.items():
        with monkeypatch.context() as patch:
            patch.setattr(growth, name, function)
            with pytest.raises(KeyboardInterrupt):
                ncjax.train(large, workdir)
    trained = count_compiled(monkeypatch)
    grown = ncjax.train(large, workdir)
    assert trained == ([] if interrupted else [2, 2])
    for name in whole.variables:
        np.testing.assert_array_equal(grown[name].values, whole[name].values, err_msg=str(name))
    assert not (workdir / "growth").exists()
    assert checkpoint.epochs_in(workdir / "checkpoints") == checkpoint.epochs_in(
        tmp_path / "whole" / "checkpoints"
    )
    for run in range(6):
        mine, theirs = (
            checkpoint.read_run(at / "checkpoints", 6, run) for at in (workdir, tmp_path / "whole")
        )
        for layer, leaves in theirs["params"].items():
            for part, leaf in leaves.items():
                np.testing.assert_array_equal(mine["params"][layer][part], leaf)
    assert json.loads((workdir / "config.json").read_text())["sweep"]["seed"] == [0, 1]
    xr.testing.assert_identical(ncjax.train(large, workdir), grown)
    assert inspect.verify(inspect.read(workdir, {}), 6).deviation < 1e-5


@pytest.mark.slow
def test_fewer_values_are_another_config(tmp_path):
    ncjax.train(config_of((0.0, 1e-3), (0,)), tmp_path / "run")
    with pytest.raises(InputError, match=r"sweep\.weight_decay"):
        ncjax.train(config_of((0.0,), (0, 1)), tmp_path / "run")


@pytest.mark.slow
def test_merged_workdirs_are_one_sweep(tmp_path, capsys):
    for name, decays in (("a", (0.0, 1e-2)), ("b", (1e-3,))):
        ncjax.train(config_of(decays, (0, 1)), tmp_path / name)
    whole = ncjax.train(config_of((0.0, 1e-3, 1e-2), (0, 1)), tmp_path / "whole")
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    assert merge.main([a, b, "--out", out]) == 0
    assert "6 runs (3 weight_decay x 2 seed)" in capsys.readouterr().out
    merged = ncjax.train(config_of((0.0, 1e-3, 1e-2), (0, 1)), out)
    assert "is complete" in capsys.readouterr().out
    for name in whole.variables:
        np.testing.assert_array_equal(merged[name].values, whole[name].values, err_msg=str(name))
    assert inspect.verify(inspect.read(tmp_path / "out", {}), 6).deviation < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sweep.weight_decay": (0.0, 1e-3)}, "has it, too"),
        ({"sweep.weight_decay": (1e-3,), "sweep.seed": (5,)}, "no WORKDIR has this run"),
        ({"sweep.weight_decay": (1e-3,), "train.epochs": 4}, "train.epochs"),
        ({"sweep.weight_decay": (1e-3,), "data.per_class": 10}, "data.per_class"),
    ],
)
def test_what_is_no_part_of_one_sweep_is_one_line(fields, words, tmp_path, capsys):
    ncjax.train(config_of((0.0,), (0,)), tmp_path / "a")
    ncjax.train(config_of((0.0,), (0,), **fields), tmp_path / "b")
    capsys.readouterr()
    code = merge.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
