"""Measures a model again and again while its owner trains it, and keeps the numbers."""

import contextlib
import importlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncjax.errors import InputError, near
from ncjax.features.arguments import check_loader, check_names, check_whole
from ncjax.features.model import Module, Options, check_measurable, measure_layers
from ncjax.features.result import LayerMeasurements, Measurement
from ncjax.paths import expanded, make_folder

if TYPE_CHECKING:
    import xarray as xr

_HISTORY = "history.nc"
# What a measurement may take relative to the training before it and still be told as a share of it.
_MOST_SHARE = 10
# What a line on the console says of an epoch.
_SHOWN = ("accuracy", "nc1", "nc2_equiangular_means", "nc3", "nc4")


class Monitor:
    """Follows a PyTorch model through its training: measures it every few epochs.

    `monitor.step()` at the end of each epoch is all that a training loop needs. The model is after
    every measurement what it was before, as with `measure_model`, random numbers included, so
    training goes on as it would have without. Each measurement prints a line with what it cost,
    and warns of its cautions.

    Args:
      model: the `torch.nn.Module` that is trained.
      loader: the batches to measure it on, as of `measure_model`: training examples without
        shuffling or augmentation, a few thousand of them where all would take long.
      every: measure every so many epochs.
      workdir: folder for history.nc, of which `ncjax plot` draws figures and `ncjax show` prints a
        table. A history in it is continued; epochs from the one measured on are replaced. Where
        another has written it meanwhile, the next step is refused.
      layers: names of the modules to measure; None: the `Linear` that runs last.
      options: further arguments of `measure_model`.

    Attributes:
      history: measurements so far, an xarray Dataset with dimensions `epoch` and `layer`, and the
        `seconds` each took; None before the first.

    Raises:
      InputError: `every` is no number of epochs, there is no such option or module, a loader that
        can be read once, or `workdir` holds something else.

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
        check_whole("every", every, 1)
        for name in options:
            if name == "layer":
                raise InputError(name, options[name], f"give a list: layers={[options[name]]!r}")
            if name not in Options._fields:
                way_out = f"no such option of measure_model{near(name, Options._fields)}"
                raise InputError(name, options[name], way_out)
        self._names, self._options = check_names(None, layers), Options(**options)
        check_measurable(model, loader, self._names, self._options)
        check_loader("loader", loader, is_read_again=True)
        self._model, self._loader, self._every = model, loader, every
        self._folder: Path | None = None
        self.history: xr.Dataset | None = None
        if workdir is not None:
            self._folder = expanded("workdir", workdir)
            make_folder("workdir", self._folder)
            if (self._folder / _HISTORY).exists():
                self.history = _continued(self._folder / _HISTORY, layers)
            self._written = _identity(self._folder / _HISTORY)
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
        self._epoch = self._epoch + 1 if epoch is None else check_whole("epoch", epoch, 0)
        if self._epoch % self._every:
            return None
        begun = time.perf_counter()
        with self._owned_folder():
            found = measure_layers(self._model, self._loader, self._names, self._options)
            seconds = time.perf_counter() - begun
            self._record(found, seconds)
        print(self._line(found, seconds, begun - self._ended), flush=True)
        for name, one in found.items():
            for caution in one.cautions:
                warnings.warn(f"layer {name}: {caution}", stacklevel=2)
        self._ended = time.perf_counter()
        return next(iter(found.values())) if self._names == [None] else LayerMeasurements(found)

    @contextlib.contextmanager
    def _owned_folder(self) -> Iterator[None]:
        """Keeps others out of WORKDIR, or raises InputError where one has written its history."""
        from ncjax.storage import lock

        if self._folder is None:
            yield
            return
        with lock.owned(self._folder):
            if _identity(self._folder / _HISTORY) != self._written:
                way_out = "another has written its history meanwhile; choose another WORKDIR"
                raise InputError("workdir", str(self._folder), way_out)
            yield

    def _record(self, found: dict[str, Measurement], seconds: float) -> None:
        from ncjax.storage import history, monitored

        layers = {name: one.metrics for name, one in found.items()}
        if self.history is not None:
            measured = self.history["layer"].values.tolist()
            if {*measured} != {*layers}:
                way_out = f"its history is of {', '.join(measured)}; choose another WORKDIR"
                raise InputError("layers", [*layers], way_out)
            layers = {name: layers[name] for name in measured}
        remarks = [
            f"{name}: {remark}"
            for name, one in found.items()
            for remark in one.cautions + one.notes
        ]
        newest = monitored.one_epoch(self._epoch, layers, seconds, "\n".join(remarks))
        self.history = monitored.append(self.history, newest)
        if self._folder is not None:
            history.save(self.history, self._folder / _HISTORY)
            self._written = _identity(self._folder / _HISTORY)

    def _line(self, found: dict[str, Measurement], seconds: float, between: float) -> str:
        name, last = list(found.items())[-1]
        shown = ", ".join(f"{metric} {last[metric]:.3g}" for metric in _SHOWN if metric in last)
        # Where nothing was trained since, there is no time to speak of.
        is_known = between > seconds / _MOST_SHARE
        share = f", {seconds / between:.0%} of the time before it" if is_known else ""
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


def _identity(path: Path) -> tuple[int, ...] | None:
    """Returns what is another once a file has been written anew; None: there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _continued(path: Path, layers: Sequence[str] | None) -> "xr.Dataset":
    """Returns the history of a monitor that lies in a WORKDIR, or raises InputError."""
    from ncjax.storage import history, monitored

    found = history.read(path)
    if not monitored.is_monitored(found):
        raise InputError("workdir", str(path.parent), "it holds another run; choose another folder")
    measured = found["layer"].values.tolist()
    if layers is not None and {*measured} != {*layers}:
        way_out = f"{path} is of {', '.join(measured)}; choose another WORKDIR"
        raise InputError("layers", list(layers), way_out)
    return found
