"""Checkpoints of a whole sweep: Orbax v1 behind one thin module.

A checkpoint holds the stacked `RunState` of all runs, unpadded, so that it does not depend on the devices it was
trained on: `checkpoints/EPOCH/state/`, every leaf (R, ...) with runs in the order of the grid.
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

T = TypeVar("T")


def _newest(keep: int) -> Any:  # Orbax's own policies do not match the type it declares for them
    return ocp.training.preservation_policies.LatestN(keep)


class Checkpoints:
    """The checkpoints of one WORKDIR. Saving is asynchronous; `close` waits for the last one.

    Args:
      folder: made when missing; half-written checkpoints of a killed process are removed.
      keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int):
        # Orbax logs every step of every save through absl, on standard error.
        logging.getLogger("absl").setLevel(logging.ERROR)
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights do not compress; 1 GiB took 11 s instead of 0.7 s
        # By renaming alone, a checkpoint whose deletion was cut short would be listed as whole.
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.resolve()),
            context=context,
            preservation_policy=_newest(keep),
            cleanup_tmp_directories=True,
        )

    def epochs(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, epoch: int, states: object) -> None:
        """Starts writing; the arrays may be donated as soon as this returns. A second save of an epoch is no save."""
        if epoch not in self.epochs():
            # Unforced, Orbax skips a save while another one runs.
            self._checkpointer.save_async(epoch, states, force=True)

    def load(self, epoch: int, like: T) -> T:
        """The states of an epoch with the structure, types and shardings of `like`."""
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        return self._checkpointer.load(epoch, abstract)

    def close(self) -> None:
        self._checkpointer.close()
