"""What a user would sweep with instead: PyTorch, tuned, in every way that it offers."""

import copy
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import numpy as np
import torch

from benchmarks.machine import CORES, seconds
from benchmarks.networks import CLASSES, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Network
from benchmarks.noise import noise

# Of one run at a time: threads, the mode of torch.compile or None, and the layout of images (others
# have one).
VARIANTS = {
    "eager, all cores": (CORES, None, "channels_last"),
    "eager, all cores, channels first": (CORES, None, "contiguous_format"),
    "eager, 1 thread": (1, None, "channels_last"),
    "torch.compile, all cores": (CORES, "default", "channels_last"),
    "torch.compile max-autotune, all cores": (CORES, "max-autotune", "channels_last"),
}
# Of all runs at once by torch.func.vmap: whether compiled.
VMAPPED = {"eager": False, "torch.compile": True}


class TorchLoop:
    """A tuned loop: inputs normalized and targets one-hot beforehand, one shuffled copy per epoch,
    fused SGD.

    Of images, in the layout of `VARIANTS` (channels_last or PyTorch's own).
    """

    def __init__(self, network: Network, threads: int, mode: str | None, layout: str) -> None:
        torch.manual_seed(0)
        self.network, self.threads = network, threads
        layout = getattr(torch, layout)
        self.net = torch_network(network)
        self.optimizer = fused_sgd(self.net.parameters())
        self.inputs, self.targets = torch_data(network)
        if network.convolves:
            self.net.to(memory_format=layout)
            self.inputs = self.inputs.contiguous(memory_format=layout)
        self.loss = self.square_loss
        if mode:
            self.loss = torch.compile(self.square_loss, mode=mode, dynamic=False)

    def square_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        squares = torch.nn.functional.mse_loss(self.net(inputs), targets, reduction="sum")
        return squares * (0.5 / len(inputs))

    def __call__(self, epochs: int) -> None:
        torch.set_num_threads(self.threads)
        for _ in range(epochs):
            order = torch.randperm(len(self.inputs))[: self.network.samples_per_epoch]
            batches = (
                a.index_select(0, order).split(self.network.batch)
                for a in (self.inputs, self.targets)
            )
            for inputs, targets in zip(*batches, strict=True):
                self.optimizer.zero_grad(set_to_none=True)
                self.loss(inputs, targets).backward()
                self.optimizer.step()


class TorchSweep:
    """All runs at once, PyTorch's own way: gradients under `vmap` over stacked parameters.

    Every run draws its own batches; one fused SGD updates the stacks.
    """

    def __init__(self, network: Network, runs: int, compile_it: bool) -> None:
        torch.manual_seed(0)
        self.network, self.runs = network, runs
        nets = [torch_network(network) for _ in range(runs)]
        parameters, buffers = torch.func.stack_module_state(nets)
        self.parameters = {
            name: leaf.detach().requires_grad_() for name, leaf in parameters.items()
        }
        self.optimizer = fused_sgd(self.parameters.values())
        self.inputs, self.targets = torch_data(network)
        skeleton = copy.deepcopy(nets[0]).to("meta")

        def square_loss(parameters, buffers, inputs, targets):
            outputs = torch.func.functional_call(skeleton, (parameters, buffers), (inputs,))
            return 0.5 * ((outputs - targets) ** 2).sum() / network.batch

        gradients = torch.func.vmap(torch.func.grad(square_loss))
        self.gradients = torch.compile(gradients, dynamic=False) if compile_it else gradients
        self.buffers = buffers

    def __call__(self, epochs: int) -> None:
        torch.set_num_threads(CORES)
        size, batch = self.network.samples_per_epoch, self.network.batch
        for _ in range(epochs):
            orders = torch.stack([torch.randperm(len(self.inputs)) for _ in range(self.runs)])
            for index in orders[:, :size].split(batch, 1):
                found = self.gradients(
                    {name: leaf.detach() for name, leaf in self.parameters.items()},
                    self.buffers,
                    self.inputs[index],
                    self.targets[index],
                )
                for name, leaf in self.parameters.items():
                    leaf.grad = found[name]
                self.optimizer.step()


def fused_sgd(parameters: Iterable[torch.Tensor]) -> torch.optim.SGD:
    rates = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    return torch.optim.SGD(list(parameters), LEARNING_RATE, fused=True, **rates)


def torch_data(network: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns normalized inputs, channels first, and one-hot targets."""
    data = noise(network.image, network.examples, network.batch)
    inputs = torch.from_numpy(((data.train.images - data.center) * data.scale).astype(np.float32))
    if network.convolves:
        inputs = inputs.permute(0, 3, 1, 2)
    return inputs, torch.eye(CLASSES)[torch.from_numpy(data.train.labels).long()]


def torch_network(network: Network) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in pairwise((network.image[-1], *network.widths)):
        layer = (
            torch.nn.Conv2d(a, b, 3, 2, 1, bias=False)
            if network.convolves
            else torch.nn.Linear(a, b, bias=False)
        )
        layers += [layer, *[torch.nn.BatchNorm2d(b)] * network.batch_norm, torch.nn.ReLU()]
    head = torch.nn.Linear(network.features, CLASSES, bias=False)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), head)


def best_variant(network: Network, names: list[str]) -> tuple[str, dict[str, float]]:
    """Returns the fastest of the named `VARIANTS`, and the samples/s of each: the best of three
    short trials.
    """
    loops = {name: TorchLoop(network, *VARIANTS[name]) for name in names}
    return _fastest(loops, network, 1)


def best_vmapped(network: Network, runs: int) -> tuple[str, dict[str, float]]:
    """Does what `best_variant` does with the names of `VMAPPED`."""
    # Dynamo traces no vmap of batch normalization.
    names = [name for name, compiled in VMAPPED.items() if not (compiled and network.batch_norm)]
    loops = {name: TorchSweep(network, runs, VMAPPED[name]) for name in names}
    return _fastest(loops, network, runs)


def _fastest(
    loops: Mapping[str, Callable[[int], None]], network: Network, runs: int
) -> tuple[str, dict[str, float]]:
    epochs = max(1, network.epochs(runs) // 4)
    rates = {}
    for name, loop in loops.items():
        loop(1)
        least = min(seconds(loop, epochs) for _ in range(3))
        rates[name] = runs * epochs * network.samples_per_epoch / least
    return max(rates, key=rates.__getitem__), rates


def _serve(pipe, network: Network) -> None:
    loop = TorchLoop(network, 1, None, "channels_last")
    while epochs := pipe.recv():
        loop(epochs)
        pipe.send(None)


def torch_processes(network: Network, runs: int) -> Callable[[int], None]:
    """A PyTorch process per core, each training its share of the runs one after another. run(0)
    ends them.
    """
    context = multiprocessing.get_context("spawn")
    shares = [len(range(i, runs, CORES)) for i in range(min(CORES, runs))]
    pipes = []
    for _ in shares:
        here, there = context.Pipe()
        context.Process(target=_serve, args=(there, network), daemon=True).start()
        pipes.append(here)

    def run(epochs: int) -> None:
        for pipe, share in zip(pipes, shares, strict=True):
            pipe.send(epochs * share)
        if epochs:
            for pipe in pipes:
                pipe.recv()

    return run
