"""Reads files of features, labels, logits and heads, and finds these in them by name.

Arrays are memory-mapped wherever the format lets them be.
"""

import importlib
import io
import math
import os
import pickle
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from ncjax.errors import InputError, near
from ncjax.features.labels import as_labels
from ncjax.features.tensors import on_host

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
# Formats of columns with names, of which all but the labels are features.
TABLES = (".csv", ".parquet")
# Names of labels, in the order of preference.
_LABELS = ("labels", "label", "target", "class", "y")
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
    are used; the others are read whole. A .npz has checksums, and is read once here to compare
    them. A .npy and a .safetensors have none, so damage is seen only if sizes disagree.

    Of .pt and .pth only tensors are read, never objects, which would be code to run.

    Raises:
      InputError: there is no such file, its format is unknown, or it is damaged.
    """
    readers = {
        ".npz": _read_npz,
        ".npy": _read_npy,
        ".safetensors": _read_safetensors,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".h5": _read_hdf5,
        ".hdf5": _read_hdf5,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
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
        way_out = f"it cannot be read: {reason[:200]}; save it anew"
        raise InputError("file", str(path), way_out) from error


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


def _read_torch(path: Path, sole: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a file of `torch.save`; those in dicts and lists have dotted names."""
    torch = _optional("torch", path, "torch")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        way_out = (
            "it holds objects, which are code to run, or is damaged; save tensors alone, as "
            "model.state_dict() or {'features': h, 'labels': y}"
        )
        raise InputError("file", str(path), way_out) from error
    except (RuntimeError, EOFError) as error:  # in several sentences, of its reader of zip files
        raise ValueError("it is cut short, or damaged") from error
    found: dict[str, np.ndarray] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            found[name or sole] = on_host(value)
        parts = value.items() if isinstance(value, Mapping) else ()
        for key, part in enumerate(value) if isinstance(value, list | tuple) else parts:
            collect(f"{name}.{key}" if name else str(key), part)

    collect("", loaded)
    return found


def _read_hdf5(path: Path, _: str) -> dict[str, np.ndarray]:
    """Reads the arrays of an HDF5 file; those in groups have names with slashes."""
    h5py = _optional("h5py", path, "ncjax[hdf5]")
    found: dict[str, np.ndarray] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(collect)
    return found


def _read_parquet(path: Path, _: str) -> dict[str, np.ndarray]:
    """Reads the columns of a table; one of lists of equal lengths has two axes."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(path)
    found = {}
    for name, chunks in zip(table.column_names, table.columns, strict=True):
        if name.startswith("__index_level_"):
            way_out = f"column {name} is an index of pandas; save by to_parquet(index=False)"
            raise InputError("file", str(path), way_out)
        column = chunks.combine_chunks()
        if column.null_count:
            raise ValueError(f"column {name} has missing values")
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if is_list or pa.types.is_fixed_size_list(column.type):
            if len({*column.value_lengths().to_pylist()}) > 1:
                raise ValueError(f"column {name} has rows of different lengths")
            flat = column.flatten().to_numpy(zero_copy_only=False)
            found[name] = flat.reshape(len(column), -1)
        else:
            found[name] = column.to_numpy(zero_copy_only=False)
    return found


def _read_csv(path: Path, _: str) -> dict[str, np.ndarray]:
    """Reads the columns of a table whose first row names them."""
    import pandas as pd

    # pandas makes other names of those that stand twice, as numbers do.
    first = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
    if all(_is_number(name) for name in first):
        way_out = "its first row is numbers, not the names of its columns; put names above them"
        raise InputError("file", str(path), way_out)
    if (first == "").any():
        way_out = "a column has no name, as an index has none; save by to_csv(index=False)"
        raise InputError("file", str(path), way_out)
    table = pd.read_csv(path, float_precision="round_trip")
    return {name: table[name].to_numpy() for name in table.columns}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _optional(module: str, path: Path, needed: str) -> Any:
    """Returns a module that a format needs and ncjax does not; or InputError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        way_out = f"reading it takes pip install '{needed}'; or save it as .safetensors or .npz"
        raise InputError("file", str(path), way_out) from error


# What is in them


class Examples(NamedTuple):
    """Holds features of a file, and their logits; None where it lacks these."""

    features: np.ndarray
    logits: np.ndarray | None


