"""`ncjax.Monitor`: what it records is what `measure_model` finds, training goes on as without it,
and `ncjax plot` and `show` read its WORKDIR.
"""

import copy
import doctest
import json
import sys
import types

import numpy as np
import pytest
import xarray as xr

import ncjax
from ncjax.cli import plot, show
from ncjax.errors import InputError
from ncjax.features import monitor as monitors
from ncjax.report import draw
from ncjax.storage import history, lock, monitored

LAYERS = {"1": {"nc1": 2.0, "cdnv": 0.5}, "fc": {"nc1": 1.0, "nc3": 0.25, "accuracy": 0.5}}


def recorded(epochs=(1, 2, 4)):
    """A history as a monitor writes it; every number is divided by the epoch."""
    found = None
    for epoch in epochs:
        scaled = {
            name: {metric: value / epoch for metric, value in metrics.items()}
            for name, metrics in LAYERS.items()
        }
        found = monitored.append(found, monitored.one_epoch(epoch, scaled, 0.5, "fc: a note"))
    return found


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    history.save(recorded(), tmp_path / "run" / "history.nc")
    return tmp_path / "run"


def test_a_history_has_epochs_layers_and_definitions(workdir):
    found = history.read(workdir / "history.nc")
    xr.testing.assert_equal(found, recorded())
    assert found["nc1"].dims == ("epoch", "layer")
    np.testing.assert_array_equal(found["nc1"].sel(layer="fc"), [1, 0.5, 0.25])
    assert np.isnan(found["nc3"].sel(layer="1")).all()
    assert found["nc1"].attrs["definition"] == "tr(Sigma_W Sigma_B^+)/C"
    again = monitored.append(found, monitored.one_epoch(2, LAYERS, 0.5, ""))
    assert again["epoch"].values.tolist() == [1, 2]
    assert float(again["nc1"].sel(layer="fc", epoch=2)) == 1


