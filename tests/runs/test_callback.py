"""on_measurement: what it is given, and that one that raises ends a run of which all is saved."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

import ncjax
from tests.helpers import ROOT, small_config

DOCUMENT = (ROOT / "docs" / "library.md").read_text()


class Stop(Exception):
    pass


# That of conftest's `trained`: its program is compiled once.
SAME = {"model.head_bias": "free", "sweep.weight_decay": (0.0, 1e-3)}


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_it_gets_every_epoch_and_where_it_raises_all_is_saved(stop_at, tmp_path, trained):
    seen = []

    def look(measured):
        on_disk = xr.load_dataset(tmp_path / "history.nc")
        assert on_disk["epoch"].values[-1] == measured["epoch"].item()
        seen.append(measured)
        if measured["epoch"].item() == stop_at:
            raise Stop("enough")

    with pytest.raises(Stop, match="enough"):
        ncjax.train(small_config(**SAME), tmp_path, on_measurement=look)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == stop_at
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["epoch"] == stop_at
    history = ncjax.train(small_config(**SAME), tmp_path, on_measurement=seen.append)
    assert [one["epoch"].item() for one in seen] == list(range(7))
    xr.testing.assert_equal(history, xr.load_dataset(trained / "history.nc"))
    assert seen[0]["nc1"].dims == ("weight_decay", "seed", "split")
    for one in seen:
        kept = history.drop_vars("class_mean_cosine").sel(epoch=one["epoch"].item())
        xr.testing.assert_equal(one.drop_vars("class_mean_cosine"), kept)


def block(word):
    """The code of docs/library.md that holds a word."""
    return next(b for b in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if word in b)


def executed(code, monkeypatch, **modules):
    """Runs code of the document on a recorded history instead of training."""
    histories = ROOT / "experiments" / "histories" / "digits.nc"
    history = xr.load_dataset(histories)[["nc1"]]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def train(config, workdir, on_measurement):
        for i in range(history.sizes["epoch"]):
            on_measurement(history.isel(epoch=i))

    monkeypatch.setattr(ncjax, "train", train)
    exec(compile(code, "docs/library.md", "exec"), {})
    return history["nc1"].sel(split="train").mean("seed")


def test_weights_and_biases_gets_what_the_document_says(monkeypatch):
    logged = []
    fake = SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)))
    wandb = SimpleNamespace(init=lambda project: fake)
    nc1 = executed(block("wandb"), monkeypatch, wandb=wandb)
    assert [step for step, _ in logged] == nc1["epoch"].values.tolist()
    expected = nc1.sel(weight_decay=1e-3).values
    found = [numbers["nc1/0.001"] for _, numbers in logged]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tensorboard_gets_what_the_document_says(monkeypatch, tmp_path):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    nc1 = executed(block("tensorboardX"), monkeypatch)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    from tensorboardX.proto import event_pb2

    found = {}
    content = events.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        content = content[16 + length :]
    for epoch in nc1["epoch"].values:
        expected = nc1.sel(weight_decay=1e-3, epoch=epoch).item()
        assert found["nc1/0.001", epoch] == pytest.approx(expected, rel=1e-6)
