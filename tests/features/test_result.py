"""A Measurement: numbers by attribute and by name, as a table, as data."""

import numpy as np
import pytest

import ncjax
from ncjax.metrics.vocabulary import FEATURE_VOCABULARY, VOCABULARY

FEATURES = np.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]])
LABELS = np.array([0, 0, 1, 1])


@pytest.fixture(scope="module")
def measured():
    return ncjax.measure(FEATURES, LABELS, head=np.array([[1.0, 0.0], [-1.0, 0.0]]))


def test_attributes_and_names_are_the_same_numbers(measured):
    assert measured.cdnv == measured["cdnv"] == 0.0625
    assert measured.nc3 == pytest.approx(0, abs=1e-12)
    assert [*measured] == [name for name in FEATURE_VOCABULARY if name in measured]
    assert len(measured) == len(measured.metrics)
    assert {"nc1", "to_dataset", "notes"} <= {*dir(measured)}


def test_what_was_not_measured_is_said(measured):
    with pytest.raises(AttributeError, match=r"norm_target; it needs"):
        _ = measured.norm_target
    with pytest.raises(AttributeError, match=r"has no nc6$"):
        _ = measured.nc6
    with pytest.raises(KeyError):
        measured["nc6"]


def test_it_becomes_labelled_data(measured):
    data = measured.to_dataset()
    assert float(data["cdnv"]) == 0.0625
    assert data["cdnv"].attrs == VOCABULARY["cdnv"].attributes
    np.testing.assert_array_equal(data["examples"].sel(label=1), 2)
    np.testing.assert_allclose(data["class_variance"], 0.25)
    frame = measured.to_dataframe()
    assert frame.loc["cdnv", "value"] == 0.0625
    assert frame.loc["nc3", "best"] == 0
    assert [*frame.index] == [*measured]


def test_text_and_html_show_every_number_and_hide_no_markup(measured):
    for text in (repr(measured), measured._repr_html_()):
        assert all(name in text for name in measured)
        assert "0.0625" in text
        assert "4 examples of 2 classes, 2 features" in text
    assert VOCABULARY["nc3"].definition in repr(measured)
    hostile = ncjax.Measurement(
        {"nc1": 1.0, "<script>": 2.0},
        *(measured.examples, [], measured.spectrum, measured.within, measured.variances),
        measured.centred,
        notes=["<b>bold</b>"],
    )
    page = hostile._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page


def test_a_class_without_examples_has_no_row():
    found = ncjax.measure(FEATURES, 2 * LABELS)
    assert found.missing == [1]
    assert found.to_dataset()["label"].values.tolist() == [0, 2]
