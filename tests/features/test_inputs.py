"""Every row of the table of inputs in docs/measure.md: what is taken gives the right numbers, what
is refused names the remedy.
"""

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import ncjax
from ncjax.cli import measure as command_line
from ncjax.errors import InputError
from ncjax.features import streaming
from tests.features.test_measure import split
from tests.helpers import ROOT

H, LABELS, HEAD, BIAS = split(dtype=np.float32)
ONE_HOT = np.eye(5, dtype=np.float32)[LABELS]
NAMES = np.array(["ant", "bee", "cat", "dog", "eel"])
SPOILT = np.concatenate([LABELS, [-1, -1]])


class Array:
    """An array of another library, which DLPack alone reads, on a device of some kind."""

    def __init__(self, array, device):
        self._array, self._device = array, device

    def __dlpack_device__(self):
        return (self._device, 0)

    def __dlpack__(self, **options):
        if self._device != 3:
            raise BufferError("no such device")
        return self._array.__dlpack__()


def images(torch=None):
    """Features of 6 x 8 x 3 x 2 whose means over positions are H."""
    noise = np.random.default_rng(1).standard_normal((len(H), 8, 3, 2))
    noise -= noise.mean((2, 3), keepdims=True)
    return (H[:, :, None, None] + noise).astype(np.float32)


def tokens():
    return np.stack([H, 5 - H, H**2], axis=1)


def inference(torch):
    with torch.inference_mode():
        return torch.from_numpy(H.copy()) * 1


def expected(**options):
    return ncjax.measure(H, LABELS, **options)


def refused(message):
    return SimpleNamespace(message=message)


def measured(*arguments, **options):
    return lambda: (ncjax.measure(*arguments, **options), expected())


def of_torch(make):
    def call():
        torch = pytest.importorskip("torch")
        return ncjax.measure(make(torch), torch.from_numpy(LABELS.copy())), expected()

    return call


def rounded(dtype):
    """What the numbers are in a type of 16 bits."""
    return np.asarray(jnp.asarray(H).astype(dtype).astype(jnp.float32))


def of_half(dtype):
    def call():
        torch = pytest.importorskip("torch")
        got = ncjax.measure(torch.from_numpy(H.copy()).to(getattr(torch, dtype)), LABELS)
        return got, ncjax.measure(rounded(dtype), LABELS)

    return call


def tensor(torch):
    return torch.from_numpy(H.copy())


IN_MEMORY = {
    "PyTorch tensor": of_torch(tensor),
    "float16": of_half("float16"),
    "bfloat16": of_half("bfloat16"),
    "a tensor with strides": of_torch(lambda t: tensor(t).repeat_interleave(2, 1)[:, ::2]),
    "column-major": of_torch(lambda t: tensor(t).T.contiguous().T),
    "requires_grad": of_torch(lambda t: tensor(t).requires_grad_()),
    "made in inference mode": of_torch(inference),
    "pinned memory": lambda: (ncjax.measure(Array(H, 3), LABELS), expected()),
    "CuPy, or a tensor on a GPU": refused("JAX has no such device here; bring it to the host"),
    "NumPy of any type, '>f8' too": measured(H.astype(">f8"), LABELS),
    "JAX array": measured(jnp.asarray(H), jnp.asarray(LABELS)),
    "pandas": measured(pd.DataFrame(H), pd.Series(LABELS)),
    "sparse": refused("it is sparse; .toarray() or .to_dense()"),
    "complex": refused("they are complex; give real and imaginary parts side by side"),
    "N x C x H x W": measured(images(), LABELS, pool="mean"),
    "N x T x p": measured(tokens(), LABELS, pool="cls"),
    "more than two axes without pool": refused("say what makes (N, p) of them: pool is mean"),
    "one-hot labels": measured(H, ONE_HOT),
    "a column of labels": measured(H, LABELS[:, None]),
    "bool labels": lambda: (ncjax.measure(H, LABELS > 2), ncjax.measure(H, 1 * (LABELS > 2))),
    "names as labels": refused("np.unique(labels, return_inverse=True)[1]"),
    "labels that are floats": refused("labels.astype(int)"),
    "labels from 1 on": lambda: (ncjax.measure(H, LABELS + 1), expected()),
    "labels from 1 on, with a head": refused("subtract 1 if they count from 1 on"),
    "labels with -1": refused("ignore_label=-1 leaves such examples out"),
    "ignore_label=-1": lambda: (
        ncjax.measure(np.concatenate([H, H[:2]]), SPOILT, ignore_label=-1),
        expected(),
    ),
    "batches that are mappings": lambda: (
        ncjax.measure_batches(
            [{"features": H[i::2], "labels": LABELS[i::2], "id": 7} for i in (0, 1)]
        ),
        expected(),
    ),
}

