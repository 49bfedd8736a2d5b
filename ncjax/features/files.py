"""Reads files of features, labels, logits and heads, memory-mapped if the format allows it."""

import io
import math
import os
import stat
import warnings
import zipfile
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from ncjax.errors import InputError

_SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
}
_SAFETENSORS |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BF16": "bfloat16"}
_CHUNK = 2**20  # bytes of a .npz's member that are read at a time


class _Layout(NamedTuple):
    """Holds the shape, type and memory order of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]

    @property
    def nbytes(self) -> int:
        """The bytes of the numbers, as a Python integer, which a huge damaged shape cannot wrap."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: Path, sole: str) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by name; the single array of a .npy gets the name `sole`.

    Arrays of a .npy, of a .safetensors and of a .npz that is not compressed stay on disk until they
    are used. A .npz has checksums, and is read once here to compare them. The others have none, so
    damage is seen only if sizes disagree.

    Raises:
      InputError: there is no such file, its format is unknown, or it is damaged.
    """
    readers = {".npz": _read_npz, ".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise InputError("file", str(path), f"its name must end in {', '.join(readers)}")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could wait forever
            raise InputError("file", str(path), "it is not a file")
        # A header that is barely valid Python gives warnings; it is either read or refused below.
        with warnings.catch_warnings(action="ignore"):
            return readers[path.suffix](path, sole)
    except InputError:
        raise
    except OSError as error:
        raise InputError("file", str(path), error.strerror or str(error)) from error
    # Damage may raise an error of any library: zlib's, tokenize's, RecursionError, MemoryError,
    # RuntimeError, ...
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError("file", str(path), f"it cannot be read: {reason[:200]}") from error


def _read_npy(path: Path, sole: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        layout = _read_header(file, os.fstat(file.fileno()).st_size)
        return {sole: _map(path, file.tell(), layout)}


def _read_npz(path: Path, _: str) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        return {
            member.filename.removesuffix(".npy"): _read_member(archive, member, raw, path)
            for member in archive.infolist()
        }


def _read_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, raw: io.BufferedIOBase, path: Path
) -> np.ndarray:
    """Reads a member of a .npz to its end, and maps it if it is not compressed.

    zipfile compares the member's checksum at its end.
    """
    if member.comment:
        raise ValueError(
            f"{member.filename} has a comment, which may be members that a flipped bit hides"
        )
    with archive.open(member) as file:
        layout = _read_header(file, member.file_size)
        header_size = file.tell()
        if member.compress_type == zipfile.ZIP_STORED:
            while file.read(_CHUNK):
                pass
    if member.compress_type != zipfile.ZIP_STORED:
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    if member.compress_size != member.file_size:
        raise ValueError(
            f"{member.filename} has {member.compress_size} bytes and says {member.file_size}"
        )
    # The data follow a local header of 30 bytes, which ends with the lengths of two fields between
    # header and data.
    raw.seek(member.header_offset + 26)
    lengths = np.frombuffer(raw.read(4), "<u2")
    return _map(path, raw.tell() + int(lengths.sum()) + header_size, layout)


def _read_header(file: IO[bytes] | io.BufferedIOBase, size: int) -> _Layout:
    """Reads the header of a .npy of `size` bytes, and checks that its array fills the rest."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its header is of version {version}, which numbers do not need")
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(file)
    layout = _Layout(shape, dtype, "F" if fortran else "C")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if min(shape, default=0) < 0 or layout.nbytes != size - file.tell():
        raise ValueError(
            f"an array of shape {shape} and type {dtype} does not fill {size - file.tell()} bytes"
        )
    return layout


def _read_safetensors(path: Path, _: str) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    # safe_open refuses tensors that overlap, leave gaps or do not fill the file, so offsets follow
    # from sizes.
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        described = {
            name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
        }
    with open(path, "rb") as raw:
        offset = 8 + int.from_bytes(raw.read(8), "little")
    arrays = {}
    for name, (dtype, shape) in described.items():
        if dtype not in _SAFETENSORS:
            raise ValueError(f"{name} is of type {dtype}")
        layout = _Layout(shape, _dtype(_SAFETENSORS[dtype]), "C")
        arrays[name] = _map(path, offset, layout)
        offset += layout.nbytes
    return arrays


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # JAX installs it; NumPy has no such type

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _map(path: Path, offset: int, layout: _Layout) -> np.ndarray:
    if not layout.nbytes:
        return np.empty(layout.shape, layout.dtype)
    # The shape () would map the rest of the file.
    array = np.memmap(path, layout.dtype, "r", offset, layout.shape or (1,), layout.order)
    return array if layout.shape else array.reshape(())
