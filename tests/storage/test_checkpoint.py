"""checkpoint: what is saved comes back bit for bit, of all runs or of one, or it is said where
it is damaged.
"""

import errno
import json
import os
import shutil
import sys
import threading
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ncjax.storage import checkpoint
from ncjax.storage.checkpoint import CheckpointMetadata, Checkpoints, Damaged

RUNS = 3
DEEP = b"[" * 100_000  # deeper than Python's JSON goes


def states(seed):
    """Stacked over runs: nested, of several types, with NaN and -0, a leaf of one number per
    run, lists.
    """
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((RUNS, 40, 30)).astype(np.float32)
    kernel[1, 0, :3] = np.nan, -0.0, np.inf
    return {
        "params": {
            "layer_1": {"kernel": jnp.asarray(kernel)},
            "head": {"kernel": jnp.asarray(kernel[:, :3, :2] + 1)},
        },
        "opt_state": [
            jnp.asarray(kernel * 2),
            {"count": jnp.asarray(rng.integers(9, size=RUNS), jnp.int32)},
        ],
        "epoch": jnp.full(RUNS, seed, jnp.int32),
    }


def facts(epoch):
    return CheckpointMetadata(
        epoch=epoch,
        config={"train": {"epochs": 9}, "sweep": {"seed": [0, 1, 2]}},
        axes={"weight_decay": [1e-3], "seed": [0, 1, 2]},
        measured=list(range(epoch)),
        versions={"jax": "1"},
        crc32={},
        data={"train_images": 7},
        random_bits={"jax_default_prng_impl": "threefry2x32"},
        arithmetic={"mesh": "2 x 1"},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of epochs 2 and 5."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for epoch in (2, 5):
        checkpoints.save(states(epoch), facts(epoch))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def loaded(folder, epoch):
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.load(epoch, states(0))
    finally:
        checkpoints.close()


def numbers(folder, epoch):
    """The file that holds most of a checkpoint."""
    return max((folder / str(epoch) / "state").rglob("*"), key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit_with_its_facts(saved):
    for epoch in (2, 5):
        found, found_facts = loaded(saved, epoch)
        expected = states(epoch)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert isinstance(a, np.ndarray)
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert found_facts._replace(crc32={}) == facts(epoch)
        assert found_facts == checkpoint.read_metadata(saved, epoch)
        assert {len(crcs) for crcs in found_facts.crc32.values()} == {RUNS}
    assert checkpoint.epochs_in(saved) == [2, 5]


def test_one_run_is_read_alone(saved, folder):
    for run in range(RUNS):
        expected = states(5)["params"]
        found = checkpoint.read_run(saved, 5, run)["params"]
        assert found.keys() == expected.keys()
        for layer in expected:
            kernel = np.asarray(expected[layer]["kernel"])[run]
            assert found[layer]["kernel"].dtype == kernel.dtype
            assert found[layer]["kernel"].tobytes() == kernel.tobytes()
    # Damage to another run is none of its business.
    damage_run(folder, 5, 2)
    checkpoint.read_run(folder, 5, 0)
    checkpoint.read_run(folder, 5, 1)
    with pytest.raises(Damaged, match=r"params\.layer_1\.kernel does not match in run 2"):
        checkpoint.read_run(folder, 5, 2)


def damage_run(folder, epoch, run):
    """Flips a bit of params.layer_1.kernel of one run where it lies on disk."""
    kernel = np.asarray(states(epoch)["params"]["layer_1"]["kernel"])[run].tobytes()
    for path in (folder / str(epoch) / "state").rglob("*"):
        content = bytearray(path.read_bytes()) if path.is_file() else b""
        if kernel in content:
            content[content.index(kernel) + 100] ^= 16
            path.write_bytes(content)
            return
    raise AssertionError("the kernel was not found")


@pytest.mark.parametrize("run", range(RUNS))
def test_a_flipped_bit_is_found_in_its_leaf_and_run(folder, run):
    damage_run(folder, 5, run)
    with pytest.raises(
        Damaged, match=rf"^the checksum of params\.layer_1\.kernel does not match in run {run}$"
    ):
        loaded(folder, 5)
    loaded(folder, 2)


def test_the_first_leaf_and_run_that_differ_are_named():
    expected = {"a": [1, 2], "b": [3, 4]}
    checkpoint.verify({"b": [3, 4], "a": [1, 2], "c": [5, 6]}, expected)
    with pytest.raises(Damaged, match=r"^the checksum of b does not match in run 1$"):
        checkpoint.verify({"a": [1, 2], "b": [3, 5]}, expected)
    with pytest.raises(Damaged, match=r"^b is missing$"):
        checkpoint.verify({"a": [1, 2]}, expected)


def test_checksums_are_of_bits():
    a = {"x": np.array([[0.0, 1.0], [np.nan, 2.0]], np.float32)}
    b = {"x": np.array([[-0.0, 1.0], [np.nan, 2.0]], np.float32)}
    first, second = checkpoint.checksums(a)["x"], checkpoint.checksums(b)["x"]
    assert first[0] != second[0]
    assert first[1] == second[1]
    transposed = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert checkpoint.checksums({"x": transposed}) == checkpoint.checksums(
        {"x": np.ascontiguousarray(transposed)}
    )


@pytest.mark.parametrize("exchange", ["folders", "states", "metadata"])
def test_exchanged_checkpoints_are_found(folder, exchange):
    names = {"folders": "", "states": "state", "metadata": "_CHECKPOINT_METADATA"}
    one, other, aside = (
        folder / "2" / names[exchange],
        folder / "5" / names[exchange],
        folder.parent / "aside",
    )
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    for epoch in (2, 5):
        with pytest.raises(
            Damaged, match="it holds epoch" if exchange != "states" else "checksum of"
        ):
            loaded(folder, epoch)
        with pytest.raises(Damaged):
            checkpoint.read_run(folder, epoch, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda sealed: sealed["facts"]["measured"].pop(),
            "the checksum of its metadata does not match",
        ),
        (
            lambda sealed: sealed["facts"]["axes"].update(seed=[9, 1, 2]),
            "the checksum of its metadata does not match",
        ),
        (
            lambda sealed: sealed["facts"]["crc32"].popitem(),
            "the checksum of its metadata does not match",
        ),
        (
            lambda sealed: sealed.update(seal=sealed["seal"] + 1),
            "the checksum of its metadata does not match",
        ),
        (lambda sealed: sealed["facts"].pop("axes"), "cannot be read"),
        (lambda sealed: sealed["facts"].update(other=1), "cannot be read"),
        (lambda sealed: sealed.pop("facts"), "cannot be read"),
        (lambda sealed: sealed.pop("seal"), "cannot be read"),
        (lambda sealed: sealed.update(facts=[1]), "cannot be read"),
    ],
    ids=[
        "measured",
        "axes",
        "crc32",
        "seal",
        "no axes",
        "one more",
        "no facts",
        "no seal",
        "a list",
    ],
)
def test_changed_facts_are_found(folder, change, reason):
    path = folder / "5" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    change(content["custom_metadata"])
    path.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=reason):
        checkpoint.read_metadata(folder, 5)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"custom_metadata": null}', DEEP]
)
def test_metadata_that_are_none_are_found(folder, content):
    (folder / "5" / "_CHECKPOINT_METADATA").write_bytes(content)
    with pytest.raises(Damaged, match="its metadata cannot be read"):
        checkpoint.read_metadata(folder, 5)


