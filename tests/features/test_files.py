"""Files of features: damage is one line and exit code 2, never other numbers; names are shown as
they are written.
"""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ncjax.cli import measure
from ncjax.errors import InputError, printable
from ncjax.features import files
from ncjax.features.result import Measurement
from ncjax.report import feature_figures

H = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
LABELS = np.arange(12) % 3
ARRAYS = {"features": H, "labels": LABELS}


def npy(array, descr=None, shape=None, version=(1, 0)):
    """Bytes of a .npy, whose header may say something else than what follows it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file,
        {
            "descr": descr or array.dtype.str,
            "fortran_order": False,
            "shape": array.shape if shape is None else shape,
        },
    )
    content = file.getvalue()
    return content[:6] + bytes(version) + content[8:] + array.tobytes()


def header_of(text):
    """Bytes of a .npy whose header is this text."""
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text.encode()


def npz(members, compression=zipfile.ZIP_STORED):
    """Bytes of a .npz of members: arrays, or bytes as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(
                name, content if isinstance(content, bytes) else npy(np.asarray(content))
            )
    return file.getvalue()


def tensors(header, data=bytes(64)):
    """Bytes of a .safetensors with this header, JSON or bytes as they are."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(*offsets, dtype="F32", shape=(8,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def changed(content, marker, offset, value):
    """`content` with bytes replaced, `offset` behind the last place of a marker."""
    at = content.rindex(marker) + offset
    return content[:at] + value + content[at + len(value) :]


IN_ZIP = {f"{name}.npy": array for name, array in ARRAYS.items()}
WHOLE, SQUEEZED = npz(IN_ZIP), npz(IN_ZIP, zipfile.ZIP_DEFLATED)
CENTRAL = b"PK\x01\x02"  # begins an entry of the directory of a zip
DAMAGED = {
    "pickle.npy": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",
    "objects.npy": npy(np.zeros(2, np.int64), descr="|O"),
    "zip.npy": WHOLE,
    "huge.npy": npy(H, shape=(2**40, 2**40)),
    "wraps.npy": npy(H, shape=(2**62, 4)),
    "negative.npy": npy(H, shape=(-12, -4)),
    "short.npy": npy(H, shape=(11, 4)),
    "long.npy": npy(H, shape=(13, 4)),
    "version.npy": npy(H, version=(9, 9)),
    "token.npy": header_of("{'descr': '<f4', 'shape': (12, 4), 'fortran_order': (False\n"),
    "recursion.npy": header_of("-" * 9000 + "1"),
    "overflow.npy": header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (10**400,)}\n"),
    "subarray.npy": header_of(
        "{'descr': ('<f4', 10**30), 'fortran_order': False, 'shape': (2,)}\n"
    ),
    "long_header.npy": header_of("{" + " " * 20000 + "}"),
    "flipped_label.npz": changed(WHOLE, LABELS.tobytes(), 0, b"\x01"),
    "flipped_feature.npz": changed(WHOLE, H.tobytes(), 20, bytes([H.tobytes()[20] ^ 1])),
    "nested.npz": npz({"features.npy": WHOLE, "labels.npy": LABELS}),
    "negative.npz": npz({"features.npy": npy(H, shape=(-12, 4))}),
    "beyond_its_member.npz": npz({"features.npy": npy(H[:2], shape=(12, 4)), "labels.npy": LABELS}),
    "within_its_member.npz": npz({"features.npy": npy(H, shape=(11, 4))}),
    "objects.npz": npz({"features.npy": npy(np.zeros(2, np.int64), descr="|O")}),
    "huge_deflated.npz": npz({"features.npy": npy(H, shape=(2**60,))}, zipfile.ZIP_DEFLATED),
    "zlib.npz": SQUEEZED[:60] + b"\xff" * 40 + SQUEEZED[100:],
    "encrypted.npz": changed(WHOLE, CENTRAL, 8, b"\x01"),
    "method.npz": changed(WHOLE, CENTRAL, 10, b"\x63"),
    "deflate_said.npz": changed(WHOLE, CENTRAL, 10, b"\x08"),
    "sizes.npz": changed(WHOLE, CENTRAL, 20, b"\x80"),
    # The entry of labels.npy in the directory says that the next entry, 56 bytes, is its comment.
    "hidden.npz": changed(npz(IN_ZIP | {"logits.npy": H[:, :3]}), b"labels.npy", -14, b"\x38"),
    "negative.safetensors": tensors({"features": entry(-32, 0)}),
    "overlap.safetensors": tensors({"features": entry(0, 32), "labels": entry(0, 64, shape=[16])}),
    "gap.safetensors": tensors({"features": entry(32, 64)}),
    "rest.safetensors": tensors({"features": entry(0, 32)}),
    "type.safetensors": tensors({"features": entry(0, 64, dtype="F8_E4M3", shape=[64])}),
    "huge.safetensors": tensors({"features": entry(0, 64, shape=[2**40, 2**40])}),
    "deep.safetensors": tensors(b"[" * 100_000),
    "length.safetensors": b"\xff" * 8 + b"{}",
}


@pytest.fixture
def said(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = measure.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def assert_one_line(result, *parts):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert len(err) < 600
    for part in parts:
        assert part in err


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("error")
def test_a_damaged_file_is_one_line_and_exit_code_2(name, tmp_path, said):
    (tmp_path / name).write_bytes(DAMAGED[name])
    assert_one_line(said(tmp_path / name), name, "it cannot be read: ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--format=svg"],
        ["--format=png"],
        ["--only", "angles"],
        ["--width=4in"],
        ["--figures=folder", "--only", "layers"],
        ["--figures=folder", "--only", "spectrum,layers"],
    ],
    ids=" ".join,
)
def test_flags_that_draw_nothing_are_refused(flags, tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npz").write_bytes(WHOLE)
    flag = "--only: " if "--only" in flags else f"{flags[0].partition('=')[0]}: "
    assert_one_line(said("a.npz", *flags), flag)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("content", [WHOLE[:-30], b"", b"features,labels\n1,2\n"])
def test_a_npz_that_is_none_says_the_way_out(content, tmp_path, said):
    (tmp_path / "a.npz").write_bytes(content)
    assert_one_line(said(tmp_path / "a.npz"), "save it anew")


def test_a_pt_cut_short_is_one_short_sentence(tmp_path, said):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save({"features": torch.zeros(100, 4)}, path)
    content = path.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:end])
        result = said(path)
        assert_one_line(result, "save")
        assert len(result[2]) < len(str(path)) + 200


def test_a_folder_and_a_pipe_are_no_files(tmp_path, said):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("folder.npz", "pipe.npz"):
        assert_one_line(said(tmp_path / name), name, "not a file")


@pytest.mark.parametrize("content", [WHOLE, SQUEEZED], ids=["stored", "deflated"])
def test_a_flipped_bit_of_a_npz_is_an_error_or_changes_nothing(content, tmp_path):
    path, refused = tmp_path / "a.npz", 0
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            read = files.read(path, "features")
        except InputError:
            refused += 1
            continue
        assert read.keys() == ARRAYS.keys(), i
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(read[name], array)
    assert refused > len(content) / 2


def saved(suffix):
    if suffix == ".npz":
        return WHOLE
    return npy(H) if suffix == ".npy" else safetensors.numpy.save({**ARRAYS})


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
def test_a_file_cut_short_or_with_more_behind_it_is_refused(suffix, tmp_path):
    content, path = saved(suffix), tmp_path / f"a{suffix}"
    more = [] if suffix == ".npz" else [content + b"x"]  # a zip is found from its end
    for part in [*(content[:end] for end in range(0, len(content), 7)), content[:-1], *more]:
        path.write_bytes(part)
        with pytest.raises(InputError, match="cannot be read"):
            files.read(path, "features")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([".npz", ".npy", ".safetensors"]),
    st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 12), st.binary(max_size=12)),
        min_size=1,
        max_size=6,
    ),
)
def test_any_bytes_are_arrays_or_one_error(tmp_path_factory, suffix, edits):
    content = bytearray(saved(suffix))
    for at, removed, put in edits:
        at %= len(content) + 1
        content[at : at + removed] = put
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    path.write_bytes(content)
    try:
        read = files.read(path, "features")
    except InputError:
        return
    for array in read.values():
        assert array.tobytes() is not None  # it can be touched: it lies in the file


@pytest.mark.parametrize("order", "CF")
def test_a_npz_that_is_not_compressed_is_mapped_behind_local_headers_of_any_length(order, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in ARRAYS.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            member.extra = struct.pack("<HH5s", 0x9999, 5, b"extra")
            file = io.BytesIO()
            np.save(file, np.asarray(array, order=order))
            archive.writestr(member, file.getvalue())
    path.write_bytes(b"something before" + path.read_bytes())
    read = files.read(path, "")
    for name, array in ARRAYS.items():
        assert isinstance(read[name], np.memmap)
        np.testing.assert_array_equal(read[name], array)


def test_tensors_of_a_safetensors_file_lie_where_their_offsets_say(tmp_path):
    """Also where the header names them in another order, and where some are empty."""
    arrays = {
        "z": np.arange(6.0),
        "none": np.zeros((0, 3), np.float32),
        "a": H,
        "one": np.float32(7),
    }
    header, data = {}, b""
    for name, array in arrays.items():
        kind = {8: "F64", 4: "F32"}[array.itemsize]
        header[name] = entry(len(data), len(data) + array.nbytes, dtype=kind, shape=array.shape)
        data += array.tobytes()
    ordered = {"__metadata__": {"any": "thing"}, **dict(sorted(header.items()))}
    (tmp_path / "a.safetensors").write_bytes(tensors(ordered, data))
    read = files.read(tmp_path / "a.safetensors", "")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


SCALAR = np.float32(3)
SHAPES = {
    "features": {"features": SCALAR, "labels": LABELS},
    "labels": {"features": H, "labels": np.int64(1)},
    "logits": {"features": H, "labels": LABELS, "logits": SCALAR},
    "head_kernel": {"head_kernel": SCALAR},
    "head_bias": {"head_kernel": H[:3], "head_bias": SCALAR},
    "head_kernel of shape (1000000000, 0)": {"head_kernel": np.zeros((10**9, 0), np.float32)},
    "head_kernel of shape (0, 4)": {"head_kernel": H[:0]},
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_array_without_its_axes_is_one_line_and_exit_code_2(name, tmp_path, said):
    np.savez(tmp_path / "whole.npz", **ARRAYS)
    np.savez(tmp_path / "a.npz", **SHAPES[name])
    head = name.startswith("head")
    call = [tmp_path / "whole.npz", "--head", tmp_path / "a.npz"] if head else [tmp_path / "a.npz"]
    assert_one_line(said(*call), "a.npz", name)


@pytest.mark.parametrize("flag", ["figures.pdf", "figures.PNG", "whole.npz"])
def test_figures_go_to_a_folder(flag, tmp_path, said):
    np.savez(tmp_path / "whole.npz", **ARRAYS)
    assert_one_line(said(tmp_path / "whole.npz", "--figures", tmp_path / flag), "--figures", flag)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npz"]


# Names

NAMES = (
    "d[/y].npz",
    "[bold]x[/bold].npz",
    r"b$\frac$.npz",
    "a$1$ $x.npz",
    r"back\$slash\.npz",
    ":cat:.npz",
    "new\nline.npz",
    "\x1b[31mred.npz",
    "-x.npz",
    "_hidden.npz",
    "~nobody.npz",
    "{0}%s.npz",
    os.fsdecode(b"not\xffutf8.npz"),
)


def write(name, content):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content)


@pytest.fixture
def measured(monkeypatch):
    """`measure_batches` answers at once, and always the same."""
    metrics = dict.fromkeys(measure._BY_LAYER, 0.5) | {"nc3": 0.25}
    centred = H[:3].astype(np.float64)
    spectrum, within, variances = np.array([2.0, 1.0]), np.array([0.1, 0.2]), np.full(3, 0.1)
    found = Measurement(
        metrics, np.array([4, 4, 4]), [], spectrum, within, variances, centred, [], []
    )
    monkeypatch.setattr(measure, "measure_batches", lambda *_, **__: found)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_names_of_any_kind_are_printed_as_they_are_and_drawn(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        write(name, WHOLE)
    code, out, err = said("--figures", "[/figures] $", "--", *NAMES)
    assert (code, err) == (0, "")
    assert "new\\nline.npz" in out
    assert "not\\udcffutf8.npz" in out
    for name in NAMES:
        assert f" {printable(name)} " in out, name
    for line in out.splitlines():
        line.encode()
        assert "\x1b" not in line
    assert {line for line in out.splitlines() if line.startswith("figure: ")} == {
        f"figure: [/figures] $/{name}.png" for name in ("spectrum", "angles", "classes", "layers")
    }
    code, out, _ = said("--json", "--", *NAMES)
    assert [layer["features"] for layer in json.loads(out)["layers"]] == list(NAMES)


def shown(text):
    """What matplotlib draws for a text; mathematics fails."""
    words, mathematics = text._preprocess_math(text.get_text())
    assert not mathematics, words
    return words


def test_names_in_figures_are_no_mathematics(measured):
    figure = feature_figures.layers(dict.fromkeys(NAMES, measured))
    assert [shown(text) for text in figure.axes[-1].get_xticklabels()] == [
        printable(name) for name in NAMES
    ]


def test_a_long_name_in_a_figure_keeps_its_ends(measured):
    figure = feature_figures.layers({"begin" + 200 * "$" + "end": measured, "b": measured})
    long, short = (shown(text) for text in figure.axes[-1].get_xticklabels())
    assert short == "b"
    assert len(long) < 90
    assert long.startswith("begin$")
    assert long.endswith("$end")


@pytest.mark.parametrize("name", NAMES)
def test_an_error_about_a_file_of_any_name_is_one_line(name, tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    missing = "there is no such home" if name.startswith("~") else "No such file or directory"
    assert_one_line(said("--", name), missing)
    write(name, npz({"features.npy": H}))
    assert_one_line(said("--", name), "no array is named labels")
