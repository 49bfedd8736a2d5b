"""`ncjax.measure` against p x p covariances in PyTorch, against reading and matmuls alone, and
where classes are many.

    pip install -e ".[bench]"
    python -m benchmarks.measure                        # three minutes; 1 GiB of temporary files
    python -m benchmarks.measure --examples 1280000     # ImageNet's size, a file of 10 GB
    python -m benchmarks.measure --quick                # seconds: does it still work?

PyTorch's way is the field's: class means, then one p x p GEMM a batch (the best of three batch
sizes), then the pseudo-inverse. Both give nc1 of the same arrays, in turns, on as many threads as
there are cores, after first calls that compile. A turn is two calls of which the second counts:
after its last call a library's threads wait by spinning for some milliseconds, and would take a
core from the other's first. Rows of single calls say what that costs. Files were just written, so
they are read from the page cache where memory has room; their first call compiles too.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import CORES, Watch, seconds

ROUNDS = 9
REPO = Path(__file__).resolve().parents[1]


def resident() -> int:
    """Bytes of this process that are no mapped file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]
    )


@contextlib.contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Gives a function that says the largest `resident` while the context lasts, sampled every 2
    ms.
    """
    most, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        thread.join()


def in_turns(*functions: Callable[[], Any], rounds: int, single: bool = False) -> list[list[float]]:
    """Seconds of each function in turns: of the second of two calls, or of `single` ones."""

    def turn(function: Callable[[], Any]) -> float:
        if not single:
            function()
        return seconds(function)

    times = [[turn(function) for function in functions] for _ in range(rounds)]
    return [list(column) for column in zip(*times, strict=True)]


def said(times: list[float]) -> str:
    return (
        f"{1e3 * statistics.median(times):.0f} ms ({1e3 * min(times):.0f} to "
        f"{1e3 * max(times):.0f})"
    )


# Against p x p


def torch_nc1(
    features: Any, labels: Any, num_classes: int, batch: int, head: Any = None
) -> dict[str, float]:
    """The baseline: tr(Sigma_W pinv(Sigma_B))/C, and with a head nc4 by two more GEMMs a batch."""
    import torch

    size, dim = features.shape
    sums, counts = torch.zeros(num_classes, dim), torch.bincount(labels, minlength=num_classes)
    for i in range(0, size, batch):
        sums.index_add_(0, labels[i : i + batch], features[i : i + batch])
    means = sums / counts[:, None]
    centred = means - means.mean(0)
    within, disagreements = torch.zeros(dim, dim), 0
    for i in range(0, size, batch):
        own, h = labels[i : i + batch], features[i : i + batch]
        deviation = h - means[own]
        within.addmm_(deviation.T, deviation)
        if head is not None:
            nearest = (h @ means.T - (means**2).sum(1) / 2).argmax(1)
            disagreements += int(((h @ head.T).argmax(1) != nearest).sum())
    between = centred.T @ centred / num_classes
    nc1 = torch.trace(within / size @ torch.linalg.pinv(between, rtol=1e-6)) / num_classes
    return {"nc1": float(nc1), "nc4": disagreements / size}


def against_covariances(
    size: int, dim: int, num_classes: int, rounds: int, with_head: bool
) -> dict[str, Any]:
    import torch

    from ncjax.features import measure

    torch.set_num_threads(CORES)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, size)
    features = rng.standard_normal((size, dim), dtype=np.float32)
    features += rng.standard_normal((num_classes, dim), dtype=np.float32)[labels]
    head = rng.standard_normal((num_classes, dim), dtype=np.float32) if with_head else None
    tensors = [None if a is None else torch.from_numpy(a) for a in (features, labels, head)]

    def covariances(batch: int) -> dict[str, float]:
        return torch_nc1(tensors[0], tensors[1], num_classes, batch, tensors[2])

    def ours() -> Mapping[str, float]:
        return measure.measure(features, labels, head=head)

    mine, inputs = ours(), features.nbytes + labels.nbytes
    base = resident() - inputs  # with all that is compiled
    with peak() as most:
        ours()
        memory = (most() - base) / inputs
    batches = (1024, 4096, 16384)
    trials = in_turns(*(lambda b=b: covariances(b) for b in batches), rounds=2)
    batch = min(zip(map(min, trials), batches, strict=True))[1]
    theirs = covariances(batch)
    assert abs(theirs["nc1"] / mine["nc1"] - 1) < 1e-3, (theirs, mine)
    rival, own = in_turns(lambda: covariances(batch), ours, rounds=rounds)
    singly = in_turns(lambda: covariances(batch), ours, rounds=rounds, single=True)
    return {
        "C": num_classes,
        "head": with_head,
        "batch": batch,
        "pytorch": rival,
        "ncjax": own,
        "singly": singly,
        "memory over inputs": memory,
    }


# A model of PyTorch


def of_model(rounds: int, size: int) -> tuple[list[float], list[float]]:
    """Seconds of the forward passes of a network with 512 features and ten classes over a loader,
    and of `measure_model`, which runs them too, in turns.
    """
    import torch

    import ncjax

    torch.manual_seed(0)
    layers = [
        torch.nn.Sequential(torch.nn.Linear(m, n), torch.nn.BatchNorm1d(n), torch.nn.ReLU())
        for m, n in ((3072, 1024), (1024, 1024), (1024, 512))
    ]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(512, 10)).eval()
    data = torch.utils.data.TensorDataset(torch.randn(size, 3072), torch.arange(size) % 10)
    loader = torch.utils.data.DataLoader(data, 100)

    def forward() -> None:
        with torch.no_grad():
            for inputs, _ in loader:
                model(inputs)

    def measured() -> None:
        ncjax.measure_model(model, loader)

    measured()
    alone, with_measurement = in_turns(forward, measured, rounds=rounds, single=True)
    return alone, with_measurement


def read_in_place(size: int, dim: int) -> list[float]:
    """Seconds of reading the features twice from memory, a thread per core: the floor of two
    passes.
    """
    parts = np.array_split(np.ones((size, dim), np.float32).view(np.int64), CORES)

    def twice() -> None:
        for _ in range(2):
            threads = [threading.Thread(target=part.max) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    return in_turns(twice, rounds=ROUNDS)[0]


# Files


def write(path: Path, size: int, dim: int, num_classes: int) -> None:
    """float32 features and labels as .npy: one block of noise over and over, about class means."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(size) % num_classes)
    means = rng.standard_normal((num_classes, dim), dtype=np.float32)
    noise = rng.standard_normal((4096, dim), dtype=np.float32)
    out = np.lib.format.open_memmap(path / "features.npy", "w+", np.float32, (size, dim))
    for i in range(0, size, len(noise)):
        part = labels[i : i + len(noise)]
        out[i : i + len(noise)] = noise[: len(part)] + means[part]
    out.flush()
    np.save(path / "labels.npy", labels)