def test_every_missing_or_truncated_file_is_found_or_needed_by_nobody(folder, capfd):
    """By whoever reads it; a file that nobody reads may be gone."""
    expected = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(states(5))]
    found = []
    for path in sorted(path for path in (folder / "5").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for damage in ("missing", "truncated"):
            path.unlink()
            if damage == "truncated":
                path.write_bytes(content[: len(content) // 2])
            if checkpoint.epochs_in(folder) == [2, 5]:
                try:
                    leaves = [
                        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(loaded(folder, 5)[0])
                    ]
                    assert leaves == expected, path
                except Damaged as reason:
                    found.append((path, str(reason)))
            path.write_bytes(content)
    assert {numbers(folder, 5), folder / "5" / "_CHECKPOINT_METADATA"} <= {
        path for path, _ in found
    }
    assert not [reason for _, reason in found if "\n" in reason]
    assert "Traceback" not in capfd.readouterr().err


def test_an_unfinished_checkpoint_does_not_count(folder):
    (folder / "5" / "commit_success.txt").unlink()
    assert checkpoint.epochs_in(folder) == [2]
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.epochs() == [2]
    checkpoints.close()


@pytest.mark.parametrize(
    ("keep", "marked", "left"),
    [
        (1, (), [5]),
        (2, (), [4, 5]),
        (1, (1, 3), [1, 3, 5]),
        (3, (0, 4), [0, 3, 4, 5]),
        (9, (), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_marked_are_kept(tmp_path, keep, marked, left):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep, marked)
    for epoch in range(6):
        checkpoints.save({"params": {"w": jnp.full((RUNS, 2), epoch)}}, facts(epoch))
    checkpoints.close()
    assert checkpoint.epochs_in(tmp_path / "checkpoints") == left
    for epoch in left:
        np.testing.assert_array_equal(
            checkpoint.read_run(tmp_path / "checkpoints", epoch, 1)["params"]["w"], epoch
        )


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    checkpoints, tree = Checkpoints(tmp_path / "checkpoints", keep=1), states(7)
    expected = [np.array(leaf) for leaf in jax.tree.leaves(tree)]
    checkpoints.save(tree, facts(7))
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(loaded(tmp_path / "checkpoints", 7)[0]), expected, strict=True):
        assert np.asarray(a).tobytes() == b.tobytes()


def test_saving_an_epoch_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save({"params": {"w": jnp.zeros((RUNS, 2))}}, facts(1))
    checkpoints.save({"params": {"w": jnp.ones((RUNS, 2))}}, facts(1))
    checkpoints.close()
    np.testing.assert_array_equal(
        checkpoint.read_run(tmp_path / "checkpoints", 1, 0)["params"]["w"], 1
    )


def test_deleting(folder):
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.delete(5)
    checkpoints.delete(5)
    assert checkpoints.epochs() == [2]
    checkpoints.close()
    assert checkpoint.epochs_in(folder) == [2]


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="checkpoints is gone"):
        checkpoints.save(states(1), facts(1))
    checkpoints.close()
    assert not (tmp_path / "checkpoints").exists()


def test_one_run_is_one_part_of_the_file():
    """What one run costs to read does not grow with the others."""
    leaf = np.zeros((RUNS, 40, 30), np.float32)
    assert checkpoint._one_chunk_per_run(None, leaf).chunk_byte_size == 40 * 30 * 4


def test_a_save_whose_folders_cannot_be_made_leaves_no_thread_waiting(tmp_path, monkeypatch):
    """Orbax's would wait for twenty minutes, and the process with them."""
    mkdir = os.mkdir

    def full(path, *arguments, **keywords):
        if os.fspath(path).endswith("/1/state"):
            raise OSError(errno.ENOSPC, "No space left on device", os.fspath(path))
        mkdir(path, *arguments, **keywords)

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(states(1), facts(1))
    waiting = [
        thread for thread in threading.enumerate() if type(thread).__name__ == "_SignalingThread"
    ]
    for thread in waiting:
        thread.join(timeout=5)
    assert not [thread for thread in waiting if thread.is_alive()]
    checkpoints.save(states(2), facts(2))
    checkpoints.close()
    assert checkpoint.epochs_in(tmp_path / "checkpoints") == [2]


def test_writes_that_end_after_their_save_has_failed_print_no_traceback(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    checkpoint._silence_abandoned_writes.__wrapped__()
    abandoned = SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(object=None, exc_value=RuntimeError("something else"))
    for unraisable in (abandoned, other):
        sys.unraisablehook(unraisable)
    assert heard == [other]


@pytest.mark.parametrize("name", ["5_backup", "5_0", "007", "5 (copy)", "\u0663", "+9", "copy"])
def test_a_copy_beside_the_checkpoints_is_none(folder, name):
    shutil.copytree(folder / "5", folder / name)
    assert checkpoint.epochs_in(folder) == [2, 5]
    assert checkpoint.unfinished_in(folder) == []
    loaded(folder, 5)


OLD = ("data", "random_bits", "arithmetic")


def test_a_checkpoint_of_before_they_were_stored_has_no_checksums_of_data(folder):
    path = folder / "5" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    old = {
        name: value
        for name, value in content["custom_metadata"]["facts"].items()
        if name not in OLD
    }
    content["custom_metadata"] = {
        "facts": old,
        "seal": zlib.crc32(json.dumps(old, sort_keys=True).encode()),
    }
    path.write_text(json.dumps(content))
    found = checkpoint.read_metadata(folder, 5)
    assert [getattr(found, name) for name in OLD] == [{}, {}, {}]
    assert found._replace(crc32={}, **{name: getattr(facts(5), name) for name in OLD}) == facts(5)
