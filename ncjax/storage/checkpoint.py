"""Saves and loads checkpoints of a whole sweep with Orbax v1.

A checkpoint holds the stacked `RunState` of all runs, unpadded, so that it does not depend on the
devices it was trained on. It is `checkpoints/EPOCH/state/`, with every leaf (R, ...) in the order
of the grid's runs and stored run by run. Its custom metadata hold `CheckpointMetadata` under the
key "facts", with a CRC of every run of every leaf, because neither Orbax nor a file system notices
a flipped bit.
"""

import functools
import json
import logging
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils.epath.gpath import PosixGPath
from orbax.checkpoint import v1 as ocp

T = TypeVar("T")


class Damaged(Exception):
    """Reports a checkpoint that is not what was saved; the message says where."""


class _Folder(PosixGPath):
    """Makes Orbax take `[`, `*` and `?` in a folder's own name literally, not as a glob pattern."""

    def glob(self, pattern: str) -> Iterator["_Folder"]:
        return map(self._new, Path(self).glob(pattern))


class CheckpointMetadata(NamedTuple):
    """Describes the states of a checkpoint.

    Attributes:
      epoch: the epoch of the states.
      config: the config of the run, as in config.json.
      axes: the values of every swept axis of the grid, in the order of its runs.
      measured: the epochs measured up to `epoch`.
      versions: the versions of Python and of the packages that matter.
      crc32: one checksum per run, by leaf.
      data: the checksums of the training data, see `preparation.checksums`.
      random_bits: the settings that decide random numbers, see `provenance`.
      arithmetic: the settings that decide rounding, see `provenance`.

    The last three are empty in older checkpoints.
    """

    epoch: int
    config: dict[str, Any]
    axes: dict[str, list]
    measured: list[int]
    versions: dict[str, str]
    crc32: dict[str, list[int]]
    data: dict[str, int]
    random_bits: dict[str, str]
    arithmetic: dict[str, str]


class Checkpoints:
    """Saves and loads the checkpoints of one WORKDIR.

    Saving is asynchronous; `close` waits for the last save.

    Args:
      folder: the folder of the checkpoints. It is made if it is missing, and half-written
        checkpoints of a killed process are removed from it.
      keep: the number of newest checkpoints to keep.
      marked: the epochs to keep in addition.
    """

    def __init__(self, folder: Path, keep: int, marked: tuple[int, ...] = ()):
        # Orbax logs every step of every save, and its warnings, on standard error through absl.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        _silence_abandoned_writes()
        context = ocp.Context()
        saving: Any = context.array.saving
        saving.use_compression = False  # weights do not compress; 1 GiB took 11 s instead of 0.7 s
        saving.scoped_storage_options_creator = _one_chunk_per_run
        # With renaming alone, a checkpoint whose deletion was interrupted would be listed as whole.
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        # If a folder could not be made in the background, Orbax's threads would wait for it for
        # twenty minutes, and the process could not end before them.
        context.async_options.create_directories_asynchronously = False
        self._folder = folder.resolve()
        self._checkpointer = ocp.training.Checkpointer(
            _Folder(self._folder),
            context=context,
            preservation_policy=_kept(keep, marked),
            cleanup_tmp_directories=True,
            # Otherwise damaged metadata of one checkpoint would keep all from being read.
            lightweight_initialize=True,
        )

    def epochs(self) -> list[int]:
        return epochs_in(self._folder)

    def save(self, states: Any, metadata: CheckpointMetadata) -> None:
        """Starts to write states; their arrays may be donated as soon as this returns.

        `metadata.crc32` is filled in here.

        Raises:
          OSError: the folder is gone, or this or the previous checkpoint could not be written.
        """
        if not self._folder.is_dir():  # Orbax would make it again
            raise FileNotFoundError(f"{self._folder} is gone")
        content = metadata._replace(crc32=checksums(states))._asdict()
        sealed = {"facts": content, "seal": _seal(content)}
        try:
            # Without `force`, Orbax skips a save while another one runs.
            self._checkpointer.save_async(
                metadata.epoch, states, force=True, overwrite=True, custom_metadata=sealed
            )
        except Exception as error:
            raise _cannot_write(self._folder, error) from error

    def load(self, epoch: int, like: T) -> tuple[T, CheckpointMetadata]:
        """Returns the states of an epoch, verified, and their metadata.

        The states are NumPy arrays with the structure, shapes and types of `like`.

        Raises:
          Damaged: the checkpoint is not what was saved, or has other leaves than `like`.
        """
        metadata = read_metadata(self._folder, epoch)
        leaves = {name: read_leaf(self._folder, metadata, name) for name in metadata.crc32}
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            stored = leaves.get(leaf_name(path))
            if stored is None or (stored.shape, stored.dtype) != (leaf.shape, leaf.dtype):
                raise Damaged(f"{leaf_name(path)} is not what this program needs")
            found.append(stored)
        return jax.tree.unflatten(jax.tree.structure(like), found), metadata

    def delete(self, epoch: int) -> None:
        self._checkpointer.delete(epoch, missing_ok=True)

    def close(self) -> None:
        """Waits for the last save, and raises OSError if it failed."""
        try:
            self._checkpointer.close()
        except Exception as error:
            raise _cannot_write(self._folder, error) from error


