"""Figures and tables of variants: each is drawn and told by its name, from its own numbers."""

import io
import json
import re
import shlex

import numpy as np
import pytest
from rich.console import Console

from ncjax import config as configuration
from ncjax import variation
from ncjax.report import draw, figures, page, tables
from ncjax.storage import history, varied

LABELS = {"optimizer": ["sgd", "adamw"], "widths": ["8-8"]}


@pytest.fixture
def joined(trained):
    """Two variants, of which the second has other numbers and no layer_2."""
    first = history.load(trained / "history.nc")
    second = first.sel(layer=["layer_1", "head"])
    second = second.assign(nc1=2 * first["nc1"], nc3=first["nc3"] / 2)
    return varied.join([first, second], LABELS, first.attrs["config"])


def test_a_figure_that_compares_names_every_variant_and_draws_its_numbers(joined, trained):
    drawn = draw._compared({"": joined})
    figure = drawn["collapse_against_lambda"]()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["optimizer=sgd, widths=8-8", "optimizer=adamw, widths=8-8"]
    assert "n = 2 seeds" in legend.get_title().get_text()
    own = history.load(trained / "history.nc")["nc1"].sel(split="train", epoch=6)
    expected = {
        round(float(factor * value), 6) for factor in (1, 2) for value in own.mean("seed").values
    }
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert {round(float(line.get_ydata()[0]), 6) for line in lines} == expected


def test_every_variant_is_a_setting_with_its_own_layers(joined):
    settings = list(figures.settings(joined))
    assert [figures.setting_words(one) for one in settings] == [
        ["optimizer=sgd", "widths=8-8"],
        ["optimizer=adamw", "widths=8-8"],
    ]
    assert [one.sizes["layer"] for one in settings] == [3, 2]
    assert np.isfinite(settings[1]["equilibrium_residual"].sel(weight_decay=1e-3)).all()


def test_tables_have_a_row_for_every_variant_and_weight_decay(joined):
    text = io.StringIO()
    tables.show_results(joined, Console(file=text, width=400, force_terminal=False))
    lines = text.getvalue().splitlines()
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in lines if line.startswith("│")]
    collapse = [tuple(row[:3]) for row in rows[:4]]
    assert collapse == [
        ("sgd", "8-8", "0"),
        ("sgd", "8-8", "0.001"),
        ("adamw", "8-8", "0"),
        ("adamw", "8-8", "0.001"),
    ]
    headings = next(line for line in lines if "train acc" in line)
    place = re.split(r"\s*┃\s*", headings.strip("┃ ")).index("nc1")
    final = joined["nc1"].sel(split="train", widths="8-8", epoch=6)
    for row in rows[:4]:
        values = final.sel(optimizer=row[0], weight_decay=float(row[2])).values
        assert row[place] == tables.mean_and_sd(values)
    assert (
        sum(line.startswith("optimizer=adamw, widths=8-8: nc1 is least at") for line in lines) == 1
    )


def test_a_report_says_how_to_train_all_variants_again(joined):
    """The flags are those that the command line splits into the same values."""
    stored = variation.to_stored(
        configuration.from_json(joined.attrs["config"]),
        variation.make({"train.optimizer": ("sgd", "adamw"), "model.widths": ((8, 8), (4,))}),
    )
    described = page._described(
        page.Source("run", joined.assign_attrs(config=json.dumps(stored)), {})
    )
    flags = [shlex.split(flag)[0] for flag in described["vary"]]
    assert variation.split_arguments(["ncjax", *flags])[1] == {
        "model.widths": ["8,8", "4"],
        "train.optimizer": ["sgd", "adamw"],
    }
    assert any("optimizer=adamw" in line for line in described["sentences"])
