"""Files of features, labels, logits and heads, memory-mapped wherever their format lets them be."""

import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ncjax.errors import InputError

FORMATS = (".npz", ".npy", ".safetensors")
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
_SAFETENSORS |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BF16": "bfloat16"}


def read(path: Path, sole: str) -> dict[str, np.ndarray]:
    """The arrays of a file by name; a .npy holds one alone, of the name `sole`.

    Arrays of a .npy, of a .safetensors and of a .npz that is not compressed stay on disk until they are used.

    Raises:
      InputError: no such file, not of a known format, or damaged.
    """
    readers = {".npy": lambda: {sole: np.load(path, mmap_mode="r")}, ".npz": lambda: _npz(path)}
    readers[".safetensors"] = lambda: _safetensors(path)
    if path.suffix not in readers:
        raise InputError("file", str(path), f"its name must end in {', '.join(FORMATS)}")
    try:
        return readers[path.suffix]()
    except InputError:
        raise
    except OSError as error:
        raise InputError("file", str(path), error.strerror or str(error)) from error
    except (ValueError, KeyError, EOFError, TypeError, struct.error, zipfile.BadZipFile) as error:
        raise InputError("file", str(path), f"it cannot be read: {error or 'it is empty'}") from error


def _npz(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                with archive.open(member) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                continue
            # The local header before the data: 30 bytes, at whose end stand the lengths of two fields that follow.
            raw.seek(member.header_offset + 26)
            raw.seek(sum(struct.unpack("<HH", raw.read(4))), 1)
            version = np.lib.format.read_magic(raw)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(raw)
            arrays[name] = _mapped(path, raw.tell(), shape, dtype, "F" if fortran else "C")
    return arrays


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        begin, end = entry["data_offsets"]
        dtype, shape = _dtype(_SAFETENSORS[entry["dtype"]]), tuple(entry["shape"])
        if end - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name} has {end - begin} bytes and shape {shape}")
        arrays[name] = _mapped(path, 8 + length + begin, shape, dtype, "C")
    return arrays


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # JAX's own, where NumPy has no such type

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, order: Any) -> np.ndarray:
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    # An empty tuple would map the rest of the file.
    array = np.memmap(path, dtype, "r", offset, shape or (1,), order)
    return array if shape else array.reshape(())