REFUSED = {
    "CuPy, or a tensor on a GPU": (Array(H, 2), LABELS, {}),
    "sparse": (scipy.sparse.csr_matrix(H), LABELS, {}),
    "complex": (H * 1j, LABELS, {}),
    "more than two axes without pool": (images(), LABELS, {}),
    "names as labels": (H, NAMES[LABELS], {}),
    "labels that are floats": (H, LABELS * 1.0, {}),
    "labels from 1 on, with a head": (H, LABELS + 1, {"head": HEAD}),
    "labels with -1": (H, LABELS - 1, {}),
}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "labels: got None; "),
        ([None, *LABELS[1:]], "labels: got 'None in example 0'; "),
        ([*LABELS[:-1], {}], "'a dict in example "),
        (LABELS.astype(object), "labels.astype(int)"),
        (np.where(LABELS > 2, np.nan, 1.0), "NaN in example "),
    ],
)
def test_labels_that_are_missing_or_objects_are_one_line(labels, words):
    if not isinstance(labels, np.ndarray | None):
        labels = np.array(labels, dtype=object)
    for batches in ([(H, labels)], [(H, LABELS), (H, labels)]):
        with pytest.raises(InputError) as caught:
            ncjax.measure_batches(batches, num_classes=5)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", "1e-3"),
        ("weight_decay", True),
        ("weight_decay", -1.0),
        ("weight_decay", np.nan),
        ("loss", "hinge"),
        ("global_mean", 3),
        ("head", "fc.npz"),
        ("bias", "fc.npz"),
        ("ood", 5),
        ("ood", "outliers.npy"),
        ("rows", 2.5),
        ("ignore_label", "x"),
        ("ignore_label", 1.5),
        ("ignore_label", True),
        ("float64", "yes"),
        ("devices", 3),
        ("progress", 3),
    ],
)
def test_an_argument_of_another_type_is_one_line_before_any_work(
    name, value, monkeypatch, without_type_checks
):
    def work(*_, **__):
        pytest.fail("features are read")

    monkeypatch.setattr(streaming, "first_pass", work)
    with pytest.raises(InputError, match=rf"^{name}: ") as caught:
        ncjax.measure_batches([(H, LABELS)], **({"head": HEAD} | {name: value}))
    assert "\n" not in str(caught.value)


def test_batches_that_are_none_are_one_line(without_type_checks):
    with pytest.raises(InputError, match=r"^batches: got 'int'; "):
        ncjax.measure_batches(5, num_classes=2)


def assert_same(got, right):
    assert got.keys() == right.keys()
    for name in right:
        np.testing.assert_allclose(got[name], right[name], 1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("row", IN_MEMORY)
def test_an_input_in_memory(row):
    if row in REFUSED:
        features, labels, options = REFUSED[row]
        with pytest.raises(InputError) as error:
            ncjax.measure(features, labels, **options)
        assert IN_MEMORY[row].message in str(error.value)
        assert "\n" not in str(error.value)
        return
    assert_same(*IN_MEMORY[row]())


def test_a_sparse_tensor_and_more_rules_of_pooling():
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="it is sparse"):
        ncjax.measure(tensor(torch).to_sparse(), LABELS)
    for pool, right in (("flatten", tokens().reshape(len(H), -1)), (lambda h: h[:, 2], H**2)):
        got = ncjax.measure(tokens(), LABELS, pool=pool)
        assert_same(got, ncjax.measure(right, LABELS))
    with pytest.raises(InputError, match="pool: got 'max'; choose mean, flatten, cls"):
        ncjax.measure(tokens(), LABELS, pool="max")
    with pytest.raises(InputError, match="pool: got 'cls'; features of 4 axes"):
        ncjax.measure(images(), LABELS, pool="cls")


# Files


def write_torch(folder):
    torch = pytest.importorskip("torch")
    torch.save(
        {"epoch": 3, "features": tensor(torch), "labels": torch.from_numpy(LABELS.copy())},
        folder / "a.pt",
    )
    return ["a.pt"]


def write_module(folder):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(8, 5), folder / "a.pt")
    return ["a.pt"]


