"""One history of several variants: every number of each is where its labels say, or NaN."""

import functools
import json

import numpy as np
import pytest
import xarray as xr

from ncjax import config as configuration
from ncjax.metrics.vocabulary import LAYER_VOCABULARY, VOCABULARY
from ncjax.storage import history, varied

SEEDS = (4, 5, 6)


def recorded(
    layers,
    labels,
    *,
    decays=(0.0, 1e-3),
    epochs=(0, 2),
    dtype=np.float32,
    vocabulary=VOCABULARY,
    **attrs,
):
    """A history whose numbers are all others."""
    config = configuration.default_config()
    config.sweep.weight_decay, config.sweep.seed = decays, SEEDS
    grid = configuration.make_grid(configuration.validate(config), len(labels))
    rng = np.random.default_rng(len(layers) + len(labels) + len(decays))
    sizes = {"split": 2, "layer": len(layers), "mode": len(labels), "label": len(labels)}
    made = None
    for epoch in epochs:
        metrics = {
            name: rng.standard_normal((grid.size, *(sizes[dim] for dim in metric.dims)))
            for name, metric in vocabulary.items()
        }
        metrics[history.COSINES] = rng.standard_normal((grid.size, len(labels), len(labels)))
        newest = history.one_epoch(
            epoch,
            {name: values.astype(dtype) for name, values in metrics.items()},
            grid=grid,
            layers=layers,
            label_names=labels,
            attrs={"device": "cpu", "config": configuration.to_json(config)} | attrs,
        )
        made = history.append(made, newest)
    return made


SHALLOW, DEEP = ("layer_1", "head"), ("layer_1", "layer_2", "layer_3", "head")
TWO, THREE = ("cat", "dog"), ("cat", "dog", "eel")


def assert_same(found, expected):
    assert set(found.data_vars) == set(expected.data_vars)
    for name, values in expected.data_vars.items():
        assert found[name].dims == values.dims
        np.testing.assert_array_equal(found[name].values, values.values)
        for dim in values.dims:
            assert found[dim].values.tolist() == values[dim].values.tolist()


@functools.cache
def differing():
    """Variants of other layers, classes, lambdas, epochs, precision and attributes."""
    deep = recorded(DEEP, THREE, per_class="20")
    deep["layer"].attrs["degree"] = [1, 1, 2, 1]
    wide = recorded(SHALLOW, TWO, decays=(0.0, 2e-3), epochs=(0, 1, 2), dtype=np.float64)
    return [recorded(SHALLOW, THREE, per_class="30"), deep, wide, recorded(SHALLOW, TWO)]


LABELS = {"depth": [2, 4], "kind": ["a", "b"]}


@functools.cache
def joined_and_saved(folder):
    joined = varied.join(differing(), LABELS, configuration.to_json(configuration.default_config()))
    history.save(joined, folder / "history.nc")
    return history.load(folder / "history.nc")


@pytest.fixture
def joined(tmp_path_factory):
    return joined_and_saved(tmp_path_factory.getbasetemp())


def test_every_number_is_where_its_labels_say_and_the_rest_is_nan(joined):
    parts = differing()
    assert joined["layer"].values.tolist() == list(DEEP)
    assert joined["label"].values.tolist() == list(THREE)
    assert joined["epoch"].values.tolist() == [0, 1, 2]
    assert sorted(joined["weight_decay"].values.tolist()) == [0.0, 1e-3, 2e-3]
    places = [(depth, kind) for depth in LABELS["depth"] for kind in LABELS["kind"]]
    for (depth, kind), part in zip(places, parts, strict=True):
        one = joined.sel(depth=depth, kind=kind)
        for name in (*VOCABULARY, history.COSINES):
            indexes = {dim: part[dim].values for dim in part[name].dims}
            np.testing.assert_array_equal(one[name].sel(indexes), part[name])
            finite = int(np.isfinite(one[name].values).sum())
            assert finite == part[name].size, name


def test_a_joined_history_splits_into_those_that_it_joins(joined):
    parts = differing()
    before = [part.copy(deep=True) for part in parts]
    split = varied.split(joined)
    assert [varied.words(one) for one in split] == [
        ["depth=2", "kind=a"],
        ["depth=2", "kind=b"],
        ["depth=4", "kind=a"],
        ["depth=4", "kind=b"],
    ]
    for found, expected, unchanged in zip(split, parts, before, strict=True):
        assert_same(found, expected)
        assert expected.identical(unchanged)
        assert found.attrs["config"] == expected.attrs["config"]
        assert found.attrs.get("per_class") == expected.attrs.get("per_class")
        degrees = np.atleast_1d(found["layer"].attrs.get("degree", [])).tolist()
        assert degrees == list(expected["layer"].attrs.get("degree", []))


def test_a_history_without_variants_is_its_only_part():
    one = recorded(SHALLOW, TWO)
    assert varied.dimensions(one) == []
    assert varied.words(one) == []
    (part,) = varied.split(one)
    assert part.identical(one)


def test_variants_that_are_alike_are_joined_without_a_change_of_type():
    joined = varied.join([recorded(SHALLOW, TWO)] * 2, {"kind": ["a", "b"]}, "{}")
    assert {joined[name].dtype for name in VOCABULARY} == {np.dtype(np.float32)}
    assert len(json.loads(joined.attrs["variants"])) == 2


def test_variants_keep_the_numbers_of_every_layer():
    every = VOCABULARY | LAYER_VOCABULARY
    parts = [recorded(layers, TWO, vocabulary=every) for layers in (SHALLOW, DEEP)]
    parts[1]["layer"].attrs["pairs"] = "relu linear linear"
    joined = varied.join(parts, {"depth": [2, 4]}, "{}")
    for found, expected in zip(varied.split(joined), parts, strict=True):
        assert_same(found, expected)
        assert found["layer"].attrs.get("pairs") == expected["layer"].attrs.get("pairs")


def test_epochs_that_are_cut_off_are_cut_off_in_every_part(joined):
    for part in varied.split(history.up_to(joined, 1)):
        assert part["epoch"].values.max() <= 1


@pytest.mark.parametrize(
    ("parts", "united"),
    [
        ([["a", "z"], ["a", "b", "z"]], ["a", "b", "z"]),
        ([["a", "z"], ["b", "z"]], ["a", "b", "z"]),
        ([["a", "b"], ["c"]], ["a", "b", "c"]),
        ([["conv_1", "head"], ["layer_1", "layer_2", "head"]], None),
    ],
)
def test_the_head_stays_behind_layers_of_any_variant(parts, united):
    arrays = [xr.DataArray(part, dims="layer", name="layer") for part in parts]
    found = varied._united(arrays).tolist()
    assert united is None or found == united
    assert sorted(found) == sorted({name for part in parts for name in part})
    if all(part[-1] == "head" for part in parts):
        assert found[-1] == "head"
