"""What a run says when it is done, of small made-up histories."""

import io
import json
import re
import sys
from unittest import mock

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from ncjax.report import tables

DECAYS, EPOCHS = (0.0, 1e-3, 1e-2), (0, 100)
PROVENANCE = {"config": json.dumps({"model": {"widths": [64, 64]}}), "per_class": "5"}


def make_history(seeds=2, learning_rates=None, **last):
    """Every variable that a line reads, at `EPOCHS`; `last` holds values at the last epoch, (decay,
    [rate,] seed).

    Those of earlier epochs are far off: a line about the end must not read them.
    """
    coords = {"weight_decay": list(DECAYS), "seed": list(range(seeds)), "epoch": list(EPOCHS)}
    coords |= {"split": ["train", "test"], "layer": ["layer_1", "head"], "label": list(range(10))}
    dims = ["weight_decay", "seed"]
    if learning_rates:
        coords["learning_rate"] = list(learning_rates)
        dims.insert(1, "learning_rate")
    shape = [len(coords[name]) for name in dims]
    defaults = {
        "nc1": 0.3,
        "nc3": 0.4,
        "epsilon": 0.1,
        "relaxation_time": 5.0,
        "finite": 1.0,
        "weight_norm_sq": 2.0,
    }
    defaults |= {"delta": 0.0, "nc1_rank": 9.0, "accuracy": 0.9}
    defaults |= dict.fromkeys(
        ("closed_form_epsilon", "closed_form_nc3", "closed_form_norm_sq"), np.nan
    )
    further = dict.fromkeys(("nc1", "nc1_rank", "nc3", "epsilon", "delta", "accuracy"), "split")
    further["weight_norm_sq"] = "layer"
    variables = {}
    for name, default in (defaults | last).items():
        end = np.broadcast_to(
            np.reshape(default, (*np.shape(default), *[1] * (len(shape) - np.ndim(default)))), shape
        )
        values = np.stack([np.full(shape, 77.0), end], axis=-1)
        extra = [further[name]] if name in further else []
        if extra:  # the other split and layer are off, too
            mine = 0 if extra == ["split"] else 1
            values = np.stack(
                [values if i == mine else np.full_like(values, 55.0) for i in range(2)], axis=-1
            )
        variables[name] = ((*dims, "epoch", *extra), values)
    return xr.Dataset(variables, coords)


def test_a_run_that_is_too_short_names_the_decays_and_the_epochs_that_would_do():
    history = make_history(relaxation_time=[np.nan, 0.7, 7.0])
    # The clock is proportional to epochs: 100 * 3/0.7 = 428.6.
    (line,) = tables.short(history)
    assert (
        line == "short of equilibrium (2 lambda t below 3) at lambda = 0.001 "
        "(the same schedule needs 429 epochs)"
    )


def test_every_short_decay_has_its_own_epochs_from_its_slowest_run():
    history = make_history(
        seeds=1,
        learning_rates=(0.1, 0.2),
        relaxation_time=[[[np.nan]] * 2, [[0.1], [0.2]], [[1.0], [2.0]]],
    )
    (line,) = tables.short(history)
    assert line.endswith("at lambda = 0.001 (the same schedule needs 3,000 epochs), 0.01 (300)")


@pytest.mark.parametrize(
    "clock", [[np.nan, 3.0, 30.0], [np.nan] * 3, [0.0] * 3], ids=["long", "no_clock", "epoch_0"]
)
def test_a_run_that_is_long_enough_or_has_no_clock_is_not_called_short(clock):
    assert tables.short(make_history(relaxation_time=clock)) == []


def test_bounds_and_causes_are_said_at_the_decay_of_least_nc3_that_has_them():
    bounds = {"nc1_bound": 0.35, "nc2_bound_etf": 0.276, "nc3_bound": 0.5, "nc4_bound": 0.0}
    shares = {"asymmetry": 0.72, "within": 0.23, "gradient": 0.04}
    values = bounds | {f"nc2_share_{cause}": share for cause, share in shares.items()}
    values |= {"nc1_bound_outputs": 0.6, "nc3_floor": 0.05, "etf_error": 0.248, "nc4": 0.0}
    undefined = np.array([[np.nan] * 2, [1.0] * 2, [1.0] * 2])
    values = {name: value * undefined for name, value in values.items()}
    history = make_history(nc3=[[0.1, 0.1], [0.4, 0.2], [0.5, 0.5]], **values)
    for name in ("nc4", "nc4_bound", "etf_error"):
        history[name] = history[name].expand_dims(split=["train", "test"])
    where, *lines = tables.bounds(history)
    assert "lambda = 0.001" in where
    numbers = [re.findall(r"\d+(?:\.\d+)?%?", line) for line in lines]
    assert numbers == [
        ["1", "0.3", "0.35", "60%", "40%"],
        ["2", "0.248", "0.276", "72%", "23%", "4%", "1%"],
        ["3", "0.3", "0.5", "0.05"],
        ["4", "0", "0"],
    ]
    assert "certified" in lines[-1]


