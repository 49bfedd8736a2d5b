"""What checkpoints cost: of a training run that saves every epoch, and of one state of 1 GiB.

    TFDS_DATA_DIR=... python -m benchmarks.checkpoints    # two minutes

Rounds take turns: the mnist config (1,000 images a class, 12 runs, 6 epochs) with a checkpoint
every epoch, and with none but the last. Times are of `loop.train` less compiling and measuring:
training, saving and waiting for what is saved.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Watch
from configs import mnist
from ncjax import plan
from ncjax.runs import loop
from ncjax.storage import checkpoint
from ncjax.training import parallel

ROUNDS, EPOCHS = 3, 6


def training_seconds(every: int, folder: Path) -> tuple[float, float]:
    """Seconds of a run, and MiB of its newest checkpoint."""
    config = mnist.get_config()
    config.data.per_class, config.train.epochs = 1000, EPOCHS
    config.log.epochs, config.checkpoint.every = (EPOCHS,), every
    begin, compiled = time.perf_counter(), []
    advance = loop.Sweep.advance

    def timed(sweep, epochs, measured):
        values, seconds = advance(sweep, epochs, measured)
        compiled.append(seconds if epochs == 0 else 0.0)
        return values, seconds

    with mock.patch.object(loop.Sweep, "advance", timed):
        loop.train(plan.prepare(config, folder))
    seconds = time.perf_counter() - begin - sum(compiled)
    newest = folder / "checkpoints" / str(EPOCHS)
    return seconds, sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 2**20


def one_gibibyte(folder: Path) -> tuple[float, float]:
    """Seconds until `save` returns, and until the state is on disk."""
    states = {
        "params": {
            "kernel": jnp.asarray(np.random.default_rng(0).random((16, 4096, 4096), np.float32))
        }
    }
    jax.block_until_ready(states)
    saved = checkpoint.Checkpoints(folder, keep=1)
    begin = time.perf_counter()
    saved.save(states, checkpoint.CheckpointMetadata(1, {}, {}, [], {}, {}, {}, {}, {}))
    stalled = time.perf_counter() - begin
    saved.close()
    return stalled, time.perf_counter() - begin


def main() -> None:
    parallel.use_every_core()
    watch = Watch(concludes=True)
    seconds: dict[int, list[float]] = {1: [], 0: []}
    size = 0.0
    for _ in range(ROUNDS):
        for every in seconds:
            folder = Path(tempfile.mkdtemp())
            taken, size = training_seconds(every, folder)
            seconds[every].append(taken)
            shutil.rmtree(folder)
    folder = Path(tempfile.mkdtemp())
    stalled, written = one_gibibyte(folder)
    shutil.rmtree(folder)
    table = Table(
        title=f"mnist, 12 runs, {EPOCHS} epochs, {ROUNDS} rounds; a checkpoint is {size:.0f} MiB"
    )
    for heading in ("checkpoint", "median s", "least-greatest s"):
        table.add_column(heading, justify="right")
    for every, times in seconds.items():
        words = "every epoch" if every else "the last"
        table.add_row(
            words, f"{statistics.median(times):.2f}", f"{min(times):.2f}-{max(times):.2f}"
        )
    console = Console()
    console.print(table)
    share = statistics.median(seconds[1]) / statistics.median(seconds[0]) - 1
    console.print(f"every epoch costs {share:+.1%}")
    console.print(f"1 GiB stalls training for {stalled:.2f} s and is on disk after {written:.1f} s")
    watch.conclude()


if __name__ == "__main__":
    main()