def test_show_prints_every_layer_at_an_epoch(workdir, capsys):
    assert show.main([str(workdir)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "nc3" in line)
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["nc3", "-", "0.0625"]
    assert "note: fc: a note" in out
    assert show.main([str(workdir), "--epoch=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["layers"]["fc"]["nc1"] == 0.5
    assert found["layers"]["1"]["nc3"] is None
    assert found["epochs"]["measured"] == [1, 2, 4]


@pytest.mark.parametrize("flags", [["--epoch=3"], ["--verify"], ["--run=seed=0"]])
def test_what_it_does_not_hold_is_one_line(flags, workdir, capsys):
    assert show.main([str(workdir), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--run=seed=0", "--verify", "--export=a.npz"])
def test_a_flag_of_runs_is_refused_by_its_name_alone(flag, workdir, capsys):
    assert show.main([str(workdir), flag]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"leave {flag.partition('=')[0]} out" in err
    assert "True" not in err


@pytest.fixture
def without_layout(monkeypatch):
    """Measuring every text to place the panels takes most of the time of a figure."""
    write = draw._write

    def write_plainly(figure, path):
        figure.set_layout_engine("none")
        return write(figure, path)

    monkeypatch.setattr(draw, "_write", write_plainly)


@pytest.mark.usefixtures("without_layout")
def test_plot_draws_layers_in_a_format(workdir, capsys):
    assert plot.main([str(workdir), "--format=svg"]) == 0
    content = (workdir / "figures" / "collapse_against_epoch.svg").read_bytes()
    assert content.startswith(b"<?xml")
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert plot.main([str(workdir), "--only", "budget_against_epoch"]) == 2
    assert capsys.readouterr().err.startswith("error: --only: got 'budget_against_epoch'; ")


@pytest.mark.slow
def test_plot_compares_what_monitors_have_followed(workdir, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    history.save(recorded((1, 3)), other / "history.nc")
    out = str(tmp_path / "out")
    assert plot.main([str(workdir), str(other), "--out", out, "--format=pdf"]) == 0
    assert (tmp_path / "out" / "compare_against_epoch.pdf").read_bytes().startswith(b"%PDF")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_sweep_neither_reads_nor_overwrites_it(workdir):
    with pytest.raises(InputError, match=r"history: got .*ncjax\.Monitor wrote it"):
        history.load(workdir / "history.nc")
    assert (workdir / "history.nc").exists()


# With PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def net(torch):
    """A model and a loader of its training examples."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
    return model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 20)


def train(torch, model, loader, monitor=None, epochs=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shuffled = torch.utils.data.DataLoader(loader.dataset, 20, shuffle=True)
    found = []
    for _ in range(epochs):
        for x, y in shuffled:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if monitor is not None:
            found.append(monitor.step())
    return found


def test_training_goes_on_as_without_it_and_what_it_records_is_what_is_measured(
    torch, net, tmp_path, capsys
):
    model, loader = net
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    train(torch, other, loader)
    torch.manual_seed(1)
    monitor = ncjax.Monitor(model, loader, workdir=tmp_path / "run", layers=["2", "3"])
    found = train(torch, model, loader, monitor)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    stored = history.read(tmp_path / "run" / "history.nc")
    xr.testing.assert_equal(stored, monitor.history)
    assert dict(stored.sizes) == {"epoch": 3, "layer": 2}
    assert float(stored["nc3"].sel(epoch=3, layer="3")) == found[-1]["3"].nc3
    assert found[-1]["3"] == ncjax.measure_model(model, loader)
    assert (stored["seconds"] > 0).all()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "measured in" in lines[0]
    assert show.main([str(tmp_path / "run")]) == plot.main([str(tmp_path / "run")]) == 0


def test_it_measures_every_few_epochs_and_continues(net, tmp_path):
    model, loader = net
    monitor = ncjax.Monitor(model, loader, every=2, workdir=tmp_path)
    assert [monitor.step() is None for _ in range(4)] == [True, False, True, False]
    again = ncjax.Monitor(model, loader, workdir=tmp_path)
    again.step()
    assert again.history.epoch.values.tolist() == [2, 4, 5]
    again.step(epoch=4)
    assert again.history.epoch.values.tolist() == [2, 4]
    for layers in (["0"], ["0", "3"]):
        with pytest.raises(InputError, match="layers: got"):
            ncjax.Monitor(model, loader, workdir=tmp_path, layers=layers)


def test_bad_input_is_named_before_training(net, tmp_path):
    model, loader = net
    (tmp_path / "run").mkdir()
    xr.Dataset({"a": 1}).to_netcdf(tmp_path / "run" / "history.nc", engine="scipy")
    for options, message in (
        ({"every": 0}, "every: got 0"),
        ({"names": ["0"]}, "names: got .*no such option"),
        ({"pol": "mean"}, "pol: got 'mean'; no such option of measure_model; did you mean pool"),
        ({"workdir": tmp_path / "run"}, "it holds another run"),
        ({"workdir": tmp_path / "run" / "history.nc"}, "workdir: got"),
    ):
        with pytest.raises(InputError, match=message):
            ncjax.Monitor(model, loader, **options)


@pytest.mark.usefixtures("without_type_checks")
def test_arguments_of_wrong_kinds_are_named_before_training(net):
    model, loader = net
    for options, message in (
        ({"every": 1.5}, r"every: got 1\.5; give an integer"),
        ({"layer": "3"}, r"layer: got '3'; give a list: layers=\['3'\]"),
        ({"layers": "3"}, r"layers: got '3'; give a list"),
        ({"layers": ["fc"]}, "layer: got 'fc'; the model has no such module"),
        ({"loss": "ce"}, "loss: got 'ce'"),
        ({"pool": "max"}, "pool: got 'max'"),
        ({"model": 3}, "model: got 'int'"),
        ({"loader": iter(loader)}, "loader: got .*it is used up after one pass"),
        ({"loader": None}, "loader: got 'NoneType'"),
    ):
        with pytest.raises(InputError, match=message):
            ncjax.Monitor(**{"model": model, "loader": loader} | options)
    monitor = ncjax.Monitor(model, loader)
    for epoch in (-1, 1.5, float("nan")):
        with pytest.raises(InputError, match="epoch: got"):
            monitor.step(epoch)


def test_of_two_in_one_workdir_the_other_is_refused(net, tmp_path):
    model, loader = net
    one, other = (ncjax.Monitor(model, loader, workdir=tmp_path) for _ in range(2))
    one.step()
    with pytest.raises(InputError, match=r"workdir: got .*another has written its history"):
        other.step()
    one.step()
    assert history.read(tmp_path / "history.nc")["epoch"].values.tolist() == [1, 2]
    with lock.owned(tmp_path), pytest.raises(InputError, match="is training in it"):
        one.step()


def test_it_warns_of_cautions_and_tells_no_share_of_no_time(torch, net, capsys):
    model, loader = net

    class Negative(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return -self.model(x)

    monitor = ncjax.Monitor(Negative(), loader)
    with pytest.warns(UserWarning, match=r"layer model\.3: .*its head is left out"):
        found = monitor.step()
    assert "nc3" not in found
    assert "%" not in capsys.readouterr().out


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning", "transformers"])
def library(request, monkeypatch):
    """A module with the class that a callback derives from, and nothing else."""
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    fake = types.ModuleType(request.param)
    fake.Callback = fake.TrainerCallback = type("Callback", (), {})
    if "." in request.param:
        monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def test_callbacks_end_an_epoch_on_one_process(net, library):
    model, loader = net
    monitor = ncjax.Monitor(model, loader)
    is_trainer = library.__name__ == "transformers"
    callback = monitor.trainer_callback() if is_trainer else monitor.lightning_callback()
    assert isinstance(callback, library.Callback)
    for epoch, leads in ((1, True), (2, False), (3, True)):
        state = types.SimpleNamespace(
            is_world_process_zero=leads,
            is_global_zero=leads,
            epoch=epoch - 1e-9,
            current_epoch=epoch - 1,
        )
        if is_trainer:
            callback.on_epoch_end(None, state, None, model=model)
        else:
            callback.on_train_epoch_end(state, model)
    assert monitor.history.epoch.values.tolist() == [1, 3]
    other = monitor.lightning_callback if is_trainer else monitor.trainer_callback
    with pytest.raises(InputError, match="it is not installed; pip install"):
        other()


@pytest.mark.filterwarnings("ignore")  # what the library warns of is its own
def test_lightning_itself_calls_it(torch, net):
    lightning = pytest.importorskip("lightning.pytorch")
    model, loader = net

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    monitor = ncjax.Monitor(model, loader)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = monitor.lightning_callback()
    lightning.Trainer(max_epochs=2, callbacks=[callback], **options).fit(Net(), loader)
    assert monitor.history.epoch.values.tolist() == [1, 2]


@pytest.mark.filterwarnings("ignore")  # what the library warns of is its own
def test_transformers_itself_calls_it(torch, net, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, _ = net

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, labels):
            logits = self.model(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(30)]
    batch = torch.stack([row["x"] for row in rows]), torch.arange(30) % 3
    monitor = ncjax.Monitor(model, [batch])
    arguments = transformers.TrainingArguments(str(tmp_path), num_train_epochs=2, report_to=[])
    callbacks = [monitor.trainer_callback()]
    transformers.Trainer(Net(), arguments, train_dataset=rows, callbacks=callbacks).train()
    assert monitor.history.epoch.values.tolist() == [1, 2]


def test_examples_in_docstrings_give_what_they_say(torch):
    results = doctest.testmod(monitors, optionflags=doctest.ELLIPSIS)
    assert results.attempted == 7
    assert results.failed == 0
