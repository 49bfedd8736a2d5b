"""Damaged files: of features, of a WORKDIR, of the decoded-data cache, of TFDS, of compiled
programs.

What a file of features holds is what its format's own library reads of it: `measure` must find the
numbers of that, or refuse; and it must refuse where the library does. Everything else must lead to
the bits of an undamaged run, or to a word.
"""

import functools
import io
import json
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests import chaos
from tests.hostile import engine, oracle, tfds
from tests.hostile.engine import Failure, Ran

Attack = Callable[[Path], None]

# Files of features --------------------------------------------------------------------------------


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = (rng.standard_normal((3, 8))[labels] + 0.3 * rng.standard_normal((60, 8))).astype(
        np.float32
    )
    return {"features": features, "labels": labels.astype(np.int32)}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz(compressed: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **(_arrays() | arrays))
    return buffer.getvalue()


def _safetensors(**arrays: Any) -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(_arrays() | arrays)


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings(action="ignore"):
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode("latin1") + data


def _describe(shape: str = "(60, 8)", descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def _safe_header(header: Any, data: bytes = bytes(2400), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(
    name: str = "features",
    begin: int = 0,
    end: int = 1920,
    shape: Any = (60, 8),
    dtype: Any = "F32",
) -> dict:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


_LABELS = _entry("labels", 1920, 2160, (60,), "I32")


def _encrypted(content: bytes) -> bytes:
    """Sets the bit that says so in every header of a zip file."""
    damaged = bytearray(content)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = damaged.find(signature)
        while at >= 0:
            damaged[at + offset] |= 1
            at = damaged.find(signature, at + 4)
    return bytes(damaged)


def _replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


_FORMATS: dict[str, Callable[[], bytes]] = {
    "stored.npz": _npz,
    "compressed.npz": functools.partial(_npz, True),
    "features.npy": lambda: _npy(_arrays()["features"]),
    "features.safetensors": _safetensors,
}

# Deep nesting breaks parsers that call themselves; huge numbers those that allocate before they
# read.
_DEEP = 100_000
_FEATURE_FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty npz": (".npz", lambda: b""),
    "empty npy": (".npy", lambda: b""),
    "empty safetensors": (".safetensors", lambda: b""),
    "text in npz": (".npz", lambda: b"features,labels\n1,2\n"),
    "html in npy": (".npy", lambda: b"<!doctype html><title>404</title>"),
    "a pickle in npy": (".npy", lambda: b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00]\x94."),
    "npz named npy": (".npy", _npz),
    "npy named npz": (".npz", lambda: _npy(_arrays()["features"])),
    "npz named safetensors": (".safetensors", _npz),
    "zip of nothing": (".npz", lambda: _zip({})),
    "zip of text": (".npz", lambda: _zip({"features.npy": b"text", "labels.npy": b"text"})),
    "zip without .npy": (".npz", lambda: _zip({"features": _npy(_arrays()["features"])})),
    "zip of folders": (".npz", lambda: _zip({"features.npy/": b"", "labels.npy/": b""})),
    "zip with a member twice": (".npz", lambda: _npz() + _npz()),
    "zip with a path for a name": (
        ".npz",
        lambda: _zip({"../features.npy": _npy(_arrays()["features"])}),
    ),
    **{
        f"zip by method {method}": (
            ".npz",
            lambda method=method: _zip({f"{k}.npy": _npy(v) for k, v in _arrays().items()}, method),
        )
        for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    },
    "zip encrypted": (".npz", lambda: _encrypted(_npz())),
    "zip encrypted and compressed": (".npz", lambda: _encrypted(_npz(True))),
    "zip behind other bytes": (".npz", lambda: b"x" * 100 + _npz()),
    "zip before other bytes": (".npz", lambda: _npz() + b"x" * 100),
    "zip of objects": (".npz", lambda: _npz(features=np.array([{}] * 60, object))),
    "zip of strings": (".npz", lambda: _npz(features=np.array([["a"] * 8] * 60))),
    "zip of complex numbers": (".npz", lambda: _npz(features=_arrays()["features"] * 1j)),
    "zip of records": (".npz", lambda: _npz(features=np.zeros(60, [("x", "f4")]))),
    "zip of a number": (".npz", lambda: _npz(features=np.float32(1))),
    "zip of an empty array": (
        ".npz",
        lambda: _npz(features=np.zeros((0, 8), "f4"), labels=np.zeros(0, int)),
    ),
    "labels a number": (".npz", lambda: _npz(labels=np.int64(3))),
    "labels 0-d object": (".npz", lambda: _npz(labels=np.array(None, object))),
    "labels huge": (".npz", lambda: _npz(labels=_arrays()["labels"] + np.uint64(2**63))),
    "labels 10**12": (".npz", lambda: _npz(labels=_arrays()["labels"] * np.int64(10**12))),
    "labels missing": (".npz", lambda: _zip({"features.npy": _npy(_arrays()["features"])})),
    "logits a number": (".npz", lambda: _npz(logits=np.float64(1))),
    "logits objects": (".npz", lambda: _npz(logits=np.array([[None] * 3] * 60))),
    "Fortran order in npz": (
        ".npz",
        lambda: _npz(features=np.asfortranarray(_arrays()["features"])),
    ),
    "big-endian npz": (".npz", lambda: _npz(features=_arrays()["features"].astype(">f4"))),
    "npy header nested": (".npy", lambda: _npy_header("(" * 60_000 + ")" * 5_000)),
    "npy header nested in npz": (
        ".npz",
        lambda: _zip(
            {
                "features.npy": _npy_header("[" * 30_000 + "]" * 30_000),
                "labels.npy": _npy(_arrays()["labels"]),
            }
        ),
    ),
    "npy header of code": (".npy", lambda: _npy_header("__import__('os').abort()\n")),
    "npy header unfinished": (".npy", lambda: _npy_header("{'descr': '<f4', 'shape': (60,\n")),
    "npy header unterminated string": (".npy", lambda: _npy_header("{'descr': '<f4\n")),
    "npy header with a null": (".npy", lambda: _npy_header("{'descr': '\0'}\n")),
    "npy header with a huge number": (".npy", lambda: _npy_header(_describe(f"({'9' * 5000}, 8)"))),
    "npy header longer than the file": (".npy", lambda: _npy_header(_describe())[:30]),
    "npy version 9": (".npy", lambda: _npy_header(_describe(), bytes(1920), 9)),
    "npy shape of 10**15": (
        ".npy",
        lambda: _npy_header(_describe("(1000000000000000, 8)"), bytes(1920)),
    ),
    "npy shape of 10**15 in npz": (
        ".npz",
        lambda: _zip(
            {
                "features.npy": _npy_header(_describe("(10**15, 8)")),
                "labels.npy": _npy(_arrays()["labels"]),
            }
        ),
    ),
    "npy shape of 10**12 compressed": (
        ".npz",
        lambda: _zip(
            {
                "features.npy": _npy_header(_describe("(1000000000000, 8)"), bytes(1920)),
                "labels.npy": _npy(_arrays()["labels"]),
            },
            zipfile.ZIP_DEFLATED,
        ),
    ),
    "npy shape overflows": (
        ".npy",
        lambda: _npy_header(_describe("(4294967296, 4294967296, 4294967296)")),
    ),
    "npy shape negative": (".npy", lambda: _npy_header(_describe("(-60, 8)"), bytes(1920))),
    "npy shape of floats": (".npy", lambda: _npy_header(_describe("(60.0, 8.0)"), bytes(1920))),
    "npy shape of bools": (".npy", lambda: _npy_header(_describe("(True, True)"), bytes(1920))),
    "npy shape a number": (".npy", lambda: _npy_header(_describe("60"), bytes(1920))),
    "npy dtype unknown": (".npy", lambda: _npy_header(_describe(descr="'<q99'"), bytes(1920))),
    "npy dtype of 10**9 bytes": (
        ".npy",
        lambda: _npy_header(_describe(descr="'V1000000000'"), bytes(1920)),
    ),
    "npy dtype a list": (
        ".npy",
        lambda: _npy_header(_describe(descr="[('x', '<f4')]"), bytes(1920)),
    ),
    "npy dtype of dates": (".npy", lambda: _npy_header(_describe(descr="'<M8[ns]'"), bytes(3840))),
    "npy shorter than its shape in npz": (
        ".npz",
        lambda: _zip(
            {
                "features.npy": _npy(_arrays()["features"])[:-400],
                "labels.npy": _npy(_arrays()["labels"]),
            }
        ),
    ),
    "npy longer than its shape in npz": (
        ".npz",
        lambda: _zip(
            {
                "features.npy": _npy(_arrays()["features"]) + bytes(64),
                "labels.npy": _npy(_arrays()["labels"]),
            }
        ),
    ),
    "safetensors header nested": (
        ".safetensors",
        lambda: _safe_header(b"[" * _DEEP + b"]" * _DEEP),
    ),
    "safetensors header nested object": (
        ".safetensors",
        lambda: _safe_header(b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    ),
    "safetensors header a list": (".safetensors", lambda: _safe_header([1, 2])),
    "safetensors header a number": (".safetensors", lambda: _safe_header(3)),
    "safetensors header no JSON": (".safetensors", lambda: _safe_header(b"{features}")),
    "safetensors header no UTF-8": (".safetensors", lambda: _safe_header(b'{"\xff": 1}')),
    "safetensors header of numbers": (
        ".safetensors",
        lambda: _safe_header({"features": 1, "labels": 2}),
    ),
    "safetensors header of lists": (
        ".safetensors",
        lambda: _safe_header({"features": [], "labels": []}),
    ),
    "safetensors header of 2**63": (".safetensors", lambda: _safe_header(_entry(), length=2**63)),
    "safetensors header of 0": (".safetensors", lambda: _safe_header(_entry(), length=0)),
    "safetensors header negative": (
        ".safetensors",
        lambda: _safe_header(_entry(), length=2**64 - 1),
    ),
    "safetensors offsets negative": (
        ".safetensors",
        lambda: _safe_header(_entry(begin=-1920, end=0) | _LABELS),
    ),
    "safetensors offsets overlap": (
        ".safetensors",
        lambda: _safe_header(_entry("features", 200, 2120) | _LABELS),
    ),
    "safetensors offsets swapped": (
        ".safetensors",
        lambda: _safe_header(_entry(begin=1920, end=0) | _LABELS),
    ),
    "safetensors offsets beyond": (
        ".safetensors",
        lambda: _safe_header(_entry(begin=10**6, end=10**6 + 1920) | _LABELS),
    ),
    "safetensors offsets with a hole": (
        ".safetensors",
        lambda: _safe_header(_entry() | _entry("labels", 2160, 2400, (60,), "I32")),
    ),
    "safetensors offsets of floats": (
        ".safetensors",
        lambda: _safe_header(_entry(begin=0.0, end=1920.0) | _LABELS),
    ),
    "safetensors offsets one": (
        ".safetensors",
        lambda: _safe_header(
            {"features": {"dtype": "F32", "shape": [60, 8], "data_offsets": [0]}} | _LABELS
        ),
    ),
    "safetensors shape negative": (
        ".safetensors",
        lambda: _safe_header(_entry(shape=[-60, -8]) | _LABELS),
    ),
    "safetensors shape huge": (
        ".safetensors",
        lambda: _safe_header(_entry(shape=[10**30, 8]) | _LABELS),
    ),
    "safetensors shape overflows": (
        ".safetensors",
        lambda: _safe_header(_entry(shape=[2**32, 2**32]) | _LABELS),
    ),
    "safetensors shape of floats": (
        ".safetensors",
        lambda: _safe_header(_entry(shape=[60.0, 8.0]) | _LABELS),
    ),
    "safetensors shape of strings": (
        ".safetensors",
        lambda: _safe_header(_entry(shape=["60", "8"]) | _LABELS),
    ),
    "safetensors shape a number": (
        ".safetensors",
        lambda: _safe_header(_entry(shape=480) | _LABELS),
    ),
    "safetensors shape null": (".safetensors", lambda: _safe_header(_entry(shape=None) | _LABELS)),
    "safetensors dtype unknown": (
        ".safetensors",
        lambda: _safe_header(_entry(dtype="F99") | _LABELS),
    ),
    "safetensors dtype a list": (
        ".safetensors",
        lambda: _safe_header(_entry(dtype=["F32"]) | _LABELS),
    ),
    "safetensors dtype F8": (
        ".safetensors",
        lambda: _safe_header(_entry(dtype="F8_E4M3", end=480) | _LABELS),
    ),
    "safetensors name twice": (
        ".safetensors",
        lambda: _safe_header(
            _replaced(
                json.dumps(_entry() | _entry("features2")).encode(), b"features2", b"features"
            )
        ),
    ),
    "safetensors metadata a list": (
        ".safetensors",
        lambda: _safe_header({"__metadata__": [1]} | _entry() | _LABELS),
    ),
    "safetensors with more data": (".safetensors", lambda: _safetensors() + bytes(100)),
}


def _read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays as the format's own library reads them; raises where it does not."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    if path.suffix == ".npy":
        return {"features": np.load(path)}
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


def _expected(path: Path) -> dict[str, Any] | None:
    """Returns the numbers of a file; None where it can or need not be measured."""
    try:
        with warnings.catch_warnings(action="ignore"):
            arrays = {"labels": _arrays()["labels"]} | _read(path)
            features, labels = arrays["features"], arrays["labels"]
            if (
                labels.dtype.kind not in "iu"
                or labels.shape != features.shape[:1]
                or features.ndim != 2
            ):
                return None
            if labels.min() < 0 or not np.isfinite(features).all():
                return None
            return oracle.expected(features, labels)
    except Exception:  # NumPy, zipfile and safetensors raise what comes to hand
        return None


def _measure_file(folder: Path, suffix: str, content: bytes) -> None:
    path = folder / f"file{suffix}"
    path.write_bytes(content)
    np.save(folder / "labels.npy", _arrays()["labels"])
    labels = ("--labels", folder / "labels.npy") if suffix == ".npy" else ()
    right = _expected(path) or oracle.expected(**_arrays())  # or what it held before

    def compare(ran: Ran) -> None:
        found = json.loads(ran.out)
        lines = oracle.wrong(found["metrics"], right, 1e-4, found["examples"])
        if lines and not found["notes"]:
            raise Failure("silent", f"{'; '.join(lines)}: {ran}")

    engine.check(engine.run_here("measure", path, *labels, "--json"), compare)


def _drawn(content: bytes, rng: random.Random, kind: str) -> bytes:
    damaged = bytearray(content)
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "zeros":
        begin = rng.randrange(len(content))
        damaged[begin : begin + 64] = bytes(len(damaged[begin : begin + 64]))
    elif kind == "noise":
        begin = rng.randrange(len(content))
        damaged[begin : begin + 16] = rng.randbytes(len(damaged[begin : begin + 16]))
    else:
        # Half of the bits in the first 200 bytes: headers.
        most = 8 * (len(content) if rng.random() < 0.5 else min(200, len(content)))
        bit = rng.randrange(most)
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def _damage_file(name: str, make: Callable[[], bytes], kind: str, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    _measure_file(folder, Path(name).suffix, _drawn(make(), rng, kind))


def _no_file(kind: str, folder: Path) -> None:
    path = folder / "file.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "null device":
        path.symlink_to("/dev/null")
    elif kind == "endless device":
        path.symlink_to("/dev/zero")
    for arguments in (
        [path],
        [engine.ROOT / "tests/data/features.npz", "--head", path],
        [path, "--labels", path],
    ):
        engine.check(engine.run_here("measure", *arguments, "--json"), works=False)


# Files of a WORKDIR -------------------------------------------------------------------------------

_CONFIG = "config.json"
_WRONG_JSON: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a number": b"3",
    "NaN": b"NaN",
    "a string": b'"config"',
    "a list": b"[]",
    "an empty object": b"{}",
    "nested lists": b"[" * _DEEP + b"]" * _DEEP,
    "nested objects": b'{"train":' * _DEEP + b"1" + b"}" * _DEEP,
    "sections of numbers": b'{"train": 1, "model": 2, "data": 3, "sweep": 4}',
    "sections of lists": b'{"train": [], "model": [], "data": [], "sweep": []}',
    "no UTF-8": b"\xff\xfe{}",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "a huge number": b'{"train": {"epochs": ' + b"9" * 5000 + b"}}",
    "a null byte": b'{"train": {"epochs": 6\0}}',
    "noise": random.Random(0).randbytes(300),
}
_WRONG_FILES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "a dead link": lambda path: (path.unlink(), path.symlink_to(path.with_name("nowhere"))),
    "the null device": lambda path: (path.unlink(), path.symlink_to("/dev/null")),
}


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _json_changed(*keys: str, value: Any) -> Callable[[Path], object]:
    """Puts `value` deep into a JSON file."""

    def change(path: Path) -> None:
        whole = json.loads(path.read_text())
        *upper, last = keys
        functools.reduce(lambda part, key: part[key], upper, whole)[last] = value
        path.write_text(json.dumps(whole))

    return change


def _history_without_seal(change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """Another history of the same name and no checksum beside it: all that is known of it is
    what it says.
    """

    def rewrite(path: Path) -> None:
        import xarray as xr

        with xr.open_dataset(path) as opened:
            recorded = opened.load()
        change(recorded).to_netcdf(path, engine="scipy")
        path.with_name("history.nc.sha256").unlink()

    return rewrite


_WORKDIR_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"{_CONFIG}: {what}": (_CONFIG, _write(content)) for what, content in _WRONG_JSON.items()},
    **{
        f"{name}: {what}": (name, change)
        for name in (_CONFIG, "history.nc", "metrics.jsonl", "history.nc.sha256")
        for what, change in _WRONG_FILES.items()
    },
    "config.json: epochs a string": (_CONFIG, _json_changed("train", "epochs", value="6")),
    "config.json: epochs null": (_CONFIG, _json_changed("train", "epochs", value=None)),
    "config.json: epochs 1e400": (_CONFIG, _json_changed("train", "epochs", value=10**400)),
    "config.json: seeds objects": (_CONFIG, _json_changed("sweep", "seed", value=[{}, {}])),
    "config.json: seeds nested": (_CONFIG, _json_changed("sweep", "seed", value=[[0], [1]])),
    "config.json: widths a number": (_CONFIG, _json_changed("model", "widths", value=8)),
    "config.json: a field more": (_CONFIG, _json_changed("train", "colour", value="red")),
    "metrics.jsonl: nested": ("metrics.jsonl", _write(b"[" * _DEEP + b"\n")),
    "metrics.jsonl: numbers": ("metrics.jsonl", _write(b"1\n2\n3\n")),
    "metrics.jsonl: no UTF-8": ("metrics.jsonl", _write(b"\xff\xfe\n")),
    "metrics.jsonl: epochs strings": ("metrics.jsonl", _write(b'{"epoch": "0", "metrics": {}}\n')),
    "metrics.jsonl: a line of 1 MB": ("metrics.jsonl", _write(b"x" * 10**6)),
    "history.nc: text": ("history.nc", _write(b"text")),
    "history.nc: HDF5's magic": ("history.nc", _write(b"\x89HDF\r\n\x1a\n" + bytes(200))),
    "history.nc: netCDF of nothing": ("history.nc", _write(b"CDF\x01" + bytes(28))),
    "history.nc: netCDF of a huge list": ("history.nc", _write(b"CDF\x01" + b"\xff" * 60)),
    "history.nc: without its config": (
        "history.nc",
        _history_without_seal(
            lambda h: h.assign_attrs({k: v for k, v in h.attrs.items() if k != "config"})
        ),
    ),
    "history.nc: config no JSON": (
        "history.nc",
        _history_without_seal(lambda h: h.assign_attrs(config="{")),
    ),
    "history.nc: without nc1": ("history.nc", _history_without_seal(lambda h: h.drop_vars("nc1"))),
    "history.nc: without epochs": (
        "history.nc",
        _history_without_seal(lambda h: h.isel(epoch=slice(0))),
    ),
    "history.nc: epochs floats": (
        "history.nc",
        _history_without_seal(lambda h: h.assign_coords(epoch=h.epoch + 0.5)),
    ),
    "history.nc: one seed": ("history.nc", _history_without_seal(lambda h: h.isel(seed=[0]))),
    "history.nc: no seed": ("history.nc", _history_without_seal(lambda h: h.isel(seed=0))),
    "history.nc.sha256: text": ("history.nc.sha256", _write(b"text")),
    "history.nc.sha256: no UTF-8": ("history.nc.sha256", _write(b"\xff" * 64)),
    "history.nc.sha256: empty": ("history.nc.sha256", _write(b"")),
}


