"""history: labels, growth by epochs, and the file."""

import json

import numpy as np
import pytest
import xarray as xr

from ncjax import config as configuration
from ncjax.errors import InputError
from ncjax.metrics.vocabulary import LAYER_VOCABULARY, VOCABULARY
from ncjax.storage import history, journal

LAYERS, LABELS = ("layer_1", "head"), ("cat", "dog", "eel")
SIZES = {"split": 2, "layer": len(LAYERS), "mode": len(LABELS), "label": len(LABELS)}


@pytest.fixture
def grid():
    config = configuration.default_config()
    config.sweep.weight_decay = (0.0, 1e-3)
    config.sweep.learning_rate = (0.1, 0.2)
    config.sweep.seed = (4, 5, 6)
    return configuration.make_grid(configuration.validate(config), 3)


def metrics(epoch, vocabulary=VOCABULARY):
    """Every float32 number of an epoch is another, and some are NaN."""
    rng = np.random.default_rng(epoch)
    made = {
        name: rng.standard_normal((12, *(SIZES[dim] for dim in variable.dims))).astype(np.float32)
        for name, variable in vocabulary.items()
    }
    made["norm_target"][:6] = np.nan
    return made | {history.COSINES: rng.standard_normal((12, 3, 3)).astype(np.float32)}


def labelled(epoch, grid, vocabulary=VOCABULARY):
    attrs = {"device": "cpu", "config": "{}"}
    return history.one_epoch(
        epoch,
        metrics(epoch, vocabulary),
        grid=grid,
        layers=LAYERS,
        label_names=LABELS,
        attrs=attrs,
    )


def grown(epochs, grid, vocabulary=VOCABULARY):
    grown = None
    for epoch in epochs:
        grown = history.append(grown, labelled(epoch, grid, vocabulary))
    return grown


def assert_same_bits(a, b):
    assert a.variables.keys() == b.variables.keys()
    for name in a.variables:
        assert a[name].dims == b[name].dims, name
        assert a[name].dtype == b[name].dtype, name
        if a[name].dtype == object:  # strings
            assert a[name].values.tolist() == b[name].values.tolist(), name
        else:
            assert a[name].values.tobytes() == b[name].values.tobytes(), name


def test_each_run_stands_at_its_own_coordinates(grid):
    dataset, columns = labelled(7, grid), grid.columns()
    for r in range(grid.size):
        here = dataset.sel({"epoch": 7} | {name: columns[name][r] for name in grid.dims})
        np.testing.assert_array_equal(here["nc1"].sel(split="test"), metrics(7)["nc1"][r, 1])
        np.testing.assert_array_equal(
            here["weight_norm_sq"].sel(layer="head"), metrics(7)["weight_norm_sq"][r, 1]
        )
        np.testing.assert_array_equal(here["finite"], metrics(7)["finite"][r])
        cosine = here[history.COSINES].sel(label="eel", other_label="cat")
        np.testing.assert_array_equal(cosine, metrics(7)[history.COSINES][r, 2, 0])


def test_dimensions_run_from_the_grid_over_epochs_to_what_was_measured(grid):
    dataset = labelled(0, grid)
    assert dataset["nc1"].dims == ("weight_decay", "learning_rate", "seed", "epoch", "split")
    assert dataset["weight_norm_sq"].dims == (
        "weight_decay",
        "learning_rate",
        "seed",
        "epoch",
        "layer",
    )
    assert dataset["flow_time"].dims == ("weight_decay", "learning_rate", "seed", "epoch")
    assert dataset["mode_eigenvalues"].dims == (
        "weight_decay",
        "learning_rate",
        "seed",
        "epoch",
        "mode",
    )
    assert dataset["split"].values.tolist() == ["train", "test"]
    assert dataset["mode"].values.tolist() == [1, 2, 3]
    assert dataset["layer"].values.tolist() == list(LAYERS)
    assert dataset["seed"].values.tolist() == [4, 5, 6]


def test_every_variable_has_a_definition_and_a_unit(grid):
    for name, variable in grown([0, 3], grid).data_vars.items():
        assert variable.attrs["definition"], name
        assert variable.attrs["units"], name


def test_growing_keeps_earlier_epochs_bitwise_and_only_the_newest_cosines(grid):
    dataset = grown([0, 3, 10], grid)
    assert dataset["epoch"].values.tolist() == [0, 3, 10]
    for epoch in (0, 3, 10):
        for name in VOCABULARY:
            expected = metrics(epoch)[name].reshape(2, 2, 3, *metrics(epoch)[name].shape[1:])
            np.testing.assert_array_equal(
                dataset[name].sel(epoch=epoch).values, expected, err_msg=name
            )
    assert "epoch" not in dataset[history.COSINES].dims
    np.testing.assert_array_equal(
        dataset[history.COSINES].values.reshape(12, 3, 3), metrics(10)[history.COSINES]
    )
    assert dataset.attrs == {"device": "cpu", "config": "{}"}


