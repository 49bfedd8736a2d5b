"""Computes class means, and the scatter about them, in two passes over batches of examples.

    sums = first_pass(batches, num_classes)
    reference = prepare(sums, head=W)
    deviations = second_pass(batches, reference)
    found = find(reference, deviations)

Each pass iterates over `batches` once. A batch is (features (B, p), labels (B,)) or (features,
labels, logits (B, C)), of NumPy, JAX or DLPack (PyTorch) arrays. Large batches are cut into chunks,
which go to the devices in turn, and each device keeps its own statistics. `merge` adds up
statistics of the same pass from devices, or from processes that saw other examples.

Accuracy: the first pass sums h - pivot_c in float64, where the pivot is an example of the class.
The second pass subtracts class means in two parts, high + low, before it squares. A common offset
of all features costs no digits. Memory: O(C p) and a chunk, whatever the number of examples.
"""

import collections
import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ncjax import environment
from ncjax.errors import InputError, last_line
from ncjax.features.labels import as_labels
from ncjax.features.pooling import Pool, pooled
from ncjax.features.statistics import (
    LEAST_BLOCK,
    Deviations,
    Frames,
    Rows,
    Sums,
    add_deviations,
    add_sums,
    adopt,
    merge,
)

# The most feature entries of a chunk: 16 MiB in float32 if they are copied, 64 MiB if they are read
# in place.
_COPIED, _IN_PLACE = 2**22, 2**24
# The most chunks that wait for one device; the next one is copied while the last is processed.
_IN_FLIGHT = 2
_ALIGNMENT = 64  # bytes; XLA reads memory in place only with this alignment
# Peak bytes per class and feature: sums, means, frames and their copies.
_BYTES = 48
_MOST_CLASSES = 2**31 - 2  # labels are int32 on the devices

# The advice of errors when the second pass sees other examples than the first.
SAME_EXAMPLES = (
    "both passes must see the same examples: switch off random augmentation and dropout "
    "(model.eval()), and shuffling "
    "that drops a last batch, or collect the batches in a list"
)

Statistics = TypeVar("Statistics", Sums, Deviations)
Device = Any  # jax.Device, which type checkers take for a variable


