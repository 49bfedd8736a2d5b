"""config: what is accepted, what is refused and in which words, and the grid."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from ncjax import config as configuration
from ncjax import plan
from ncjax.errors import InputError
from tests.helpers import ROOT


def with_value(name, value):
    config = configuration.default_config()
    config.update({name: value})
    return config


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("train.epochs", 0, "0"),
        ("train.epochs", -3, "-3"),
        ("train.epochs", 2.5, "2.5"),
        ("train.epochs", True, "True"),
        ("train.epochs", "ten", "'ten'"),
        ("train.batch_size", -1, "-1"),
        ("train.schedule", "linear", "'linear'"),
        ("train.precision", "bfloat16", "'bfloat16'"),
        ("train.optimizer", "lion", "'lion'"),
        ("train.decay", True, "True"),
        ("loss", "hinge", "'hinge'"),
        ("targets", ("one_hot",), "('one_hot',)"),
        ("model.linear_head_depth", 0, "0"),
        ("model.linear_head_depth", 1.5, "1.5"),
        ("model.activation", "tanh", "'tanh'"),
        ("model.head_bias", None, "None"),
        ("model.widths", (), "()"),
        ("model.widths", (64, 0), "(64, 0)"),
        ("model.widths", (64, 1.5), "1.5"),
        ("data.name", "", "''"),
        ("data.input_scale", 0.0, "0.0"),
        ("data.input_scale", math.inf, "inf"),
        ("data.per_class", -1, "-1"),
        ("data.standardize", 1, "1"),
        ("sweep.weight_decay", -1e-3, "-0.001"),
        ("sweep.weight_decay", (1e-3, math.nan), "nan"),
        ("sweep.weight_decay", (math.inf,), "inf"),
        ("sweep.weight_decay", (), "()"),
        ("sweep.weight_decay", ("1e-3",), "'1e-3'"),
        ("sweep.weight_decay", "1e-3", "'1e-3'"),
        ("sweep.weight_decay", (0.0, 1e-3, 0.0), "0.0"),
        ("sweep.learning_rate", (0.1, 0.0), "0.0"),
        ("sweep.momentum", (0.9, 1), "1"),
        ("sweep.momentum", -0.1, "-0.1"),
        ("sweep.init_scale", 0, "0"),
        ("sweep.seed", (0, 1, 1), "1"),
        ("sweep.seed", -1, "-1"),
        ("sweep.seed", 2**31, str(2**31)),
        ("sweep.seed", (), "()"),
        ("log.epochs", (0, 301), "301"),
        ("log.epochs", (-1,), "-1"),
        ("units", "pytorch", "'pytorch'"),
        ("checkpoint.keep", 0, "0"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_value(name, value, shown):
    with pytest.raises(InputError) as caught:
        configuration.validate(with_value(name, value))
    field, _, rest = str(caught.value).partition(": got ")
    got, _, way_out = rest.partition("; ")
    assert field == f"config.{name}"
    assert shown in got
    assert way_out


def with_values(**values):
    config = configuration.default_config()
    config.update({name.replace("__", "."): value for name, value in values.items()})
    return config


@pytest.mark.parametrize(
    ("values", "field", "way_out"),
    [
        (
            {"train__optimizer": "adam", "train__decay": "decoupled"},
            "train.decay",
            "train.optimizer=adamw",
        ),
        ({"loss": "cross_entropy", "targets": "centered"}, "targets", "one_hot"),
        ({"model__linear_head_depth": 4}, "model.linear_head_depth", "3 hidden layers"),
        (
            {"model__linear_head_depth": 2, "model__widths": (64,)},
            "model.linear_head_depth",
            "1 hidden layers",
        ),
        (
            {"model__linear_head_depth": 2, "model__activation": "linear"},
            "model.linear_head_depth",
            "leave it 1",
        ),
        (
            {"model__linear_input_depth": 3, "model__linear_head_depth": 2},
            "model.linear_input_depth",
            "3 hidden layers",
        ),
        (
            {"model__linear_input_depth": 2, "model__activation": "linear"},
            "model.linear_input_depth",
            "leave it 1",
        ),
    ],
)
def test_choices_that_exclude_each_other_are_refused_with_a_way_out(values, field, way_out):
    with pytest.raises(InputError) as caught:
        configuration.validate(with_values(**values))
    message = str(caught.value)
    assert message.startswith(f"config.{field}: got {values[field.replace('.', '__')]!r}; ")
    assert way_out in message


@pytest.mark.parametrize(
    "values",
    [
        {"train__optimizer": "adam"},
        {"train__decay": "decoupled"},
        {"loss": "cross_entropy"},
        {"targets": "centered", "model__head_bias": "decayed"},
        {"model__linear_head_depth": 3},
        {"model__linear_head_depth": 2, "model__linear_input_depth": 2},
        {"model__widths": (8,), "model__activation": "linear"},
    ],
)
def test_choices_that_go_together_are_kept_as_they_are(values):
    config = with_values(**values)
    assert configuration.validate(config) == config


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_adamw_is_decoupled_and_the_valid_config_says_so(decay):
    config = with_values(train__optimizer="adamw", train__decay=decay)
    assert configuration.validate(config).train.decay == "decoupled"
    assert config.train.decay == decay


@pytest.mark.parametrize(
    ("name", "value"), [("train.lr", 0.1), ("sweep.wd", (1e-3,)), ("momentum", 0.9)]
)
def test_an_unknown_field_is_refused_by_name(name, value):
    nested = configuration.to_mapping(configuration.default_config())
    section, _, leaf = name.rpartition(".")
    (nested[section] if section else nested)[leaf] = value
    with pytest.raises(InputError, match=rf"^config\.{name}: got .*no such field"):
        configuration.from_mapping(nested)


def test_a_missing_field_is_refused_by_name():
    nested = configuration.to_mapping(configuration.default_config())
    del nested["train"]["epochs"]
    with pytest.raises(InputError, match=r"^config\.train\.epochs: got 'nothing'"):
        configuration.from_mapping(nested)


@pytest.mark.parametrize(
    ("section", "name", "near"), [("train", "epoch", "epochs"), ("sweep", "seeds", "seed")]
)
def test_setting_a_field_that_does_not_exist_names_a_near_one(section, name, near):
    config = configuration.default_config()
    with pytest.raises(AttributeError, match=rf"no field {name}; did you mean {near}\?"):
        setattr(getattr(config, section), name, 1)


def test_a_section_that_is_none_is_refused_by_name():
    with pytest.raises(InputError, match=r"^config\.train: got 3; no such field"):
        configuration.validate(with_value("train", 3))


def test_two_configs_share_no_section():
    changed = with_value("train.epochs", 7)
    assert changed != configuration.default_config()
    assert configuration.default_config().train.epochs == 300


def test_a_type_checker_sees_a_wrong_field_and_a_wrong_choice(tmp_path):
    """Pyright reports both lines, and no other."""
    pytest.importorskip("pyright")
    source = tmp_path / "mine.py"
    source.write_text(
        "from ncjax.config import default_config\n"
        "config = default_config()\n"
        "config.train.epochs = 3\n"
        "config.train.epcohs = 3\n"
        "config.train.optimizer = 'SGD'\n"
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", f"--pythonpath={sys.executable}"]
    found = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=ROOT)
    errors = json.loads(found.stdout)["generalDiagnostics"]
    assert [error["range"]["start"]["line"] + 1 for error in errors] == [4, 5]


def test_defaults_are_valid_and_validation_leaves_its_argument_alone():
    config = configuration.default_config()
    assert configuration.validate(config) == config == configuration.default_config()
    config.sweep.seed = 3
    configuration.validate(config)
    assert config.sweep.seed == 3


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sweep.weight_decay", 1e-4, (1e-4,)),
        ("sweep.weight_decay", 0, (0,)),
        ("sweep.weight_decay", [0.0, 1e-4], (0.0, 1e-4)),
        ("sweep.weight_decay", tuple(np.logspace(-4, -2, 3)), (1e-4, 1e-3, 1e-2)),
        ("sweep.seed", 7, (7,)),
        ("model.widths", 64, (64,)),
        ("log.epochs", 300, (300,)),
        ("data.input_scale", 3, 3.0),
    ],
)
def test_scalars_and_lists_become_tuples_and_whole_numbers_floats(name, value, expected):
    valid = configuration.validate(with_value(name, value))
    found = configuration.flatten(configuration.to_mapping(valid))[name]
    assert found == pytest.approx(expected)
    assert isinstance(found, type(expected))


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 12, 60, 300, 5000])
def test_log_spaced_epochs_reach_from_0_to_the_last_in_at_most_12_rising_steps(epochs):
    points = configuration.log_spaced_epochs(epochs)
    assert (points[0], points[-1]) == (0, epochs)
    assert all(a < b for a, b in itertools.pairwise(points))
    assert len(points) == min(12, len(points))
    assert 1 in points


def test_log_spaced_epochs_by_hand():
    # 10^(0, 0.3, ..., 3) rounded, and 0.
    assert configuration.log_spaced_epochs(1000) == (0, 1, 2, 4, 8, 16, 32, 63, 126, 251, 501, 1000)


def grid(num_classes=10, **sweep):
    config = configuration.default_config()
    config.units = sweep.pop("units", "ours")
    for name, values in sweep.items():
        config.update({f"sweep.{name}": values})
    return configuration.make_grid(configuration.validate(config), num_classes)


def test_column_r_is_the_grid_point_of_unravel_index_r():
    sweep = {"weight_decay": (0.0, 1e-3, 1e-2), "learning_rate": (0.1, 0.2), "seed": (5, 6, 7, 8)}
    swept = grid(**sweep)
    assert swept.dims == ("weight_decay", "learning_rate", "seed")
    assert (swept.shape, swept.size) == ((3, 2, 4), 24)
    columns = swept.columns()
    for r in range(swept.size):
        for name, i in zip(swept.dims, np.unravel_index(r, swept.shape), strict=True):
            assert columns[name][r] == sweep[name][i]
    assert columns["momentum"] == [0.9] * 24
    assert columns["init_scale"] == [1.0] * 24


def test_places_are_the_rows_of_the_columns_and_found_by_their_coordinates():
    swept = grid(weight_decay=(0.0, 1e-3), momentum=(0.0, 0.9), seed=(3, 1, 2))
    columns = swept.columns()
    places = swept.places()
    assert [place.index for place in places] == list(range(swept.size))
    for place in places:
        assert place.coordinates == {name: columns[name][place.index] for name in columns}
        assert swept.find(place.coordinates) == place


def test_a_run_is_found_within_rounding_and_without_axes_of_one_value():
    swept = configuration.Grid({"weight_decay": [0.0, 0.1], "momentum": [0.5], "seed": [3, 1]})
    found = swept.find({"weight_decay": 0.1 * (1 + 1e-10), "seed": "1"})
    assert found == configuration.Place(3, {"weight_decay": 0.1, "momentum": 0.5, "seed": 1})


@pytest.mark.parametrize(
    ("coordinates", "field"),
    [
        ({"weight_decay": 0.2, "seed": 1}, "weight_decay"),
        ({"weight_decay": 0.1, "seed": "x"}, "seed"),
        ({"weight_decay": 0.1}, "run"),
        ({"weight_decay": 0.1, "seed": 1, "width": 3}, "width"),
    ],
)
def test_coordinates_of_no_run_and_of_several_are_refused(coordinates, field):
    swept = configuration.Grid({"weight_decay": [0.0, 0.1], "momentum": [0.5], "seed": [3, 1]})
    with pytest.raises(InputError, match=f"^{field}: got "):
        swept.find(coordinates)


def test_values_by_run_unflatten_to_the_dimensions():
    swept = configuration.Grid({"weight_decay": [0.0, 0.1], "momentum": [0.5], "seed": [3, 1, 2]})
    by_run = np.arange(6 * 4).reshape(6, 4)
    assert swept.dim_values == {"weight_decay": [0.0, 0.1], "seed": [3, 1, 2]}
    np.testing.assert_array_equal(swept.unflatten(by_run)[1, 2], by_run[5])


def test_weight_decay_and_seed_are_dimensions_even_of_one_run():
    assert grid(weight_decay=1e-3, seed=0).dims == ("weight_decay", "seed")


@pytest.mark.parametrize(
    ("optimizer", "loss", "weight_decay", "learning_rate", "adam_eps"),
    [
        ("sgd", "square", 5, 1 / 5, 1),
        ("adam", "square", 5, 1, 5),
        ("adamw", "square", 1, 1, 5),
        ("sgd", "cross_entropy", 1, 1, 1),
        ("adam", "cross_entropy", 1, 1, 1),
        ("adamw", "cross_entropy", 1, 1, 1),
    ],
)
def test_factors_from_torch_units_to_ours_with_10_classes(
    optimizer, loss, weight_decay, learning_rate, adam_eps
):
    """MSELoss has 2/C of our gradient: lambda = wd C/2 where decay joins it, and only SGD's step
    feels its scale.
    """
    config = with_values(units="torch", loss=loss, train__optimizer=optimizer)
    assert configuration.unit_factors(config, 10) == (weight_decay, learning_rate, adam_eps)
    assert configuration.unit_factors(with_values(loss=loss, train__optimizer=optimizer), 10) == (
        1,
        1,
        1,
    )


def test_decoupled_sgd_in_torch_units_keeps_the_product_of_rate_and_decay():
    """Its decay acts as lr wd w, whatever the loss is scaled by."""
    config = with_values(units="torch", train__decay="decoupled")
    units = configuration.unit_factors(config, 10)
    assert units.learning_rate * units.weight_decay == 1
    assert units.learning_rate == 1 / 5


@pytest.mark.parametrize(
    ("num_classes", "weight_decay", "learning_rate"),
    [(10, 2.5e-3, 0.0134), (2, 5e-4, 0.067), (100, 2.5e-2, 0.00134)],
)
def test_torch_units_become_ours(num_classes, weight_decay, learning_rate):
    swept = grid(
        num_classes, units="torch", weight_decay=(0.0, 5e-4), learning_rate=0.067, momentum=0.9
    )
    assert swept.axes["weight_decay"] == pytest.approx((0.0, weight_decay), rel=1e-14)
    assert swept.axes["learning_rate"] == pytest.approx((learning_rate,), rel=1e-14)
    assert swept.axes["momentum"] == (0.9,)


def test_differences_name_field_and_both_values():
    config = configuration.validate(configuration.default_config())
    stored = json.loads(configuration.to_json(config))
    assert configuration.differences(config, stored) == []
    stored["train"]["epochs"] = 7
    stored["sweep"]["seed"] = [0, 1]
    stored["units"] = "torch"
    # Younger than what was stored: their defaults.
    del (
        stored["train"]["augment"],
        stored["checkpoint"]["marked"],
    )
    seeds, epochs, units = configuration.differences(config, stored)
    assert seeds.startswith("config.sweep.seed is ")
    assert seeds.endswith("there")
    assert epochs == "config.train.epochs is 300 here and 7 there"
    assert units == "config.units is 'ours' here and 'torch' there"


def test_every_field_is_described():
    text = configuration.describe_fields()
    for name, field in configuration.SCHEMA.items():
        assert f"--config.{name}=" in text
        assert field.meaning in text


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("sweep.momentum", (0.9, 0.9999999999), "0.9999999999"),  # 1
        ("sweep.momentum", (0.9999999,), "0.9999999"),  # 0.99999988
        ("sweep.momentum", (1e-50,), "1e-50"),  # 0
        ("sweep.weight_decay", (0.0, 1e-50), "1e-50"),
        ("sweep.weight_decay", (1e-40,), "1e-40"),  # subnormal
        ("sweep.weight_decay", (1e-3, 1.00000001e-3), "0.00100000001"),  # one number
        ("sweep.weight_decay", (1e39,), "1e+39"),  # infinity
        ("sweep.learning_rate", (1e-50,), "1e-50"),
        ("sweep.learning_rate", (1e39,), "1e+39"),
        ("sweep.learning_rate", (0.1, 0.1000000001), "0.1000000001"),
        ("sweep.init_scale", (1e-50,), "1e-50"),
        ("sweep.init_scale", (1e39,), "1e+39"),
        ("data.input_scale", 1e-50, "1e-50"),
        ("data.input_scale", 1e39, "1e+39"),
    ],
)
def test_numbers_that_float32_takes_for_others_are_refused_and_float64_holds_them(
    name, values, shown
):
    config = with_value(name, values)
    with pytest.raises(InputError) as caught:
        configuration.validate(config)
    assert str(caught.value).startswith(f"config.{name}: got {shown}; ")
    assert "config.train.precision=float64" in str(caught.value)
    config.train.precision = "float64"
    configuration.validate(config)


@pytest.mark.parametrize(
    ("name", "values", "precision"),
    [
        ("sweep.momentum", (0.0, 0.99999), "float32"),
        ("sweep.weight_decay", (0.0, 1.2e-38, 3.4e38), "float32"),
        (
            "sweep.weight_decay",
            (1e-3, 1.000001e-3),
            "float32",
        ),  # 8.6 units in the last place of float32 apart
        ("sweep.learning_rate", (0.99999999,), "float32"),  # rounds to 1, as all others round
        ("sweep.momentum", (math.nextafter(1, 0),), "float64"),
        ("sweep.weight_decay", (2.3e-308, 1e308), "float64"),
    ],
)
def test_numbers_that_the_precision_holds_are_accepted(name, values, precision):
    config = with_value(name, values)
    config.train.precision = precision
    assert (
        configuration.flatten(configuration.to_mapping(configuration.validate(config)))[name]
        == values
    )


def test_subnormal_numbers_of_float64_are_refused():
    config = with_value("sweep.weight_decay", (1e-320,))
    config.train.precision = "float64"
    with pytest.raises(InputError, match=r"float64 holds numbers from 2\.23e-308"):
        configuration.validate(config)


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("weight_decay", 1e38, "5e+38"),
        ("learning_rate", 2e-38, "4e-39"),
        ("weight_decay", 2e-38, None),
    ],
)
def test_what_leaves_the_precision_on_its_way_from_torch_units_is_refused(name, value, used):
    """lambda = wd C/2 and, of SGD, lr = 2 lr/C: with ten classes factors of 5 and 1/5."""
    config = configuration.validate(with_values(units="torch", **{f"sweep__{name}": (value,)}))
    if used is None:
        configuration.check_units(config, 10)
        return
    with pytest.raises(InputError, match=f"^config.sweep.{name}: got ") as caught:
        configuration.check_units(config, 10)
    assert f"(training would use {used})" in str(caught.value)


def test_preflight_refuses_what_is_lost_in_units_and_scales():
    for values in (
        {"units": "torch", "sweep__weight_decay": (1e38,)},
        {"data__input_scale": 5e-38},
    ):
        with pytest.raises(InputError, match="training would use"):
            plan.examine(with_values(data__name="synthetic", **values), None)


def test_factors_on_weight_decay_are_axes_where_they_are_not_1():
    config = configuration.default_config()
    assert list(configuration.make_grid(config, 10).axes) == list(configuration.SWEPT)
    config.decay.hidden, config.decay.head = (1.0, 0.5), (2.0,)
    grid = configuration.make_grid(configuration.validate(config), 10)
    assert grid.axes["decay_hidden"] == (1.0, 0.5)
    assert grid.axes["decay_head"] == (2.0,)
    assert grid.dims == ("weight_decay", "decay_hidden", "seed")
    assert list(grid.axes)[-1] == "seed"


@pytest.mark.parametrize(
    ("field", "value"), [("hidden", -1.0), ("head", ()), ("hidden", (1.0, 1.0)), ("bias", 2.0)]
)
def test_a_factor_that_there_cannot_be_is_one_line(field, value):
    """Of a bias that is not there, too."""
    config = configuration.default_config()
    setattr(config.decay, field, value)
    with pytest.raises(InputError, match=f"^config.decay.{field}: got "):
        configuration.validate(config)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"kind": "residual", "widths": (4, 5)}, "widths"),
        ({"kind": "residual", "linear_head_depth": 2}, "linear_head_depth"),
        ({"kind": "residual", "linear_input_depth": 2}, "linear_input_depth"),
        ({"kind": "resnet18"}, "widths"),
        ({"kind": "resnet18", "widths": (4, 4, 4, 4)}, "normalization"),
        ({"kind": "conv", "normalization": "layer"}, "normalization"),
    ],
)
def test_a_network_that_there_is_not_is_one_line(values, field):
    config = configuration.default_config()
    config.update({f"model.{name}": value for name, value in values.items()})
    with pytest.raises(InputError, match=f"^config.model.{field}: got "):
        configuration.validate(config)