def _facts(workdir: Path) -> Path:
    """The file of the newest checkpoint that says what it is of."""
    newest = max(
        (workdir / "checkpoints").iterdir(),
        key=lambda folder: int(folder.name) if folder.name.isdigit() else -1,
    )
    return next(
        path
        for path in sorted(newest.rglob("*"))
        if path.is_file() and b"crc32" in path.read_bytes()
    )


def _damage_workdir(name: str, change: Callable[[Path], object], folder: Path) -> None:
    for kind, original in (("finished", engine.trained()), ("unfinished", engine.unfinished())):
        workdir = shutil.copytree(original, folder / kind)
        change(_facts(workdir) if name == "facts" else workdir / name)
        for command, *flags in (
            (("show",), ("plot",)) if kind == "finished" else (("show", "--json"),)
        ):
            engine.check(engine.run_here(command, workdir, *flags))
        ran = engine.run_here("train", *chaos.SMALL, f"--workdir={workdir}")
        if ran.code == 1 and ran.err.startswith("error: ") and "Traceback" not in ran.err:
            continue  # it cannot be written: a folder stands in the way
        engine.check(ran, functools.partial(engine.check_same, workdir, engine.reference()))


_FACTS: dict[str, Callable[[Path], object]] = {
    **{what: _write(content) for what, content in _WRONG_JSON.items()},
    **{what: change for what, change in _WRONG_FILES.items() if what != "missing"},
}