def write_hdf5(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        file["features"], file["labels"] = H, LABELS
    return ["a.h5"]


def write_parquet(folder):
    table = pd.DataFrame({"features": list(H), "labels": LABELS})
    table.to_parquet(folder / "a.parquet")
    return ["a.parquet"]


def write_csv(folder):
    table = pd.DataFrame(H.astype(np.float64), columns=[f"h{i}" for i in range(8)])
    table.assign(label=LABELS).to_csv(folder / "a.csv", index=False)
    return ["a.csv"]


def write_npz(folder):
    np.savez(folder / "a.npz", feats=H, y=LABELS)
    return ["a.npz", "--features-key=feats", "--labels-key=y"]


def write_label_name(folder):
    np.savez(folder / "a.npz", features=H, y=LABELS)
    return ["a.npz"]


def write_labels_twice(folder):
    """Equal ones, as integers and as one-hot rows."""
    np.savez(folder / "a.npz", features=H, labels=LABELS)
    np.save(folder / "labels.npy", ONE_HOT)
    return ["a.npz", "--labels=labels.npy"]


def write_misspelt(folder):
    np.savez(folder / "a.npz", feature=H, labels=LABELS)
    return ["a.npz"]


def write_linear(folder):
    write_csv(folder)
    np.savez(folder / "linear.npz", weight=HEAD, bias=BIAS)
    return ["a.csv", "--head", "linear.npz"]


def write_state(folder):
    torch = pytest.importorskip("torch")
    write_csv(folder)
    weights = {"stem.weight": HEAD[:3], "fc.weight": HEAD, "fc.bias": BIAS}
    state = {f"model.{name}": torch.from_numpy(array) for name, array in weights.items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "head.pt")
    return ["a.csv", "--head", "head.pt", "--head-prefix=fc"]


FILES = {
    ".pt, .pth": write_torch,
    ".pt with objects": write_module,
    ".h5, .hdf5": write_hdf5,
    ".parquet": write_parquet,
    ".csv": write_csv,
    ".npz with `label`, `target`, `class` or `y`": write_label_name,
    ".npz with other names": write_npz,
    "labels in several files": write_labels_twice,
    "a name that is near": write_misspelt,
    "weight, bias": write_linear,
    "a whole state_dict": write_state,
}
REFUSED_FILES = {
    ".pt with objects": "it holds objects, which are code to run, or is damaged; save tensors",
    "a name that is near": "no array is named features; did you mean feature; --features-key",
}


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = command_line.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("row", FILES)
def test_an_input_file(row, tmp_path, said):
    arguments = FILES[row](tmp_path)
    code, out, err = said(*arguments, "--json")
    if row in REFUSED_FILES:
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert REFUSED_FILES[row] in err.replace("?", "")
        return
    assert (code, err) == (0, "")
    head = {"head": HEAD, "bias": BIAS} if "--head" in arguments else {}
    assert_same(json.loads(out)["metrics"], expected(**head))


WRONG = {
    "a prefix of no module": (["a.csv", "--head", "linear.npz", "--head-prefix=fcc"], "no module"),
    "a head without a weight": (
        ["a.csv", "--head", "a.csv"],
        "it has no head_kernel and no weight",
    ),
    "labels of another name": (["a.csv", "--labels-key=lable"], "did you mean label"),
    "features of another name": (["a.csv", "--features-key=x"], "no array is named x"),
    "a table without a header": (["bare.csv"], "its first row is numbers, not the names"),
    "a table with its index": (["index.csv"], "to_csv(index=False)"),
    "a table of numbers that repeat": (["repeated.csv"], "its first row is numbers"),
    "a parquet with its index": (["index.parquet"], "to_parquet(index=False)"),
    "a column of words": (["words.csv"], "column name of "),
    "labels that are words": (["names.csv"], "column label of names.csv: "),
    "labels of an array that are words": (["names.npz"], "y of names.npz: "),
    "a label that is missing": (["unlabelled.csv"], "column label of unlabelled.csv: "),
    "labels in two files": (["a.csv", "--labels", "other.npy"], "other labels than other.npy"),
    "layers of other labels": (["a.csv", "other.npz"], "other labels than a.csv"),
    "rows of different lengths": (["ragged.parquet"], "rows of different lengths"),
    "a missing value": (["missing.parquet"], "missing values"),
    "no label": (["bare.npy"], "no array is named labels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_table_that_is_not_understood_is_one_line(case, tmp_path, said):
    write_linear(tmp_path)
    np.savetxt(tmp_path / "bare.csv", H, delimiter=",")
    np.save(tmp_path / "bare.npy", H)
    pd.DataFrame(H, columns=list("abcdefgh")).assign(label=LABELS).to_csv(tmp_path / "index.csv")
    words = pd.DataFrame({"a": H[:, 0], "name": NAMES[LABELS], "label": LABELS})
    words.to_csv(tmp_path / "words.csv", index=False)
    np.savetxt(tmp_path / "repeated.csv", np.ones((3, 3)), delimiter=",")
    table = pd.DataFrame(H, columns=list("abcdefgh"))
    table.assign(label=LABELS)[LABELS > 0].to_parquet(tmp_path / "index.parquet")
    table.assign(label=NAMES[LABELS]).to_csv(tmp_path / "names.csv", index=False)
    table.assign(label=LABELS).replace({"label": {1: None}}).to_csv(
        tmp_path / "unlabelled.csv", index=False
    )
    np.savez(tmp_path / "names.npz", features=H, y=NAMES[LABELS])
    np.savez(tmp_path / "other.npz", features=H, labels=LABELS[::-1])
    np.save(tmp_path / "other.npy", LABELS[::-1])
    ragged = pd.DataFrame({"features": [[1.0], [1.0, 2.0]], "labels": [0, 1]})
    ragged.to_parquet(tmp_path / "ragged.parquet")
    missing = pd.DataFrame({"features": [[1.0], None], "labels": [0, 1]})
    missing.to_parquet(tmp_path / "missing.parquet")
    arguments, message = WRONG[case]
    code, out, err = said(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_the_table_of_the_documentation_has_these_rows():
    text = (ROOT / "docs" / "measure.md").read_text()
    table = text.split("| you have |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.MULTILINE)
    refuses = {row for row, answer in rows if answer.startswith("refused")}
    assert [row for row, _ in rows] == [*IN_MEMORY, *FILES]
    assert refuses == REFUSED.keys() | REFUSED_FILES.keys()