def closed_form_history(error=0.0, **changes):
    """An unconstrained-feature model: predictions at the decays above 0, met but for a relative
    error of epsilon.
    """
    epsilon = np.array([[0.5, 0.5], [0.1, 0.1], [0.2, 0.2]])
    predicted = np.where(np.arange(3)[:, None] > 0, epsilon, np.nan)
    values = {
        "epsilon": epsilon * (1 + error),
        "closed_form_epsilon": predicted,
        "closed_form_norm_sq": predicted / predicted * 2.0,
        "closed_form_nc3": predicted / predicted * 0.4,
    }
    return make_history(**values | changes)


def test_a_closed_form_that_all_runs_meet_is_said_with_the_largest_errors():
    error = np.array([[0, 0], [1e-9, -3e-9], [0, 2e-9]])
    history = closed_form_history(
        error, weight_norm_sq=[[2, 2], [2, 2 + 2e-8], [2, 2]], nc3=[0.4, 0.4, 0.4 + 5e-10]
    )
    (line,) = tables.closed_form(history)
    assert line.startswith(
        "closed form: epsilon met to 1e-06 by 4 of 4 finite runs that have one; "
    )
    assert re.findall(
        r"(\S+(?: \(absolute\))?) (\d\S*e-\d+)", line.partition("those: ")[2].replace(",", "")
    ) == [
        ("epsilon", "3e-09"),
        ("||W_L||^2", "1e-08"),
        ("nc3 (absolute)", "5e-10"),
    ]
    assert "not by all" not in line


def test_a_closed_form_missed_names_the_decays_and_leaves_their_errors_out():
    history = closed_form_history(np.array([[0, 0], [1e-9, 1e-9], [1e-9, 0.3]]))
    (line,) = tables.closed_form(history)
    assert "by 3 of 4 finite runs" in line
    assert "epsilon 1e-09" in line
    assert line.endswith("not by all at lambda = 0.01, where modes died or the run is short")
    (none,) = tables.closed_form(closed_form_history(np.full((3, 2), 0.1)))
    assert "by 0 of 4" in none
    assert "largest error" not in none


def test_diverged_runs_and_decays_without_a_closed_form_do_not_count():
    history = closed_form_history(np.array([[0.0, 0.0], [0.0, np.nan], [0.0, 0.0]]))
    assert "by 3 of 3 finite runs" in tables.closed_form(history)[0]
    assert tables.closed_form(make_history()) == []


def test_least_compares_with_no_decay():
    nc1, nc3 = tables.least(make_history(nc1=[0.6, 0.3, 0.4], nc3=[0.1, 0.3, 0.2]))
    assert (
        nc1 == "nc1 is least at lambda = 0.001: 0.3, against 0.6 at lambda = 0 (2.0 times as much)"
    )
    assert nc3 == "nc3 is least at lambda = 0: 0.1"


def test_least_ignores_runs_that_decay_has_put_out_and_runs_that_diverged():
    out = [[0.1, 0.1], [0.1, 0.9995], [1.0, 1.0]]
    nc1, _ = tables.least(make_history(epsilon=out, nc1=[[0.6, 0.6], [0.3, 0.0], [0.0, 0.0]]))
    assert nc1.startswith("nc1 is least at lambda = 0.001: 0.3,")
    nc1, _ = tables.least(make_history(nc1=[[0.6, 0.6], [np.nan, 0.3], [np.nan, np.nan]]))
    assert nc1.startswith("nc1 is least at lambda = 0.001: 0.3,")
    assert tables.least(make_history(epsilon=1.0)) == []


def test_least_names_other_settings():
    nc1, _ = tables.least(
        make_history(
            seeds=1, learning_rates=(0.1, 0.2), nc1=[[[0.6]] * 2, [[0.3], [0.2]], [[0.4]] * 2]
        )
    )
    assert nc1.startswith(
        "nc1 is least at lambda = 0.001, learning_rate = 0.2: 0.2, against 0.6 at lambda = 0"
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((2, 4, 6), "4±2"),
        ((0.12, 0.125, 0.13), "0.125±0.005"),
        ((0.44, 0.442, 0.444), "0.442±0.002"),
        ((0.9, 0.9012, 0.9024), "0.9012±0.0012"),  # one digit would be wrong by 20%
        ((0.1, 0.1097, 0.1194), "0.110±0.010"),
        ((40, 60, 80), "60±20"),
        ((5e-5, 8e-5, 11e-5), "8e-5±3e-5"),
        ((6.2e-4, 6.6e-4, 7e-4), "6.6e-4±4e-5"),
        ((0, 0, 3e-6), "1.0e-6±1.7e-6"),
        ((0.12345, 0.12347), "0.1235±1.4e-5"),
        ((12.501, 12.505, 12.509), "12.51±0.004"),
        ((1.23456e-5, 1.23458e-5, 1.2346e-5), "1.235e-5±2e-10"),
        ((-0.5, 0, 0.5), "0.0±0.5"),
        ((0, 0, 0, 0, 9.5), "2±4"),
        ((0.01, 0.01, 0.01, 9.5), "2±5"),
        ((-3, -3, 7.2), "0.4±6"),  # a mean of 0 would be another
        ((1, 1, 1), "1"),
        ((0.25, 0.25 + 1e-9), "0.25"),
        ((1.23456e-5,), "1.23e-5"),
        ((np.nan, 1, 3), "2.0±1.4"),
        ((np.nan, np.inf), "-"),
    ],
)
def test_the_mean_ends_where_its_sd_does_or_after_four_digits(values, text):
    assert tables.mean_and_sd(np.array(values, np.float64)) == text