def checksums(states: Any) -> dict[str, list[int]]:
    """Returns the CRC-32 of every run (leading axis) of every leaf.

    If processes share the runs, each computes those of its own runs.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(states)}
    with ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
        if all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
            return {name: list(pool.map(_crc32, np.asarray(leaf))) for name, leaf in leaves.items()}
        from jax.experimental import multihost_utils  # needed only with several processes

        mine = {name: np.zeros(len(leaf), np.uint32) for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            for shard in leaf.addressable_shards:
                mine[name][shard.index[0]] = list(pool.map(_crc32, np.asarray(shard.data)))
    return {
        name: crcs.max(0).tolist() for name, crcs in multihost_utils.process_allgather(mine).items()
    }


def verify(
    found: Mapping[str, list[int]], expected: Mapping[str, list[int]], first_run: int = 0
) -> None:
    """Raises Damaged, naming the first leaf and run whose bits are not those that were saved."""
    for name, expected_crcs in expected.items():
        if name not in found:
            raise Damaged(f"{name} is missing")
        if len(found[name]) != len(expected_crcs):
            raise Damaged(f"{name} has not as many runs as were saved")
        wrong = [
            run for run, (a, b) in enumerate(zip(found[name], expected_crcs, strict=True)) if a != b
        ]
        if wrong:
            raise Damaged(f"the checksum of {name} does not match in run {first_run + wrong[0]}")


def read_metadata(folder: Path, epoch: int) -> CheckpointMetadata:
    """Returns the metadata of an epoch's checkpoint, or raises Damaged."""
    try:
        sealed = json.loads((folder / str(epoch) / "_CHECKPOINT_METADATA").read_text())[
            "custom_metadata"
        ]
        metadata = CheckpointMetadata(
            **{"data": {}, "random_bits": {}, "arithmetic": {}} | sealed["facts"]
        )
        is_whole = sealed["seal"] == _seal(sealed["facts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"its metadata cannot be read ({_last_line(error)})") from error
    if not is_whole:
        raise Damaged("the checksum of its metadata does not match")
    if metadata.epoch != epoch:
        raise Damaged(f"it holds epoch {metadata.epoch}")
    return metadata


def epochs_in(folder: Path) -> list[int]:
    """Returns the epochs with a finished checkpoint, without opening any."""
    return sorted(
        epoch for path in folder.glob("*/commit_success.txt") for epoch in _epoch_of(path.parent)
    )


def unfinished_in(folder: Path) -> list[int]:
    """Returns the epochs with an unfinished checkpoint.

    It is being written, or was when its process was killed, or has lost its mark of success.
    """
    return sorted(
        {epoch for path in folder.glob("*") for epoch in _epoch_of(path)} - set(epochs_in(folder))
    )


def _epoch_of(path: Path) -> list[int]:
    """Returns a list of the epoch of a checkpoint's folder, empty if the name is not Orbax's.

    Such a folder may be a copy.
    """
    name = path.name
    return [int(name)] if name.isascii() and name.isdecimal() and str(int(name)) == name else []


def read_run(folder: Path, epoch: int, run: int) -> dict:
    """Returns the variables of one run's network, verified.

    They are nested dicts of NumPy arrays: `params`, and the other collections that the network has.
    No large leaf of the other runs is read.
    """
    metadata = read_metadata(folder, epoch)
    variables: dict = {}
    for name in metadata.crc32:
        if not name.startswith(("params.", "model_state.")):
            continue
        leaf = read_leaf(folder, metadata, name, slice(run, run + 1))
        *path, last = name.removeprefix("model_state.").split(".")
        nested = variables
        for key in path:
            nested = nested.setdefault(key, {})
        nested[last] = leaf[0]
    return variables


def read_leaf(
    folder: Path, metadata: CheckpointMetadata, name: str, runs: slice = slice(None)
) -> np.ndarray:
    """Returns one leaf (R, ...) of some runs of a checkpoint, verified, or raises Damaged."""
    import tensorstore

    # It is named by its path, because a file:// URL would have to be quoted.
    base = {"driver": "file", "path": f"{(folder / str(metadata.epoch) / 'state').resolve()}/"}
    place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    try:
        stored = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
        leaf = np.asarray(stored[runs].read().result())
    except Exception as error:  # TensorStore reports damage by many types
        raise Damaged(f"{name} cannot be read ({_last_line(error)})") from error
    verify(checksums({name: leaf}), {name: metadata.crc32[name][runs]}, first_run=runs.start or 0)
    return leaf


def leaf_name(path: tuple) -> str:
    """Returns the name that Orbax gives a leaf on disk, such as params.layer_1.kernel."""
    return ".".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


@functools.cache
def _silence_abandoned_writes() -> None:
    """Silences the tracebacks of writes that end after their save has failed.

    The error itself has been raised by then. TensorStore still reports each write to the event loop
    of the save, which Orbax has closed. asyncio and Python would also print other writes that
    failed or never began.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        is_closed = (
            unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        )
        never_opened = getattr(unraisable.object, "__qualname__", "") == "BaseEventLoop.__del__"
        if not is_closed and not never_opened:
            report(unraisable)

    sys.unraisablehook = filtered


def _one_chunk_per_run(_: Any, leaf: Any) -> Any:
    size = max(1, leaf.nbytes // max(1, leaf.shape[0]))
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=size, shard_axes=(0,))


def _kept(
    keep: int, marked: tuple[int, ...]
) -> Any:  # Orbax's own policies do not match the type it declares for them
    policies = ocp.training.preservation_policies
    return policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.CustomSteps(list(marked))]
    )


def _crc32(leaf: np.ndarray | np.generic) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).data)


def _seal(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _cannot_write(folder: Path, error: Exception) -> OSError:
    return OSError(f"a checkpoint could not be written in {folder} ({_last_line(error)})")


def _last_line(error: BaseException) -> str:
    """Returns the last line of the message of the error that caused this one.

    Orbax wraps errors, sometimes in one that says something else.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__
