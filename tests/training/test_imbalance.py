"""Metrics by class, against their definitions; what classes of different sizes leave undefined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax.metrics import collapse
from ncjax.metrics.vocabulary import VOCABULARY
from ncjax.report import draw
from ncjax.training import program
from tests.helpers import oracle_by_class, run, simplex_etf
from tests.training.test_program import setup

BY_CLASS = [name for name, metric in VOCABULARY.items() if "label" in metric.dims]
UNDEFINED = [name for name, metric in VOCABULARY.items() if metric.of_equal_classes]


def unequal(data):
    """Data of `setup` with 20, 12 and 5 training examples of the three classes."""
    kept = np.concatenate(
        [np.flatnonzero(np.asarray(data.train.labels) == c)[:n] for c, n in enumerate((20, 12, 5))]
    )
    train = type(data.train)(*(jnp.asarray(np.asarray(a)[kept]) for a in data.train))
    return data._replace(train=train)


def measured():
    recipe, _, data, (states, _, hyper) = setup(dtype=np.float64)
    data = unequal(data)
    recipe = recipe._replace(train_size=37, is_balanced=False)
    stacked = jax.tree.map(lambda a: a[3:4], (states.variables, hyper))
    one = jax.tree.map(lambda a: a[0], stacked)
    with jax.enable_x64(True):
        measure = jax.jit(lambda v, h: program.measure(v, h, data, recipe, "cpu"))
        values = jax.tree.map(lambda a: a[0], measure(*stacked))
        features, outputs = {}, {}
        for name in ("train", "test"):
            x = data.normalize(getattr(data, name).images)
            features[name] = np.asarray(recipe.model.apply(one[0], x, method="features"))
            outputs[name] = np.asarray(recipe.model.apply(one[0], x))
    return (
        jax.device_get(values),
        data,
        features,
        outputs,
        np.asarray(one[0]["params"]["head"]["kernel"]).T,
    )


@pytest.fixture(scope="module")
def unequal_run():
    return measured()


def test_metrics_by_class_are_those_of_their_definition(unequal_run):
    values, data, features, outputs, head = unequal_run
    expected = {
        name: oracle_by_class(
            features[name], outputs[name], np.asarray(getattr(data, name).labels), head
        )
        for name in ("train", "test")
    }
    for name in BY_CLASS:
        by_split = np.stack([expected[split][name] for split in ("train", "test")])
        if VOCABULARY[name].dims == ("label",):
            by_split = by_split[0]
        np.testing.assert_allclose(values[name], by_split, rtol=1e-10, err_msg=name)


def test_of_equal_classes_alone_is_nan_and_all_else_is_not(unequal_run):
    values = unequal_run[0]
    assert {"theorem_residual", "budget_residual", "predicted_head_norm_sq"} <= set(UNDEFINED)
    for name, value in values.items():
        assert np.isnan(value).all() if name in UNDEFINED else np.isfinite(value).all(), name


def test_identities_that_need_no_balance_hold(unequal_run):
    assert unequal_run[0]["lemma2_residual"] < 1e-12


def test_the_nearest_other_row_of_a_simplex_etf_is_at_its_angle_and_of_merged_rows_at_1():
    with jax.enable_x64(True):
        found = collapse.largest_cosines(jnp.asarray(3 * simplex_etf(4, 6)))
        merged = collapse.largest_cosines(jnp.array([[1.0, 0], [0, 1], [0, 3]]))
    np.testing.assert_allclose(found, -1 / 3, atol=1e-12)
    np.testing.assert_allclose(merged, [0, 1, 1], atol=1e-12)


def test_metrics_by_class_are_no_part_of_a_measurement_of_features():
    found = ncjax.measure(np.random.default_rng(0).standard_normal((6, 4)), [0, 0, 1, 1, 2, 2])
    assert not set(found) & set(BY_CLASS)


@pytest.mark.slow
def test_a_run_of_unequal_classes_records_their_sizes_draws_and_says_what_is_missing(
    tmp_path, capsys
):
    histories = {}
    for ratio in (1, 4):
        changes = {"data__classes": f"step:{ratio}:1", "data__per_class": 20}
        history = run(tmp_path / str(ratio), data__name="digits", data__num_classes=0, **changes)
        histories[str(ratio)] = history
        said = capsys.readouterr().out
        assert ("classes have 5 to 20 training examples" in said) == (ratio == 4)
        assert history["theorem_residual"].isnull().all() == (ratio == 4)
        assert history["closed_form_epsilon"].isnull().all()
    assert histories["4"].attrs["class_sizes"] == str([20] * 9 + [5])
    assert histories["4"]["class_accuracy"].dims[-2:] == ("split", "label")
    names = {path.name for path in draw.draw_all(histories["4"], tmp_path / "figures")}
    assert "budget_against_epoch.png" not in names
    compared = {path.name for path in draw.draw_comparison(histories, tmp_path / "compared")}
    assert "minority_against_ratio.png" in compared