def shown(history):
    """The table of collapse as rows of cells under their headings, and the lines below it."""
    console = Console(width=300, file=io.StringIO())
    columns = [(name, name, {"split": "train"}) for name in ("accuracy", "nc1", "nc3", "epsilon")]
    with mock.patch.object(tables, "_COLLAPSE", tuple(columns)):
        tables.show_collapse(history.assign_attrs(PROVENANCE | history.attrs), console)
    cells = [
        re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in console.file.getvalue().splitlines()
    ]
    header, *rows = [row for row in cells if len(row) > 1]
    return [dict(zip(header, row, strict=True)) for row in rows], tables.degenerate(
        history.assign_attrs(PROVENANCE)
    )


def test_a_large_grid_has_a_table_of_some_rows_that_says_so():
    rates = tuple(np.linspace(0.01, 1, 500).round(6).tolist())
    history = make_history(learning_rates=rates)
    rows, _ = shown(history)
    assert len(rows) == 60
    assert {row["lambda"] for row in rows} == {"0", "0.001", "0.01"}
    found = sorted({float(row["learning_rate"]) for row in rows})
    assert (len(found), found[0], found[-1]) == (20, rates[0], rates[-1])
    console = Console(width=300, file=io.StringIO())
    columns = (("nc1", "nc1", {"split": "train"}),)
    tables._show(history, console, columns, "Collapse")
    assert "Collapse; 60 of 1,500 rows, evenly chosen" in " ".join(console.file.getvalue().split())
    tables._show(make_history(), console, columns, "All of them")
    assert "All of them;" not in " ".join(console.file.getvalue().split())


def test_runs_that_decay_has_put_out_are_counted_and_seem_neither_right_nor_collapsed():
    out = {
        "epsilon": [[0.1, 0.1], [0.1, 0.9], [0.9, 0.9]],
        "delta": [[0.0, 0.0], [0.0, 0.1], [0.1, 0.1]],
    }
    rows, lines = shown(
        make_history(
            **out,
            accuracy=[[0.9, 0.9], [0.8, 1.0], [1.0, 1.0]],
            nc1=[[0.2, 0.2], [0.3, 0.0], [0.0, 0.0]],
        )
    )
    assert [row["put out"] for row in rows] == ["0 of 2", "1 of 2", "2 of 2"]
    assert [row["accuracy"] for row in rows] == ["0.9", "0.8", "-"]
    assert [row["nc1"] for row in rows] == ["0.2", "0.3", "-"]
    assert rows[2]["epsilon"] == "0.9"  # which is what says that it is out
    assert [line.partition(":")[0] for line in lines] == ["put out"]
    rows, lines = shown(make_history())
    assert "put out" not in rows[0]
    assert lines == []


def test_class_means_of_lower_rank_are_named_with_their_decays():
    (line,) = tables.degenerate(
        make_history(nc1_rank=[[9, 9], [9, 8], [3, 3]]).assign_attrs(PROVENANCE)
    )
    assert line.startswith("nc1_rank is below 9 in 3 runs at lambda = 0.001, 0.01: ")
    narrow = PROVENANCE | {"config": json.dumps({"model": {"widths": [64, 3]}})}
    assert tables.degenerate(make_history(nc1_rank=3).assign_attrs(narrow)) == []


def test_single_examples_of_a_class_are_said_to_have_no_scatter():
    (line,) = tables.degenerate(make_history(nc1=0.0).assign_attrs(PROVENANCE | {"per_class": "1"}))
    assert line.startswith("one example in each class: nc1 and cdnv ")


def test_a_console_prints_names_as_they_are(capsys):
    from rich.table import Table

    for stderr in (False, True):
        console = tables.make_console(stderr=stderr)
        table = Table("[/heading]", title="[/title] :cat:")
        table.add_row("[/cell] [bold]")
        console.print(table)
        tables.say(console, "[/line] [red] :cat: \x1b[31m \udcff\nend")
        printed = capsys.readouterr()[stderr]
        for text in ("[/title] :cat:", "[/heading]", "[/cell] [bold]"):
            assert text in printed
        assert printed.splitlines()[-1] == r"[/line] [red] :cat: \x1b[31m \udcff\nend"


def test_a_locale_without_the_signs_of_a_table_is_no_error(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    tables.say(tables.make_console(), "0.5±0.1")
    sys.stdout.flush()
    assert written.getvalue() == b"0.5\\xb10.1\n"