def child(folder: Path, rounds: int) -> dict[str, Any]:
    """One process that measures a file: seconds of each call, the first with compilation, and
    its resident peak.
    """
    from ncjax.features import measure
    from ncjax.training import parallel

    parallel.use_every_core()
    features, labels = (
        np.load(folder / "features.npy", mmap_mode="r"),
        np.load(folder / "labels.npy"),
    )
    with peak() as most:
        times = [seconds(lambda: measure.measure(features, labels)) for _ in range(rounds)]
        return {"seconds": times, "peak": most()}


def of_file(folder: Path, rounds: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure",
        "--child",
        str(folder),
        "--rounds",
        str(rounds),
    ]
    return json.loads(
        subprocess.run(command, check=True, cwd=REPO, capture_output=True, text=True).stdout
    )


def read_twice(path: Path) -> float:
    buffer = bytearray(2**24)

    def once() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return seconds(once) + seconds(once)


def two_gemm_passes(size: int, dim: int, num_classes: int) -> tuple[float, float]:
    """Seconds of 2 N p C multiplications in float32, at PyTorch's rate and at JAX's."""
    import jax
    import jax.numpy as jnp
    import torch

    rng, batch = np.random.default_rng(0), 4096
    a, b = (
        rng.standard_normal((batch, dim), dtype=np.float32),
        rng.standard_normal((dim, num_classes), dtype=np.float32),
    )
    tensors, arrays = (torch.from_numpy(a), torch.from_numpy(b)), (jnp.asarray(a), jnp.asarray(b))
    product = jax.jit(jnp.dot)
    functions = lambda: tensors[0] @ tensors[1], lambda: jax.block_until_ready(product(*arrays))
    times = in_turns(*functions, rounds=15)
    torch_s, jax_s = (statistics.median(column) * 2 * size / batch for column in times)
    return torch_s, jax_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--examples", type=int, default=131_072, help="of the file with p=2048, C=1000"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.rounds)))
        return
    try:
        import torch  # noqa: F401
    except ImportError:
        print('benchmarks.measure needs PyTorch: pip install -e ".[bench]"', file=sys.stderr)
        raise SystemExit(2) from None
    from ncjax.training import parallel

    parallel.use_every_core()
    watch = Watch(concludes=not arguments.quick)
    console = Console(width=140)
    size, rounds = (5_000, 2) if arguments.quick else (50_000, ROUNDS)
    table = Table(
        title=f"N = {size:,}, p = 512, float32: median (least to greatest) of {rounds} rounds in "
        "turns"
    )
    for heading in (
        "C",
        "measured",
        "PyTorch, p x p",
        "ncjax.measure",
        "times as fast",
        "memory/inputs",
    ):
        table.add_column(heading, justify="right")
    for num_classes in (10, 100):
        for with_head in (False, True):
            found = against_covariances(size, 512, num_classes, rounds, with_head)
            what = "with a head" if with_head else "features alone"
            for calls, (rival, own) in (
                ("", (found["pytorch"], found["ncjax"])),
                (", single calls", found["singly"]),
            ):
                ratio = [a / b for a, b in zip(rival, own, strict=True)]
                table.add_row(
                    str(num_classes),
                    what + calls,
                    f"{said(rival)}, batch {found['batch']}",
                    said(own),
                    f"{statistics.median(ratio):.1f} ({min(ratio):.1f} to {max(ratio):.1f})",
                    f"{found['memory over inputs']:.2f}",
                )
    console.print(table)
    examples = 1_000 if arguments.quick else 10_000
    alone, measured = of_model(rounds, examples)
    added = [b / a - 1 for a, b in zip(alone, measured, strict=True)]
    console.print(
        f"a PyTorch network, N = {examples:,}, p = 512, C = 10: forward passes {said(alone)}, "
        f"measure_model {said(measured)}: {statistics.median(added):.0%} more "
        f"({min(added):.0%} to {max(added):.0%})",
        highlight=False,
    )
    console.print(
        f"reading them twice, a thread per core: {said(read_in_place(size, 512))}", highlight=False
    )
    with tempfile.TemporaryDirectory() as folder:
        examples = 8192 if arguments.quick else arguments.examples
        write(Path(folder), examples, 2048, 1000)
        gemm = two_gemm_passes(examples, 2048, 1000)
        reading = read_twice(Path(folder) / "features.npy")
        found = of_file(Path(folder), 1 if arguments.quick or examples > 500_000 else 3)
        bound = max(reading, min(gemm))
        console.print(
            f"N = {examples:,}, p = 2048, C = 1000 from a file: "
            f"{', '.join(f'{s:.1f} s' for s in found['seconds'])}; "
            f"reading it twice {reading:.1f} s, two GEMM passes {gemm[0]:.1f} s (PyTorch) "
            f"{gemm[1]:.1f} s (JAX): "
            f"{min(found['seconds']) / bound:.2f} times the larger; {found['peak'] / 2**20:.0f} "
            "MiB beside the file",
            highlight=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        num_classes, dim, examples = (
            (2048, 256, 8192) if arguments.quick else (32_768, 1024, 262_144)
        )
        write(Path(folder), examples, dim, num_classes)
        found = of_file(Path(folder), 1)
        console.print(
            f"N = {examples:,}, p = {dim}, C = {num_classes:,} from a file: "
            f"{found['seconds'][0]:.1f} s, "
            f"{found['peak'] / 2**20:.0f} MiB beside the file",
            highlight=False,
        )
    watch.conclude()


if __name__ == "__main__":
    main()