def first_pass(
    batches: Iterable,
    num_classes: int,
    *,
    float64: bool | None = None,
    rows: int | None = None,
    devices: Sequence[Device] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Sums:
    """Counts examples and sums their features by class.

    Args:
      num_classes: C; labels are 0 to C - 1.
      float64: whether to compute in float64; None: only if float32 cannot hold all values of the
        type of the features or logits.
      rows: the most rows of a chunk; None: as many as 16 MiB hold, or 64 MiB if they can be read in
        place.
      devices: the devices that share the work; None: all devices of this process.
      progress: a function that is called with the number of examples of every chunk.

    Raises:
      InputError: an array has a wrong shape or type, a label is out of range, features are not
        finite, there is no example, or there are more classes than fit into memory.
    """
    num_classes = check_num_classes("num_classes", num_classes)

    def start(chunk: _Chunk) -> Sums:
        dim = chunk.dim
        dtype = np.float64 if chunk.float64 else np.float32
        given.add(np.dtype(chunk.features.numbers.dtype).itemsize)
        logits = None if chunk.logits is None else np.zeros((num_classes, num_classes))
        return Sums(
            np.zeros(num_classes),
            np.zeros((num_classes, dim), dtype),
            np.zeros((num_classes, dim)),
            logits,
        )

    given: set[int] = set()  # bytes of a feature
    # The pivots that each device has. C is padding, which needs none.
    seen = collections.defaultdict(lambda: np.arange(num_classes + 1) == num_classes)

    def step(sums: Sums, chunk: _Chunk, device: Device) -> tuple[Sums, Array]:
        met = seen[device]
        if not met.all():
            first = np.full(num_classes + 1, -1)
            first[chunk.labels[::-1]] = np.arange(len(chunk.labels))[
                ::-1
            ]  # repeated labels keep the last value, which is their first row
            labels = np.flatnonzero((first >= 0) & ~met)
            met[labels] = True
            # Each length is compiled, so it is padded to a power of two to have few of them.
            padding = (0, (1 << (len(labels) - 1).bit_length()) - len(labels))
            index, labels = (
                np.pad(first[labels], padding),
                np.pad(labels, padding, constant_values=num_classes),
            )
            sums = sums._replace(pivots=adopt(sums.pivots, chunk.features, index, labels))
        return add_sums(sums, *chunk[:3], _counts(chunk.labels, num_classes))

    parts = _run(batches, num_classes, start, step, float64, rows, devices, progress)
    if not parts:
        raise InputError(
            "batches", "no example", "give at least one batch with at least one example"
        )
    sums = merge(*parts)
    for name, values in (("features", sums.features), ("logits", sums.logits)):
        if values is not None and not np.isfinite(values).all():
            label, column = np.argwhere(~np.isfinite(values))[0]
            what = (
                f"a number that is not finite, or too large to be added up in {sums.pivots.dtype}"
            )
            raise InputError(name, what, f"look at class {label}, column {column}")
    _check_size(sums, np.float64 if min(given) == sums.pivots.dtype.itemsize == 8 else np.float32)
    return sums


def _check_size(sums: Sums, dtype: Any) -> None:
    """Refuses features so small that a millionth of their differences is subnormal, 0 to XLA."""
    present, info = np.flatnonzero(sums.examples), np.finfo(dtype)
    least = 1e6 * float(info.tiny / info.eps)
    pivots = sums.pivots if len(present) == len(sums.pivots) else sums.pivots[present]
    with np.errstate(over="ignore"):
        size = float((pivots.max(0) - pivots.min(0)).max())
    if size < least:
        size = max(size, float(np.abs(sums.features[present] / sums.examples[present, None]).max()))
    if 0 < size < least:
        raise InputError(
            "features",
            f"of size {size:.1g}",
            "their differences underflow; multiply by a power of two",
        )


def second_pass(
    batches: Iterable,
    reference: Any,
    *,
    rows: int | None = None,
    devices: Sequence[Device] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Deviations:
    """Sums squares and products of deviations from the class means of a reference.

    The batches may come in another order than in the first pass. They may also be a part of them,
    whose statistics `merge` adds to those of the others.

    Args:
      reference: the result of `reference.prepare`.
      rows, devices, progress: as in `first_pass`.

    Raises:
      InputError: the batches are not what `first_pass` takes, or are other examples than it saw, as
        far as a part of them shows; `measurement.find` compares the whole.
    """
    frames, asked = reference.frames, reference.asked
    num_classes, dim = frames.high.shape
    all_classes = len(reference.examples)
    position = np.full(all_classes + 1, -1, np.int32)
    position[reference.present], position[-1] = np.arange(num_classes), num_classes
    with_logits, with_head = reference.with_logits, frames.head_basis is not None
    linear = with_head and not with_logits and asked.loss == "square"

    def start(chunk: _Chunk) -> Deviations:
        def zeros(wanted: bool, *shape: int) -> np.ndarray | None:
            return np.zeros(shape) if wanted else None

        outputs = frames.nearness is not None
        with_decay = with_head and asked.weight_decay is not None
        head_rank = len(frames.head_basis) if with_head else 0
        rank = head_rank if linear else num_classes
        probed = num_classes, len(frames.probes) + with_logits
        return Deviations(
            *(
                np.zeros(shape)
                for shape in (num_classes, num_classes, len(frames.basis), probed, probed)
            ),
            along_head=zeros(with_head, head_rank),
            correct=zeros(outputs),
            disagreements=zeros(outputs),
            outlying=zeros(frames.reach is not None),
            residuals=zeros(outputs and not linear),
            residual_sums=zeros(
                outputs and asked.loss == "cross_entropy", num_classes, num_classes
            ),
            covariance=zeros(with_decay, rank, dim),
            head_covariance=zeros(with_decay and not linear, head_rank, dim),
        )

    held: dict[Device, Frames] = {}

    def step(sums: Deviations, chunk: _Chunk, device: Device) -> tuple[Deviations, Array]:
        if device not in held:
            held[device] = jax.device_put(frames, device)
        labels = position[chunk.labels]
        if labels.min() < 0:
            label = int(chunk.labels[labels.argmin()])
            raise InputError(
                "labels", label, f"the first pass saw no example of it; {SAME_EXAMPLES}"
            )
        if with_logits and chunk.logits is None:
            raise InputError("logits", None, f"the first pass saw them; {SAME_EXAMPLES}")
        logits = chunk.logits if with_logits else None
        if logits is not None and num_classes < all_classes:
            logits = logits[:, reference.present]
        counts = _counts(labels, num_classes)
        return add_deviations(
            sums, held[device], chunk.features, labels, logits, counts, linear=linear
        )

    float64 = frames.high.dtype == np.float64
    parts = _run(batches, all_classes, start, step, float64, rows, devices, progress, dim)
    if not parts:
        raise InputError("batches", "no example in the second pass", SAME_EXAMPLES)
    return merge(*parts)


def _counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes + 1)[:num_classes].astype(np.float64)


# Batches and chunks


class _Chunk(NamedTuple):
    """Holds rows of a batch on a device; labels of C are padding, and `size` rows are not."""

    features: Rows
    labels: np.ndarray
    logits: Array | None
    size: int
    dim: int
    float64: bool


def _run(
    batches: Iterable,
    num_classes: int,
    start: Callable[[_Chunk], Statistics],
    step: Callable[[Statistics, _Chunk, Device], tuple[Statistics, Array]],
    float64: bool | None,
    rows: int | None,
    devices: Sequence[Device] | None,
    progress: Callable[[int], Any] | None,
    dim: int | None = None,
) -> list[Statistics]:
    """Deals chunks out to the devices; returns each used device's statistics as NumPy arrays."""
    devices = list(devices or jax.local_devices())
    states: dict[Device, Statistics] = {}
    waiting: collections.deque = collections.deque()
    turn, with_logits, chosen = 0, None, float64
    for batch in _fresh(batches):
        features, labels, logits = check_batch(batch, num_classes, dim)
        dim = int(features.shape[1])
        check_num_classes("num_classes", num_classes, dim)
        if with_logits not in (None, logits is not None):
            raise InputError(
                "logits", "some batches with and some without", "give them with all or with none"
            )
        with_logits = logits is not None
        wide = [
            name
            for name, a in (("features", features), ("logits", logits))
            if a is not None and _is_wide(a)
        ]
        if float64 is None:
            float64 = bool(wide)
        if wide and not float64 and chosen is None:
            found = str((features if wide[0] == "features" else logits).dtype)
            raise InputError(
                wide[0], found, "the first batch's fit into float32; give one type, or float64=True"
            )
        for fresh, length in _cut(features, logits, rows, len(devices)):
            device = devices[turn % len(devices)]
            turn += 1
            with _exactly():
                chunk = _place(
                    features, labels, logits, fresh, length, num_classes, float64, device
                )
                if device not in states:
                    states[device] = jax.device_put(start(chunk), device)
                states[device], token = step(states[device], chunk, device)
            waiting.append(token)
            if len(waiting) > _IN_FLIGHT * len(devices):
                waiting.popleft().block_until_ready()
            if progress is not None:
                progress(chunk.size)
        # The owner of the batch may overwrite its memory from here on, so all reads must be done.
        jax.block_until_ready(tuple(waiting))
        waiting.clear()
    return [jax.tree.map(np.asarray, states.pop(device)) for device in list(states)]


def _cut(features: Any, logits: Any, rows: int | None, devices: int) -> Iterator[tuple[slice, int]]:
    """Yields the rows of each chunk of a batch, and the length that the chunk is padded to.

    A batch larger than one chunk is cut into equal chunks, the same number for each device and at
    least two, so that one can be placed while another is processed.
    """
    size, dim = features.shape
    outputs = 1 if logits is None else logits.shape[1]
    most, begin = rows or max(LEAST_BLOCK, _COPIED // max(dim, outputs)), 0
    parts = 1 if size <= most else 2 * devices
    if size > most >= LEAST_BLOCK and _readable(features):
        most = rows or max(most, min(_IN_PLACE // dim, _COPIED // outputs))
        if features.ctypes.data % _ALIGNMENT:
            # The rows before an aligned address are copied at the end, as a chunk of their own.
            begin = -(-_ALIGNMENT // features[0].nbytes)
    count = parts * max(1, -(-(size - begin) // (parts * most)))
    length = _rounded(max(1, -(-(size - begin) // count)), most)
    for first in range(begin, size, length):
        yield slice(first, min(size, first + length)), length
    if begin:
        yield slice(0, begin), LEAST_BLOCK


def _rounded(rows: int, most: int) -> int:
    """Rounds a number of rows up to one of few that divide into blocks, since each is compiled.

    It is not much greater than `rows`, and not greater than `most`.
    """
    octave = 1 << (rows - 1).bit_length()
    unit = max(1, octave // 16, min(LEAST_BLOCK, octave // 8))
    return min(-(-rows // unit), most // unit) * unit


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Enables float64, and matmuls in full precision.

    It must not surround the iteration over batches, which may run the user's own model.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def _fresh(batches: Iterable) -> Iterator:
    try:
        iterator = iter(batches)
    except TypeError as error:
        way_out = "give a list of batches, a data loader, ..."
        raise InputError("batches", type(batches).__name__, way_out) from error
    if iterator is batches:
        raise InputError(
            "batches",
            type(batches).__name__,
            "it can be read once only; give a list, a data loader, ...",
        )
    return iterator


def check_batch(
    batch: Any, num_classes: int, dim: int | None = None
) -> tuple[Any, np.ndarray, Any]:
    """Returns a batch as NumPy or JAX arrays (features, labels, logits or None).

    Raises:
      InputError: it is no batch of examples of these classes with `dim` features.
    """
    parts = as_parts(batch)
    features = pooled(as_array("features", parts[0]), pool=None)
    labels = label_array(parts[1])
    logits = as_array("logits", parts[2]) if len(parts) == 3 else None
    if (
        features.ndim != 2
        or 0 in features.shape[1:]
        or (dim or features.shape[1]) != features.shape[1]
    ):
        raise InputError("features", features.shape, f"give (B, {dim or 'p'}), a row per example")
    if labels.shape != features.shape[:1]:
        raise InputError(
            "labels", labels.shape, f"give one per row of features, ({len(features)},)"
        )
    if logits is not None and (logits.ndim != 2 or len(logits) != len(features)):
        raise InputError("logits", logits.shape, f"give ({len(features)}, C), a row per example")
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        if labels.min() < 0:
            least = int(labels.min())
            way_out = f"they count classes from 0 on; ignore_label={least} leaves such examples out"
            raise InputError("labels", least, way_out)
        most = int(labels.max())
        way_out = f"with {num_classes} classes they are 0 to {num_classes - 1}"
        way_out += "; subtract 1 if they count from 1 on" if most == num_classes else ""
        raise InputError("labels", most, way_out)
    if logits is not None and logits.shape != (len(features), num_classes):
        raise InputError(
            "logits", logits.shape, f"give ({len(features)}, {num_classes}), a row per example"
        )
    return features, labels, logits


def as_parts(batch: Any) -> Sequence[Any]:
    """Returns (features, labels) or (features, labels, logits) of a batch, which may be a mapping
    with these names.
    """
    if isinstance(batch, Mapping) and {"features", "labels"} <= batch.keys():
        return [batch[name] for name in ("features", "labels", "logits") if name in batch]
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        return batch
    found = f"a mapping of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else None
    way_out = (
        "each must be (features, labels) or (features, labels, logits), or a mapping with these "
        "names; `measure` takes the arrays themselves"
    )
    raise InputError("batch", found or type(batch).__name__, way_out)


class Cleaned:
    """Batches whose features are pooled, and which have lost the examples to be left out."""

    def __init__(self, batches: Iterable, pool: Pool, ignore_label: int | None):
        self._batches, self._pool, self._ignored = batches, pool, ignore_label

    def __iter__(self) -> Iterator[tuple]:
        for batch in _fresh(self._batches):
            parts = as_parts(batch)
            features = pooled(as_array("features", parts[0]), self._pool)
            labels = label_array(parts[1])
            rest = [as_array("logits", logits) for logits in parts[2:]]
            if self._ignored is not None and len(features) == len(labels):
                kept = labels != self._ignored
                if not kept.all():
                    features, labels, *rest = (a[kept] for a in (features, labels, *rest))
            yield features, labels, *rest


def check_num_classes(name: str, num_classes: Any, dim: int = 1) -> int:
    """Returns a checked number of classes.

    Raises:
      InputError: it is no such number, or sums of `dim` features per class exceed this machine's
        memory.
    """
    try:
        number = operator.index(num_classes)
    except TypeError:
        number = 0
    if number < 1 or isinstance(num_classes, bool):
        raise InputError(name, num_classes, "give an integer from 1 on")
    needed, memory = _BYTES * number * dim, environment.physical_memory()
    if number > _MOST_CLASSES or needed > memory:
        way_out = (
            f"sums of {dim} features of so many take {needed / 1e9:.3g} GB, and there are "
            f"{memory / 1e9:.3g}"
        )
        raise InputError(name, num_classes, f"{way_out}; number the classes from 0 on without gaps")
    return number


def _is_wide(array: Any) -> bool:
    """Returns whether an array's type (float64, int32, ...) has values that float32 cannot hold."""
    return array.dtype.itemsize > {"f": 4, "i": 2, "u": 2}.get(array.dtype.kind, 2)


_NO_ARRAY = (
    "give an array of numbers: what a model makes of its loader's batches, collected "
    "(docs/measure.md)"
)


_NUMBERS = "give an array of numbers"
# By kind of NumPy's type: what to do with numbers that are none of ours.
_OF_NUMBERS = {
    "c": "they are complex; give real and imaginary parts side by side",
    "b": f"{_NUMBERS}: .astype(np.float32) makes them 0 and 1",
}


def as_array(name: str, value: Any) -> np.ndarray | Array:
    """Returns a NumPy or JAX array of numbers, without a copy if the memory can be read in place.

    Raises:
      InputError: it is no array of numbers, some are masked, or some are integers that float64
        cannot hold.
    """
    value = _converted(name, value)
    if value.dtype.kind not in "iuf" and value.dtype != jnp.bfloat16:
        raise InputError(name, str(value.dtype), _OF_NUMBERS.get(value.dtype.kind, _NUMBERS))
    if value.dtype.kind in "iu" and value.dtype.itemsize == 8 and value.size:
        largest = max(int(value.max()), -int(value.min()))
        if largest > 2**53:
            raise InputError(
                name, largest, "float64 holds integers up to 2**53; subtract what is common to all"
            )
    return value


def label_array(value: Any) -> np.ndarray:
    """Returns labels as NumPy's integers, (N,), from any form that `as_labels` reads."""
    if value is None:
        raise InputError("labels", None, "give one for every example, integers from 0 to C - 1")
    return as_labels(np.asarray(_converted("labels", value)))


# Kinds of devices, as DLPack numbers them, whose memory a CPU reads: its own, memory pinned for
# CUDA and ROCm, and memory that CUDA manages.
_ON_HOST = (1, 3, 11, 13)


def _converted(name: str, value: Any) -> np.ndarray | Array:
    """Returns an array of any type that holds `value`, read in place where it can be."""
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise InputError(name, "a masked array", "leave out what is masked, or fill it in")
        return value.data
    if isinstance(value, np.ndarray | jax.Array):
        return value
    if _is_sparse(value):
        raise InputError(name, type(value).__name__, "it is sparse; .toarray() or .to_dense()")
    value = value.detach() if hasattr(value, "detach") else value
    if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] not in _ON_HOST:
        try:
            return jax.dlpack.from_dlpack(value)
        except Exception as error:  # of a device that this process's JAX has not
            way_out = "JAX has no such device here; bring it to the host with .cpu(), or .get()"
            raise InputError(name, f"an array on {value.__dlpack_device__()}", way_out) from error
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        # Of bfloat16, which NumPy has not, or of what DLPack cannot say.
        except (BufferError, RuntimeError, TypeError):
            with contextlib.suppress(Exception):
                return jax.dlpack.from_dlpack(value)
    if hasattr(value, "__array__") or isinstance(value, Sequence | int | float):
        try:
            return np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            way_out = f"no array can be made of it: {last_line(error)}"
            raise InputError(name, type(value).__name__, way_out) from error
    raise InputError(name, type(value).__name__, _NO_ARRAY)


def _is_sparse(value: Any) -> bool:
    """Returns whether an array is SciPy's or PyTorch's kind that leaves out zeros."""
    if type(value).__module__.startswith("scipy.sparse"):
        return True
    return str(getattr(value, "layout", "torch.strided")).startswith("torch.sparse")


def _place(
    features: Any,
    labels: np.ndarray,
    logits: Any,
    fresh: slice,
    length: int,
    num_classes: int,
    float64: bool,
    device: Device,
) -> _Chunk:
    """Puts the rows `fresh` of a batch on a device, with others that fill up to `length`.

    The others are labelled as padding. They are rows before or after, and zeros if the batch is
    shorter than `length`.
    """
    first = max(0, min(fresh.start, len(labels) - length))
    part = slice(first, first + length)
    padded = np.full(length, num_classes, np.int32)
    own = labels[fresh]
    padded[fresh.start - first : fresh.stop - first] = own
    logits = (
        None if logits is None else jax.device_put(_filled(logits[part], length, float64), device)
    )
    view, skipped = _aligned(features, part) if len(labels) >= length else (None, 0)
    if view is None:
        view = _filled(features[part], length, float64).reshape(-1)
    rows = Rows(jax.device_put(view, device, may_alias=True), np.asarray(skipped))
    return _Chunk(rows, padded, logits, len(own), features.shape[1], float64)


_DEVICE_TYPES = ("float16", "float32", "float64", "bfloat16")


def _filled(part: Any, rows: int, float64: bool) -> Any:
    """Pads with rows of zeros, and casts to a type that every device computes with."""
    if str(part.dtype) not in _DEVICE_TYPES or (part.dtype.itemsize > 4 and not float64):
        part = part.astype(np.float64 if float64 else np.float32)
    if len(part) == rows:
        return part
    pad = np.pad if isinstance(part, np.ndarray) else jnp.pad
    return pad(part, ((0, rows - len(part)), (0, 0)))


def _readable(features: Any) -> bool:
    """Returns whether XLA can read an array in place, from an aligned address on."""
    return (
        isinstance(features, np.ndarray)
        and str(features.dtype) in _DEVICE_TYPES
        and features.flags.c_contiguous
        and features.ctypes.data % features.itemsize == 0
    )


def _aligned(features: Any, part: slice) -> tuple[np.ndarray | None, int]:
    """Returns rows of an array as a flat view from an aligned address, and where the rows begin.

    XLA reads the view without a copy. It is None if there is none: the layout or type differs, or
    the rows are at the very beginning of memory that is not aligned.
    """
    if not _readable(features):
        return None, 0
    first = part.start * features.shape[1]
    begin = (features.ctypes.data // features.itemsize + first) % (_ALIGNMENT // features.itemsize)
    return (
        (None, 0)
        if begin > first
        else (features.reshape(-1)[first - begin : part.stop * features.shape[1]], begin)
    )