@pytest.mark.parametrize(("epoch", "kept"), [(10, [0, 3, 10]), (9, [0, 3]), (3, [0, 3]), (0, [0])])
def test_up_to_cuts_the_epochs_after(epoch, kept, grid):
    assert history.up_to(grown([0, 3, 10], grid), epoch)["epoch"].values.tolist() == kept


def test_extinct_runs_are_those_whose_outputs_weight_decay_has_put_to_0(grid):
    dataset = grown([0, 3], grid)
    dataset["epsilon"][:] = 0.5
    dataset["epsilon"].loc[
        {"split": "train", "epoch": 3, "weight_decay": 1e-3, "seed": [4, 5, 6]}
    ] = [
        0.9985,
        0.9995,
        1.0,
    ]
    dataset["delta"][:] = 0.0
    dataset["epsilon"].loc[{"split": "test", "epoch": 3}] = (
        1.0  # which tells nothing: the training split decides
    )
    out = history.extinct(dataset)
    assert out.dims == ("weight_decay", "learning_rate", "seed", "epoch")
    assert not out.sel(epoch=0).any()
    np.testing.assert_array_equal(
        out.sel(epoch=3).any(["learning_rate"]), [[False] * 3, [False, True, True]]
    )
    # Where a bias meets the sum of the outputs, epsilon is (C-1)/C of what decay has put out, and
    # delta the rest of 1.
    dataset["epsilon"][:], dataset["delta"][:] = 2 / 3, 1 / 3
    assert history.extinct(dataset).all()
    dataset["delta"][:] = 0.4  # worse than nothing is no case of it
    assert not history.extinct(dataset).any()
    dataset["epsilon"][:] = np.nan
    assert not history.extinct(dataset).any()  # diverged is not put out


def test_saving_and_loading_return_every_bit_and_attribute(grid, tmp_path):
    dataset, path = grown([0, 3], grid), tmp_path / "history.nc"
    history.save(dataset, path)
    loaded = history.load(path)
    # Names, attributes, values; not bits of NaN, nor types.
    xr.testing.assert_identical(loaded, dataset)
    for name in dataset.data_vars:
        assert loaded[name].dtype == dataset[name].dtype == np.float32
        assert loaded[name].values.tobytes() == dataset[name].values.tobytes(), name


def test_numbers_of_every_layer_are_kept_where_they_were_measured(grid, tmp_path):
    assert not set(LAYER_VOCABULARY) & set(grown([0, 3], grid))
    every = VOCABULARY | LAYER_VOCABULARY
    dataset, path = grown([0, 3], grid, every), tmp_path / "history.nc"
    assert set(every) <= set(dataset)
    history.save(dataset, path)
    xr.testing.assert_identical(history.load(path), dataset)
    for name, metric in LAYER_VOCABULARY.items():
        assert dataset[name].dims == (*grid.dims, "epoch", *metric.dims)
        assert dataset[name].attrs["definition"] == metric.definition
    journal.mend(tmp_path / "metrics.jsonl", dataset)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for epoch, line in zip((0, 3), lines, strict=True):
        found = json.loads(line)["metrics"]
        for name in LAYER_VOCABULARY:
            np.testing.assert_allclose(found[name], metrics(epoch, every)[name], rtol=1e-7)


def test_a_loaded_history_grows_as_one_that_stayed_in_memory(grid, tmp_path):
    straight, resumed, path = (
        tmp_path / "straight.nc",
        tmp_path / "resumed.nc",
        tmp_path / "history.nc",
    )
    history.save(grown([0, 3, 10], grid), straight)
    history.save(grown([0, 3], grid), path)
    history.save(history.append(history.load(path), labelled(10, grid)), resumed)
    assert_same_bits(history.load(resumed), history.load(straight))
    assert resumed.read_bytes() == straight.read_bytes()


def written_before_the_floor_was_one(grid):
    """A history in which nc3_floor is the nc3 of a symmetric solution, as it was defined; and its
    true floor.

    nc3 and nc3_centered are those of random heads (3, 4) and class means.
    """
    rng = np.random.default_rng(0)
    heads, means = rng.standard_normal((2, 2, 2, 3, 1, 3, 4))
    centred_heads, centred = (rows - rows.mean(-2, keepdims=True) for rows in (heads, means))

    def duality(rows, others):
        difference = rows / np.linalg.norm(rows, axis=(-2, -1), keepdims=True)
        difference = difference - others / np.linalg.norm(others, axis=(-2, -1), keepdims=True)
        return np.sum(difference**2, axis=(-2, -1))

    dataset = labelled(0, grid)
    dataset["nc3"].loc[{"split": "train"}] = duality(heads, centred)
    dataset["nc3_centered"].loc[{"split": "train"}] = duality(centred_heads, centred)
    symmetric = dataset["symmetric_nc3"]
    old = dataset.drop_vars(["symmetric_nc3", "nc3_floor"]).assign(nc3_floor=symmetric)
    old["nc3_floor"].attrs["definition"] = (
        "nc3 of a symmetric solution at equilibrium with the same mean outputs"
    )
    return old, duality(heads, centred_heads)