# Decoded data -------------------------------------------------------------------------------------

_DIGITS = (
    "--config.data.per_class=20",
    "--config.model.widths=8,8",
    "--config.train.epochs=2",
    "--config.train.batch_size=50",
    "--config.sweep.weight_decay=1e-3",
)


def _digits(folder: Path) -> None:
    """A cache with digits in it, a finished run and one of one epoch."""
    folder.mkdir()
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    engine.check(
        engine.run_here("train", *_DIGITS, f"--workdir={folder / 'run'}", **cache), refuses=False
    )
    shorter = ("--config.train.epochs=1", "--config.train.schedule_epochs=2")
    engine.check(
        engine.run_here("train", *_DIGITS, *shorter, f"--workdir={folder / 'begun'}", **cache),
        refuses=False,
    )
    again = (*_DIGITS, "--config.train.schedule_epochs=2", f"--workdir={folder / 'grown'}")
    engine.check(engine.run_here("train", *again, **cache), refuses=False)


def _array_changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda path: np.save(path, change(np.load(path).copy()))


def _bit_flipped(at: float) -> Callable[[Path], object]:
    """Flips the lowest bit of the byte at a share of the file."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * len(content))] ^= 1
        path.write_bytes(content)

    return flip


def _in_labels(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array[index] = value
    return array


_CACHED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of an image": ("train_images.npy", _bit_flipped(0.3)),
    "a bit of the last image": ("train_images.npy", _bit_flipped(0.999)),
    "a bit of a label": ("train_labels.npy", _bit_flipped(0.5)),
    "a bit of a header": ("train_images.npy", _bit_flipped(0.0002)),
    "labels cut short": ("train_labels.npy", _array_changed(lambda a: a[:-100])),
    "images cut short": ("train_images.npy", _array_changed(lambda a: a[:-100])),
    "images of another shape": (
        "train_images.npy",
        _array_changed(lambda a: a.reshape(len(a), 4, 16, 1)),
    ),
    "images of another type": ("train_images.npy", _array_changed(lambda a: a.astype(np.float32))),
    "images inverted": ("train_images.npy", _array_changed(lambda a: 255 - a)),
    "labels swapped": ("train_labels.npy", _array_changed(lambda a: a[::-1])),
    "a label of 10": ("train_labels.npy", _array_changed(lambda a: _in_labels(a, 5, 10))),
    "a label of -1": ("train_labels.npy", _array_changed(lambda a: _in_labels(a, 5, -1))),
    "labels floats": ("train_labels.npy", _array_changed(lambda a: a.astype(float))),
    "names too few": ("label_names.json", _write(b'["0", "1", "2"]')),
    "names numbers": ("label_names.json", _write(b"[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]")),
    "names nested": ("label_names.json", _write(b"[" * _DEEP)),
    "names a number": ("label_names.json", _write(b"10")),
    "a file cut": ("train_images.npy", lambda path: path.write_bytes(path.read_bytes()[:5000])),
    "a file empty": ("train_labels.npy", _write(b"")),
    "a file missing": ("train_images.npy", Path.unlink),
    "a folder for a file": ("train_labels.npy", _WRONG_FILES["a folder"]),
    "the whole cache a file": (".", lambda path: (shutil.rmtree(path), path.write_bytes(b""))),
}


def _damage_cache(name: str, change: Callable[[Path], object], folder: Path) -> None:
    sound = engine.shared("digits", _digits)
    cache = shutil.copytree(sound / "cache", folder / "cache")
    decoded = next((cache / "ncjax" / "datasets").iterdir())
    change(decoded / name if name != "." else decoded)
    ran = engine.run_here(
        "train", *_DIGITS, f"--workdir={folder / 'run'}", XDG_CACHE_HOME=str(cache)
    )
    engine.check(
        ran, lambda ran: engine.check_same(folder / "run", chaos.Outcome.of(sound / "run"), ran)
    )
    shutil.rmtree(cache)
    shutil.copytree(sound / "cache", cache)
    change(decoded / name if name != "." else decoded)
    begun = shutil.copytree(sound / "begun", folder / "begun")
    flags = (*_DIGITS, "--config.train.schedule_epochs=2", f"--workdir={begun}")
    ran = engine.run_here("train", *flags, XDG_CACHE_HOME=str(cache))
    engine.check(ran, lambda ran: engine.check_same(begun, chaos.Outcome.of(sound / "grown"), ran))


# TFDS ---------------------------------------------------------------------------------------------

_TINY = (
    "--config.data.name=tiny",
    "--config.model.widths=8,8",
    "--config.train.epochs=2",
    "--config.train.batch_size=10",
    "--config.sweep.weight_decay=1e-3",
)
_INFO, _FEATURES = "dataset_info.json", "features.json"
_LABEL = ("featuresDict", "features", "label")
_SHARD = "tiny-train.array_record-00001-of-00002"

_TFDS_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{
        f"{name}: {what}": (name, _write(content))
        for name in (_INFO, _FEATURES)
        for what, content in _WRONG_JSON.items()
        if what not in ("NaN", "a string", "sections of lists", "a huge number")
    },
    **{
        f"{name}: {what}": (name, change)
        for name in (_INFO, _FEATURES, _SHARD)
        for what, change in _WRONG_FILES.items()
    },
    **{
        f"shard lengths {value!r}": (_INFO, _json_changed("splits", 0, "shardLengths", value=value))
        for value in (
            *(["10", "20"], ["20", "10"], ["15", "15"], ["40", "20"], ["0", "30"], ["-1", "31"]),
            *(["x", "y"],),
            *([], ["30"], ["30", "30", "30"], None, 30, ["9" * 30, "30"]),
        )
    },
    **{
        f"file template {value!r}": (
            _INFO,
            _json_changed("splits", 0, "filepathTemplate", value=value),
        )
        for value in (
            "../../tiny",
            "{NOPE}",
            "",
            "{",
            "/dev/zero",
            "{DATASET}-test.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
    },
    "split of another name": (_INFO, _json_changed("splits", 0, "name", value="training")),
    "a split twice": (_INFO, _json_changed("splits", 1, "name", value="train")),
    "no splits": (_INFO, _json_changed("splits", value=[])),
    "splits an object": (_INFO, _json_changed("splits", value={})),
    "no supervised keys": (_INFO, _json_changed("supervisedKeys", value={})),
    "supervised keys swapped": (
        _INFO,
        _json_changed(
            "supervisedKeys",
            value={"tuple": {"items": [{"featureKey": "label"}, {"featureKey": "image"}]}},
        ),
    ),
    "supervised keys unknown": (
        _INFO,
        _json_changed(
            "supervisedKeys", value={"tuple": {"items": [{"featureKey": "x"}, {"featureKey": "y"}]}}
        ),
    ),
    "supervised keys of three": (
        _INFO,
        _json_changed("supervisedKeys", value={"tuple": {"items": [{"featureKey": "image"}] * 3}}),
    ),
    "another format": (_INFO, _json_changed("fileFormat", value="tfrecord")),
    "an unknown format": (_INFO, _json_changed("fileFormat", value="nonsense")),
    "another name": (_INFO, _json_changed("name", value="other")),
    "another version": (_INFO, _json_changed("version", value="9.9.9")),
    "no version": (_INFO, _json_changed("version", value="x")),
    "a module to import": (_INFO, _json_changed("moduleName", value="hostile_module")),
    **{
        f"{what} class {name}": (_FEATURES, _json_changed(*keys, "pythonClassName", value=name))
        for what, keys in (("the", ()), ("the image's", ("featuresDict", "features", "image")))
        for name in (
            "hostile_module.Class",
            "os.abort",
            "nonsense",
            "",
            "tensorflow_datasets.core.features.Text",
        )
    },
    "image of another shape": (
        _FEATURES,
        _json_changed(
            "featuresDict",
            "features",
            "image",
            "image",
            "shape",
            "dimensions",
            value=["8", "8", "3"],
        ),
    ),
    "image of strings": (
        _FEATURES,
        _json_changed(
            "featuresDict",
            "features",
            "image",
            "image",
            "shape",
            "dimensions",
            value=["x", "y", "z"],
        ),
    ),
    "image of no type": (
        _FEATURES,
        _json_changed("featuresDict", "features", "image", "image", "dtype", value="x"),
    ),
    **{
        f"{value} classes": (
            _FEATURES,
            _json_changed(*_LABEL, "classLabel", "numClasses", value=value),
        )
        for value in ("2", "0", "-1", "x", "1000000000000")
    },
    "shard empty": (_SHARD, _write(b"")),
    "shard of noise": (_SHARD, _write(random.Random(0).randbytes(5000))),
    "shard of zeros": (_SHARD, _write(bytes(5000))),
    "shard cut": (_SHARD, lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "shard cut in two": (
        _SHARD,
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    ),
    "shard of the test split": (
        _SHARD,
        lambda path: shutil.copy(path.parent / tfds.TEST_SHARD, path),
    ),
    **{
        f"shard, a bit at {at}": (_SHARD, _bit_flipped(at))
        for at in (0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)
    },
}


def _tiny(folder: Path) -> None:
    """A prepared data set and a finished run on it."""
    tfds.prepare(folder / "data")
    where = {"TFDS_DATA_DIR": str(folder / "data"), "XDG_CACHE_HOME": str(folder / "cache")}
    engine.check(
        engine.run_here("train", *_TINY, f"--workdir={folder / 'run'}", **where), refuses=False
    )


def _damage_tfds(name: str, change: Callable[[Path], object], folder: Path) -> None:
    sound = engine.shared("tiny", _tiny)
    data = shutil.copytree(sound / "data", folder / "data")
    change(data / "tiny" / "1.0.0" / name)
    # Whoever imports this leaves a file behind.
    (folder / "hostile_module.py").write_text(
        f"open({str(folder / 'imported')!r}, 'w')\nclass Class: pass\n"
    )
    where = {"TFDS_DATA_DIR": str(data), "XDG_CACHE_HOME": str(folder / "cache")}
    import sys

    sys.path.insert(0, str(folder))
    try:
        ran = engine.run_here("train", *_TINY, f"--workdir={folder / 'run'}", **where)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("hostile_module", None)
    if (folder / "imported").exists():
        raise Failure("silent", f"a module that a data set names was imported: {ran}")
    engine.check(
        ran, functools.partial(engine.check_same, folder / "run", chaos.Outcome.of(sound / "run"))
    )


# Compiled programs --------------------------------------------------------------------------------


def _damage_programs(kind: str, seed: int, folder: Path) -> None:
    """A killed process, or a full disk, may leave half a program behind."""
    sound = engine.shared("programs", _programs)
    cache = shutil.copytree(sound, folder / "programs")
    rng = random.Random(seed)
    programs = sorted(path for path in cache.iterdir() if path.name.endswith("-cache"))
    for path in programs:
        path.write_bytes(b"" if kind == "empty" else _drawn(path.read_bytes(), rng, kind))
    ran = engine.run("ncjax", "measure", *_MEASURED, env={"JAX_COMPILATION_CACHE_DIR": str(cache)})
    expected = json.loads(engine.run_here("measure", *_MEASURED).out)["metrics"]

    def compare(ran: Ran) -> None:
        if json.loads(ran.out)["metrics"] != expected:
            raise Failure("silent", f"other numbers: {ran}")

    engine.check(ran, compare)


_MEASURED = ("tests/data/features.npz", "--head", "tests/data/head.npz", "--json")


def _programs(folder: Path) -> None:
    engine.check(
        engine.run("ncjax", "measure", *_MEASURED, env={"JAX_COMPILATION_CACHE_DIR": str(folder)}),
        refuses=False,
    )
    assert any(folder.iterdir())


def cases(rng: random.Random) -> Iterator[tuple[str, Attack]]:
    for name, make in _FORMATS.items():
        yield f"{name} whole", functools.partial(_sound_file, name, make)
        for kind, times in (("bit", 6), ("cut", 3), ("zeros", 2), ("noise", 2)):
            for i in range(times):
                yield (
                    f"{name}, {kind} {i}",
                    functools.partial(_damage_file, name, make, kind, rng.randrange(2**32)),
                )
    for what, (suffix, make) in _FEATURE_FILES.items():
        yield what, functools.partial(_feature_file, suffix, make)
    for kind in ("missing", "folder", "loop", "null device", "endless device"):
        yield f"features: {kind}", functools.partial(_no_file, kind)
    for what, (name, change) in _WORKDIR_FILES.items():
        yield what, functools.partial(_damage_workdir, name, change)
    for what, change in _FACTS.items():
        yield (
            f"metadata of a checkpoint: {what}",
            functools.partial(_damage_workdir, "facts", change),
        )
    for what, (name, change) in _CACHED.items():
        yield f"decoded data: {what}", functools.partial(_damage_cache, name, change)
    for what, (name, change) in _TFDS_FILES.items():
        yield f"TFDS: {what}", functools.partial(_damage_tfds, name, change)
    for kind in ("empty", "cut", "zeros"):
        yield (
            f"compiled programs: {kind}",
            functools.partial(_damage_programs, kind, rng.randrange(2**32)),
        )


def _feature_file(suffix: str, make: Callable[[], bytes], folder: Path) -> None:
    _measure_file(folder, suffix, make())


def _sound_file(name: str, make: Callable[[], bytes], folder: Path) -> None:
    """What is not damaged must be measured, or all of the above could pass by refusing
    everything.
    """
    (folder / name).write_bytes(make())
    if _expected(folder / name) is None:
        raise Failure("other", "the library cannot read the undamaged file")
    _measure_file(folder, Path(name).suffix, make())
