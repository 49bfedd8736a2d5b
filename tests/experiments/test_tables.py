"""Tables of the documents: that they hold what the histories say, and that a cell which does not
is found.
"""

import re

import numpy as np
import pytest
import xarray as xr
from scipy.io import netcdf_file

from configs import digits
from experiments import common, tables
from ncjax.errors import InputError
from tests.helpers import ROOT

RESULTS = (ROOT / "docs" / "results.md").read_text()


def headline():
    """Rows of the first table of docs/results.md, by lambda."""
    lines = RESULTS.split("<!-- table: digits.collapse -->\n")[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


@pytest.mark.slow
def test_every_table_of_the_documents_is_what_the_histories_say(capsys):
    assert tables.main([]) == 0
    printed = capsys.readouterr().out
    assert "docs/results.md:" in printed
    assert int(re.search(r"(\d+) cells compared, 0 differ", printed)[1]) > 500


def test_the_headline_is_mean_and_sd_of_ten_seeds():
    """Against the file, by scipy and NumPy alone."""
    with netcdf_file(ROOT / "experiments" / "histories" / "digits.nc", mmap=False) as file:
        nc3, accuracy = (
            np.array(file.variables[name][:], np.float64) for name in ("nc3", "accuracy")
        )
        decays, seeds = (file.variables[name][:].tolist() for name in ("weight_decay", "seed"))
    assert decays == [0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert seeds == list(range(10))
    for name, values, split in (("nc3", nc3, 0), ("test acc", accuracy, 1)):
        for lam, of_lambda in zip(headline().values(), values[:, :, -1, split], strict=True):
            mean, sd = map(float, lam[name].split(" ± "))
            assert mean == pytest.approx(of_lambda.mean(), rel=5e-3)
            assert sd == pytest.approx(of_lambda.std(ddof=1), rel=0.5)


def test_a_changed_cell_is_found_and_put_right():
    cell = headline()["1e-3"]["nc1"]
    findings, corrected = tables.check(RESULTS.replace(cell, "0.123"))
    (wrong,) = [found for found in findings if found.differences]
    assert wrong.name == "digits.collapse"
    assert wrong.differences == [f"row 4 (1e-3), column 3: 0.123; computed: {cell}"]
    assert corrected == RESULTS


@pytest.mark.parametrize(
    ("change", "cells", "differences"),
    [
        (lambda lines: lines[:-1], 70, 10),
        (lambda lines: [*lines, "|" + "1|" * 10], 80, 10),
        (lambda lines: [lines[0] + " new |", lines[1] + "---|", *lines[2:]], 71, 1),
    ],
    ids=["row_missing", "row_too_many", "heading_too_many"],
)
def test_rows_and_columns_are_counted(change, cells, differences):
    marker = "<!-- table: digits.collapse -->\n"
    table = RESULTS.split(marker)[1].split("\n\n")[0]
    (found,), corrected = tables.check(marker + "\n".join(change(table.splitlines())) + "\n")
    assert (found.cells, len(found.differences)) == (cells, differences)
    assert corrected == marker + table + "\n"


@pytest.mark.parametrize(
    "above",
    ["", "words", "<!-- not from histories: -->", "<!-- table: digits -->"],
    ids=["none", "words", "reason", "name"],
)
def test_a_table_that_does_not_say_where_it_is_from_counts_as_different(above):
    (found,), _ = tables.check(f"text\n\n{above}\na | b\n---|---\n1 | 2\n")
    assert len(found.differences) == 1
    assert found.line == 4


def test_a_table_with_a_reason_is_left_alone():
    text = "text\n\n<!-- not from histories: timings -->\n| a |\n|---|\n| 1 |\n"
    assert tables.check(text) == ([], text)


@pytest.mark.parametrize("name", ["digits.nothing", "nothing.collapse"])
def test_a_marker_of_nothing_is_named(name):
    with pytest.raises(InputError, match=name):
        tables.check(f"<!-- table: {name} -->\n| a |\n|---|\n")


def test_a_difference_is_an_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "REPO", tmp_path)
    cell = headline()["0"]["nc3"]
    (tmp_path / "README.md").write_text(RESULTS.replace(cell, "0"))
    assert tables.main([]) == 1
    assert "1 differ\n" in capsys.readouterr().out
    assert tables.main(["--write"]) == 0
    assert (tmp_path / "README.md").read_text() == RESULTS


def test_a_history_of_another_config_is_refused():
    config = common.changed(digits.get_config(), sweep__seed=tuple(range(10)), train__epochs=299)
    with pytest.raises(InputError, match=r"train\.epochs is 299 here and 300 there"):
        common.recorded("digits", config, train=False)


def test_a_history_that_was_not_trained_is_named():
    with pytest.raises(InputError, match=r"nothing\.nc"):
        common.recorded("nothing", digits.get_config(), train=False)


def test_cells_are_mean_and_sd_and_the_least_is_bold():
    values = xr.DataArray([[2.0, 4.0], [1e-4, 3e-4], [0.5, 0.5]], dims=("weight_decay", "seed"))
    assert common.per_decay(values, least_in_bold=True) == [
        "3.0 ± 1.4",
        "**2.0e-4 ± 1.4e-4**",
        "0.5",
    ]
    assert [common.number(x) for x in (0.0, 1e-4, 2.5e-3, 0.01, 3.0)] == [
        "0",
        "1e-4",
        "2.5e-3",
        "0.01",
        "3",
    ]


@pytest.mark.parametrize("pattern", ["decay_*.nc", "depth_*.nc", "digits*.nc"])
def test_tables_of_digits_are_of_five_seeds_or_more(pattern):
    paths = sorted((ROOT / "experiments" / "histories").glob(pattern))
    assert len(paths) >= 4
    for path in paths:
        with netcdf_file(path, mmap=False) as file:
            assert file.variables["seed"][:].tolist()[:5] == list(range(5)), path.name
            if pattern.startswith("decay") and "decoupled" not in path.name:
                assert file.variables["weight_decay"][0] == 0, path.name


def test_decay_has_both_losses_for_every_optimizer():
    text = (ROOT / "experiments" / "decay" / "README.md").read_text()
    by_loss = [table.split("\n\n")[0] for table in text.split("<!-- table: decay.")[1:]]
    assert [
        re.findall(r"^\| (SGD, \w+|Adam\w*(?:, \w+)?) \|", table, re.MULTILINE) for table in by_loss
    ] == 2 * [4 * ["SGD, coupled"] + 3 * ["SGD, decoupled"] + 4 * ["Adam, coupled"] + 5 * ["AdamW"]]


@pytest.mark.parametrize("common_row", [0.0, 0.1, 10.0])
def test_the_sum_of_the_heads_rows_follows_from_the_floor_of_nc3(common_row):
    head = np.random.default_rng(0).normal(size=(10, 32)) + common_row
    centred = np.linalg.norm(head - head.mean(axis=0)) / np.linalg.norm(head)
    run = xr.Dataset({"nc3_floor": 2 - 2 * centred}, {"label": range(10)})
    direct = np.sum(head.sum(axis=0) ** 2) / np.sum(head**2)
    assert float(common.sum_of_rows(run)) == pytest.approx(direct, rel=1e-12)