def test_an_older_history_is_read_with_todays_names_and_its_true_floor(grid, tmp_path):
    old, floor = written_before_the_floor_was_one(grid)
    history.save(old, tmp_path / "history.nc")
    loaded = history.load(tmp_path / "history.nc")
    np.testing.assert_array_equal(loaded["symmetric_nc3"], old["nc3_floor"])
    np.testing.assert_allclose(loaded["nc3_floor"], floor, atol=1e-5)
    assert history.missing(loaded) == ""
    for name in ("nc3_floor", "symmetric_nc3"):
        assert loaded[name].attrs["definition"] == VOCABULARY[name].definition
        assert (loaded[name].dtype, loaded[name].dims) == (np.float32, old["nc3_floor"].dims)
    # What was read is of today: written again it stays as it is, and it grows.
    history.save(loaded, tmp_path / "again.nc")
    assert_same_bits(history.load(tmp_path / "again.nc"), loaded)
    appended = history.append(loaded, labelled(10, grid))
    np.testing.assert_array_equal(
        appended["nc3_floor"].sel(epoch=10), labelled(10, grid)["nc3_floor"].sel(epoch=10)
    )


def test_a_history_of_today_without_symmetric_nc3_keeps_its_floor(grid, tmp_path):
    """Its definition says which of the two a variable is, not what stands beside it."""
    dataset = labelled(0, grid).drop_vars("symmetric_nc3")
    history.save(dataset, tmp_path / "history.nc")
    loaded = history.load(tmp_path / "history.nc")
    xr.testing.assert_identical(loaded.drop_vars("symmetric_nc3"), dataset)


def test_a_metric_that_an_older_version_did_not_have_is_nan(grid, tmp_path):
    whole = labelled(0, grid)
    names = ["nc0", "class_epsilon", "equilibrium_residual"]
    history.save(whole.drop_vars(names), tmp_path / "history.nc")
    loaded = history.load(tmp_path / "history.nc")
    xr.testing.assert_identical(loaded.drop_vars(names), whole.drop_vars(names))
    for name in names:
        assert loaded[name].dims == whole[name].dims
        assert loaded[name].attrs == whole[name].attrs | {history.UNKNOWN_UNTIL: 0}
        assert loaded[name].isnull().all()
    grown = history.append(loaded, labelled(10, grid))
    assert grown["nc0"].attrs[history.UNKNOWN_UNTIL] == 0
    np.testing.assert_array_equal(grown["nc0"].sel(epoch=10), labelled(10, grid)["nc0"][..., 0])


def test_saving_replaces_the_file_and_leaves_no_other(grid, tmp_path):
    path = tmp_path / "history.nc"
    path.write_bytes(b"older")
    history.save(grown([0], grid), path)
    assert history.load(path)["epoch"].values.tolist() == [0]
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "history.nc.sha256"]


def test_a_missing_history_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^history: got '.*/absent\.nc'; no such file"):
        history.load(tmp_path / "absent.nc")


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("damage", ["empty", "junk", "truncated"])
def test_a_damaged_history_is_named(damage, checksum, grid, tmp_path):
    path = tmp_path / "history.nc"
    history.save(grown([0], grid), path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "junk": b"no netCDF at all", "truncated": whole[: len(whole) // 2]}[damage]
    )
    reason = r"does not match history\.nc\.sha256"
    if not checksum:
        (tmp_path / "history.nc.sha256").unlink()
        reason = "not readable"
    with pytest.raises(InputError, match=rf"^history: got '.*/history\.nc'; {reason}"):
        history.load(path)


@pytest.mark.parametrize("name", ["history.nc", "history.nc.sha256"])
def test_every_flipped_bit_is_noticed(name, grid, tmp_path):
    path = tmp_path / "history.nc"
    history.save(grown([0], grid), path)
    whole = (tmp_path / name).read_bytes()
    for bit in np.random.default_rng(0).integers(
        8 * min(len(whole), 64 if name != "history.nc" else len(whole)), size=50
    ):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=r"does not match history\.nc\.sha256"):
            history.load(path)
