"""Measures a model again and again while its owner trains it, and keeps the numbers."""

import importlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncjax.errors import InputError, near
from ncjax.features.model import Module, Options, measure_layers
from ncjax.features.result import LayerMeasurements, Measurement
from ncjax.paths import expanded, make_folder

if TYPE_CHECKING:
    import xarray as xr

# What a line on the console says of an epoch.
_SHOWN = ("accuracy", "nc1", "nc2_equiangular_means", "nc3", "nc4")


class Monitor:
    """Follows a PyTorch model through its training: measures it every few epochs.

    `monitor.step()` at the end of each epoch is all that a training loop needs. The model is after
    every measurement what it was before, as with `measure_model`, PyTorch's random numbers
    included, so training goes on as it would have without. Each measurement prints a line with
    what it cost.

    Args:
      model: the `torch.nn.Module` that is trained.
      loader: the batches to measure it on, as of `measure_model`: training examples without
        shuffling or augmentation, a few thousand of them where all would take long.
      every: measure every so many epochs.
      workdir: folder for history.nc, of which `ncjax plot` draws figures and `ncjax show` prints a
        table. A history in it is continued; epochs from the one measured on are replaced.
      layers: names of the modules to measure, in forward order; None: the `Linear` that runs last.
      options: further arguments of `measure_model`.

    Attributes:
      history: measurements so far, an xarray Dataset with dimensions `epoch` and `layer`, and the
        `seconds` each took; None before the first.

    Raises:
      InputError: `every` is no number of epochs, there is no such option, or `workdir` holds
        something else.

    Examples:
      >>> import ncjax, torch
      >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
      >>> x, y = torch.randn(50, 2), torch.arange(50) % 2
      >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
      >>> monitor = ncjax.Monitor(model, [(x, y)], every=2)
      >>> for epoch in range(4):  # doctest: +ELLIPSIS
      ...     torch.nn.functional.cross_entropy(model(x), y).backward()
      ...     optimizer.step()
      ...     _ = monitor.step()
      epoch 2: accuracy ..., nc1 ..., nc4 ... (layer 2); measured in ...
      epoch 4: ...
      >>> monitor.history.nc1.dims, monitor.history.epoch.values.tolist()
      (('epoch', 'layer'), [2, 4])
    """

    def __init__(
        self,
        model: Module,
        loader: Iterable,
        every: int = 1,
        workdir: str | Path | None = None,
        *,
        layers: Sequence[str] | None = None,
        **options: Any,
    ):
        if every < 1:
            raise InputError("every", every, "give a number of epochs from 1 on")
        for name in options:
            if name not in Options._fields:
                way_out = f"no such option of measure_model{near(name, Options._fields)}"
                raise InputError(name, options[name], way_out)
        self._model, self._loader, self._every = model, loader, every
        self._layers, self._options = layers, Options(**options)
        self._path: Path | None = None
        self.history: xr.Dataset | None = None
        if workdir is not None:
            folder = expanded("workdir", workdir)
            make_folder("workdir", folder)
            self._path = folder / "history.nc"
            if self._path.exists():
                self.history = _continued(self._path, layers)
        self._epoch = 0 if self.history is None else int(self.history["epoch"][-1])
        self._ended = time.perf_counter()

    def step(self, epoch: int | None = None) -> "Measurement | LayerMeasurements | None":
        """Ends an epoch, and measures the model where it is one of every `every`.

        Args:
          epoch: its number, from 0 on; None: one more than the last.

        Returns:
          A `Measurement`, of `layers` a `LayerMeasurements`; None where nothing was measured.

        Raises:
          InputError: as `measure_model`.
          OSError: the history cannot be written.
        """
        self._epoch = self._epoch + 1 if epoch is None else int(epoch)
        if self._epoch % self._every:
            return None
        begun = time.perf_counter()
        names = [None] if self._layers is None else list(self._layers)
        found = measure_layers(self._model, self._loader, names, self._options)
        seconds = time.perf_counter() - begun
        self._record(found, seconds)
        print(self._line(found, seconds, begun - self._ended), flush=True)
        self._ended = time.perf_counter()
        return next(iter(found.values())) if self._layers is None else LayerMeasurements(found)

    def _record(self, found: dict[str, Measurement], seconds: float) -> None:
        from ncjax.storage import history, monitored

        layers = {name: one.metrics for name, one in found.items()}
        remarks = [
            f"{name}: {remark}"
            for name, one in found.items()
            for remark in one.cautions + one.notes
        ]
        newest = monitored.one_epoch(self._epoch, layers, seconds, "\n".join(remarks))
        if self.history is not None and self.history["layer"].values.tolist() != [*layers]:
            measured = ", ".join(self.history["layer"].values)
            way_out = f"its history is of {measured}; choose another WORKDIR"
            raise InputError("layers", [*layers], way_out)
        self.history = monitored.append(self.history, newest)
        if self._path is not None:
            history.save(self.history, self._path)

    def _line(self, found: dict[str, Measurement], seconds: float, between: float) -> str:
        name, last = list(found.items())[-1]
        shown = ", ".join(f"{metric} {last[metric]:.3g}" for metric in _SHOWN if metric in last)
        share = f", {seconds / between:.0%} of the time before it" if between > 0 else ""
        return f"epoch {self._epoch}: {shown} (layer {name}); measured in {seconds:.2f} s{share}"

    def lightning_callback(self) -> Any:
        """Returns a callback of Lightning's `Trainer` that ends an epoch of this monitor's with
        each of its training epochs, on one process.

        Raises:
          InputError: Lightning is not installed.
        """
        monitor = self
        base = _first_of("Callback", "lightning.pytorch", "pytorch_lightning", needed="lightning")

        class MonitorCallback(base):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                if trainer.is_global_zero:
                    monitor.step(trainer.current_epoch + 1)

        return MonitorCallback()

    def trainer_callback(self) -> Any:
        """Returns a callback of Hugging Face's `Trainer` that ends an epoch of this monitor's with
        each of its epochs, on one process.

        Raises:
          InputError: transformers is not installed.
        """
        monitor = self
        base = _first_of("TrainerCallback", "transformers", needed="transformers")

        class MonitorCallback(base):
            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.is_world_process_zero:
                    monitor.step(round(state.epoch))

        return MonitorCallback()


def _first_of(name: str, *modules: str, needed: str) -> Any:
    """Returns a class of the first of these modules that is installed."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            continue
    raise InputError("callback", needed, f"it is not installed; pip install {needed}")


def _continued(path: Path, layers: Sequence[str] | None) -> "xr.Dataset":
    """Returns the history of a monitor that lies in a WORKDIR, or raises InputError."""
    from ncjax.storage import history, monitored

    found = history.read(path)
    if not monitored.is_monitored(found):
        raise InputError("workdir", str(path.parent), "it holds another run; choose another folder")
    measured = found["layer"].values.tolist()
    if layers is not None and measured != list(layers):
        way_out = f"{path} is of {', '.join(measured)}; choose another WORKDIR"
        raise InputError("layers", list(layers), way_out)
    return found
