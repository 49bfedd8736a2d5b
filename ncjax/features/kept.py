"""Keeps what a model made of its batches, for the second pass over them: in memory, or in
temporary files where that is too small.
"""

import tempfile
from collections.abc import Iterator

import numpy as np

from ncjax import environment

# A block holds the rows of many batches: a pass over few long ones takes less time than over many.
_BLOCK = 2**26
# Features may take a quarter of this machine's memory before they go to files.
_SHARE = 4


class KeptFeatures:
    """Holds features, labels and logits as they come, and gives them back as batches.

    Iterating yields (features, labels) or (features, labels, logits) in the order they came in.

    Args:
      sharers: so many of these share the memory that features may take.
    """

    def __init__(self, sharers: int = 1) -> None:
        self._sharers = sharers
        self._columns: list[_Column] = []

    def add(self, *arrays: np.ndarray) -> None:
        """Appends rows of features, of labels and, where there are any, of logits."""
        if not self._columns:
            # The first batch may have no rows.
            of_row = np.empty((1, *arrays[0].shape[1:]), arrays[0].dtype).nbytes
            rows = max(1, _BLOCK // max(of_row, 1))
            most = environment.physical_memory() // (_SHARE * self._sharers)
            self._columns = [_Column(rows, most) for _ in arrays]
        for column, rows in zip(self._columns, arrays, strict=True):
            column.append(rows)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return zip(*(column.blocks() for column in self._columns), strict=True)


class _Column:
    """Appends rows of one shape and type to blocks of equal numbers of rows."""

    def __init__(self, rows_of_block: int, most_bytes: int):
        self._rows_of_block, self._most_bytes = rows_of_block, most_bytes
        self._full: list[np.ndarray] = []
        self._open: np.ndarray | None = None
        self._filled = 0
        self._bytes = 0

    def append(self, rows: np.ndarray) -> None:
        while len(rows):
            if self._open is None or self._filled == self._rows_of_block:
                self._close_block()
                self._open = np.empty((self._rows_of_block, *rows.shape[1:]), rows.dtype)
            part = rows[: self._rows_of_block - self._filled]
            self._open[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rows = rows[len(part) :]

    def _close_block(self) -> None:
        if self._open is not None:
            self._full.append(self._placed(self._open))
        self._filled = 0

    def _placed(self, block: np.ndarray) -> np.ndarray:
        """Returns a full block where it may stay: in memory as long as there is enough of it."""
        self._bytes += block.nbytes
        if self._bytes <= self._most_bytes:
            return block
        # Mapped, it lasts as long as the array does, on disk alone.
        with tempfile.TemporaryFile() as file:
            file.write(block.data)
            file.flush()
            return np.memmap(file, block.dtype, "r", 0, block.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        yield from self._full
        if self._open is not None and self._filled:
            yield self._open[: self._filled]
