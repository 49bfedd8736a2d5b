"""The examples run, and show what they say."""

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from ncjax.storage import history
from tests import chaos


@pytest.mark.slow
def test_the_minimal_sweep_shows_that_weight_decay_lowers_nc3():
    path = chaos.ROOT / "examples/minimal_sweep.py"
    spec = importlib.util.spec_from_file_location("minimal_sweep", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.EPOCHS = 15
    measured = example.sweep(example.WEIGHT_DECAYS, example.SEEDS)
    nc3 = measured["nc3"].mean(1)
    assert measured["nc1"].shape == (4, 3)
    assert (nc3[1:] < nc3[0]).all()


@pytest.mark.slow
def test_the_example_of_ones_own_network_trains_by_its_command_and_collapses(tmp_path):
    text = (chaos.ROOT / "examples" / "networks.py").read_text()
    command = re.search(r"^    (ncjax train .*?\w)\n\n", text, re.DOTALL | re.MULTILINE)
    assert command is not None
    flags = command[1].replace("\\\n", " ").split()[2:-1]
    short = ["--config.train.epochs=30", "--config.sweep.weight_decay=1e-3"]
    subprocess.run(
        [sys.executable, "-m", "ncjax", "train", *flags, *short, f"--workdir={tmp_path / 'run'}"],
        cwd=chaos.ROOT,
        check=True,
        capture_output=True,
    )
    found = history.load(tmp_path / "run" / "history.nc")
    final = found.isel(epoch=-1, weight_decay=0).sel(split="train")
    assert (final["accuracy"] > 0.98).all()
    assert (
        final["nc1"] < 0.1 * found["nc1"].isel(epoch=0, weight_decay=0).sel(split="train")
    ).all()
    # Doubling a layer that is added to its input does not double the outputs.
    nan = float("nan")
    np.testing.assert_array_equal(found["layer"].attrs["degree"], [1, nan, nan, 1])
    assert final["normalized_margin"].isnull().all()
    assert np.isfinite(final["equilibrium_residual"]).all()
    assert (abs(final["lemma2_residual"]) < 1e-4).all()


@pytest.mark.slow
def test_the_network_of_the_documentation_trains_as_a_script(tmp_path):
    text = (chaos.ROOT / "docs" / "library.md").read_text()
    [example] = [e for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Narrow" in e]
    (tmp_path / "script.py").write_text(example)
    environment = os.environ | {"PYTHONPATH": str(chaos.ROOT)}
    for _ in range(2):
        subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
        )
    assert history.load(tmp_path / "runs" / "narrow" / "history.nc")["epoch"].values[-1] == 2
    command = [sys.executable, "-m", "ncjax", "show", "runs/narrow", "--verify"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # There it is no longer the main script.
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: config.model.network: got '__main__:Narrow'; ")
    assert shown.stderr.count("\n") == 1