def find_examples(
    path: Path, arrays: dict[str, np.ndarray], features_key: str | None, labels_key: str | None
) -> Examples:
    """Returns features and logits of a file's arrays.

    Of a table without an array of features all columns but the labels are features.

    Raises:
      InputError: no array has the name; it lists those that there are.
    """
    label_name = _find_label_name(path, arrays, labels_key)
    name = features_key or "features"
    if name in arrays:
        features = arrays[name]
    elif features_key is None and path.suffix in TABLES:
        features = _stacked(path, arrays, label_name)
    else:
        way_out = f"no array is named {name}{near(name, arrays)}; --features-key NAME names one"
        raise InputError(str(path), described(arrays), way_out)
    if features.ndim < 2 or 0 in features.shape[1:]:
        shown = f"{name} of shape {features.shape}"
        raise InputError(str(path), shown, "give N x p, a row per example")
    logits = arrays.get("logits")
    if logits is not None and (logits.ndim != 2 or not logits.shape[1]):
        raise InputError(str(path), f"logits of shape {logits.shape}", "give N x C")
    return Examples(features, logits)


def find_labels(
    path: Path, arrays: dict[str, np.ndarray], labels_key: str | None
) -> np.ndarray | None:
    """Returns the labels among a file's arrays, (N,) integers; None where none has their name.

    Raises:
      InputError: no array has the name asked for, or what has it are no labels.
    """
    name = _find_label_name(path, arrays, labels_key)
    if name is None:
        return None
    if arrays[name].ndim not in (1, 2):
        raise InputError(str(path), f"{name} of shape {arrays[name].shape}", "give N")
    return as_labels(arrays[name], f"{'column ' * (path.suffix in TABLES)}{name} of {path}")


def _find_label_name(
    path: Path, arrays: dict[str, np.ndarray], labels_key: str | None
) -> str | None:
    if labels_key is not None and labels_key not in arrays:
        way_out = f"no array is named {labels_key}{near(labels_key, arrays)}"
        raise InputError(str(path), described(arrays), way_out)
    return labels_key or next((name for name in _LABELS if name in arrays), None)


def _stacked(path: Path, columns: dict[str, np.ndarray], labels: str | None) -> np.ndarray:
    kept = {name: column for name, column in columns.items() if name != labels}
    for name, column in kept.items():
        if column.dtype.kind not in "iuf" or column.ndim != 1:
            shown = f"column {name} of {column.dtype}"
            way_out = "features are numbers; leave it out, or is it --labels-key?"
            raise InputError(str(path), shown, way_out)
    if not kept:
        raise InputError(str(path), "no column", "give the features, a column each")
    return np.column_stack(list(kept.values()))


def find_head(
    path: Path, arrays: dict[str, np.ndarray], prefix: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns weight (C, p) and bias (C,) or None of a head among a file's arrays.

    They are `head_kernel` and `head_bias`, or PyTorch's `weight` and `bias`; with a prefix those
    of this module of a state_dict.

    Raises:
      InputError: there is none, or there are several; it lists what may be meant.
    """
    if prefix is not None:
        ends = {name: name.endswith(f".{prefix}.weight") for name in arrays}
        names = [name for name in arrays if ends[name] or name == f"{prefix}.weight"]
        if len(names) != 1:
            found = "several modules have" if names else "no module has"
            raise InputError("--head-prefix", prefix, f"{found} this name; {_modules(arrays)}")
        kernel, bias = names[0], f"{names[0].removesuffix('weight')}bias"
    else:
        pairs = (("head_kernel", "head_bias"), ("weight", "bias"))
        kernel, bias = next((pair for pair in pairs if pair[0] in arrays), ("", ""))
    if not kernel:
        way_out = f"it has no head_kernel and no weight; {_modules(arrays)}"
        raise InputError("--head", str(path), way_out)
    for name, axes in ((kernel, "C x p"), (bias, "C")):
        shape = arrays[name].shape if name in arrays else (1,) * (1 + axes.count("x"))
        if len(shape) != 1 + axes.count("x") or 0 in shape:
            raise InputError(str(path), f"{name} of shape {shape}", f"give {axes}")
    return arrays[kernel], arrays.get(bias)


def _modules(arrays: dict[str, np.ndarray]) -> str:
    """Returns the last modules of a state_dict that may be heads, or the names of the arrays."""
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    heads = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    if heads:
        return f"--head-prefix {' or '.join(heads[-3:])}?"
    return f"it has {described(arrays)}"


def described(arrays: dict[str, np.ndarray]) -> str:
    """Returns the names and shapes of a few arrays."""
    shown = [f"{name} {array.shape}" for name, array in list(arrays.items())[:6]]
    return ", ".join(shown + ["..."] * (len(arrays) > 6)) or "no array"
