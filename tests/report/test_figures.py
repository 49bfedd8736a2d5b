"""Figures of small made-up histories: that they are drawn at all, without a warning, and what
they are drawn from.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Text

from ncjax import config as configuration
from ncjax.cli import plot
from ncjax.config import SWEPT, Grid
from ncjax.errors import printable
from ncjax.metrics import closed_forms
from ncjax.metrics.vocabulary import LAYER_VOCABULARY, VOCABULARY
from ncjax.report import draw, figures, layer_figures, panels, theory_figures, thinning
from ncjax.storage import history as histories

LAYERS = ("layer_1", "head")
DEFAULTS = {
    "weight_decay": (0.0, 1e-3),
    "learning_rate": (0.1,),
    "momentum": (0.9,),
    "init_scale": (1.0,),
    "seed": (0, 1),
}
WITHOUT_DECAY = {
    "collapse_against_epoch.png",
    "collapse_against_lambda.png",
    "class_mean_cosines.png",
}
WITHOUT_CLOCK = {
    *WITHOUT_DECAY,
    "equilibrium_against_epoch.png",
    "theory_against_lambda.png",
    "budget_against_epoch.png",
    "bounds_against_lambda_and_epoch.png",
    "modes_against_lambda.png",
}
EVERY_FIGURE = {*WITHOUT_CLOCK, "collapse_against_clock.png"}
TERMS = ("theorem", "mean", "asymmetry", "within", "gradient")


@pytest.fixture
def without_layout(monkeypatch):
    """Measuring every text to place the panels takes most of the time of a figure; pixels take
    much of the rest.
    """
    write = draw._write

    def write_plainly(figure, path):
        figure.set_layout_engine("none")
        figure.set_dpi(50)
        return write(figure, path)

    monkeypatch.setattr(draw, "_write", write_plainly)


@pytest.fixture
def unwritten(monkeypatch):
    """Figures are made, and empty files stand for them."""

    def touch(figure, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    monkeypatch.setattr(draw, "_write", touch)


def make_history(epochs=(0, 1, 10), classes=3, fields=(), vocabulary=VOCABULARY, **axes):
    """Random measurements in (0, 1), except that nothing has diverged or gone out, weight decay 0
    has no equilibrium, the clock runs at 1000 a unit of decay and epoch, the shares of the budget
    sum to 1, and no closed form is known.

    fields: of the config, ("loss", "cross_entropy") or the like.
    """
    grid = Grid({name: axes.get(name, DEFAULTS[name]) for name in SWEPT})
    config = configuration.default_config()
    config.update(dict(fields))
    attrs = {"config": configuration.to_json(config), "per_class": "20"}
    rng, joined = np.random.default_rng(0), None
    sizes = {"split": 2, "layer": len(LAYERS), "mode": classes, "label": classes}
    decay = np.array(grid.columns()["weight_decay"])
    for epoch in epochs:
        metrics = {
            name: rng.uniform(
                0.01, 0.99, (grid.size, *(sizes[dim] for dim in variable.dims))
            ).astype(np.float32)
            for name, variable in vocabulary.items()
        }
        metrics["finite"][:] = 1
        metrics["effective_decay"], metrics["flow_time"] = decay, np.full(grid.size, 500.0 * epoch)
        metrics["relaxation_time"] = 2 * decay * metrics["flow_time"]
        metrics["mode_eigenvalues"] = -np.sort(-metrics["mode_eigenvalues"])
        metrics["budget_gradient"] = 1 - sum(metrics[f"budget_{term}"] for term in TERMS[:-1])
        undefined = {
            "equilibrium_residual",
            "theorem_residual",
            "norm_target",
            "relaxation_time",
            "symmetric_nc3",
        }
        undefined |= {
            "predicted_head_norm_sq",
            "predicted_head_cosine",
            *(f"budget_{term}" for term in TERMS),
        }
        for name in undefined:
            metrics[name][decay == 0] = np.nan
        for name in ("closed_form_epsilon", "closed_form_nc3", "closed_form_norm_sq"):
            metrics[name][:] = np.nan
        metrics[histories.COSINES] = rng.uniform(-1, 1, (grid.size, classes, classes))
        names = tuple(f"class {i}" for i in range(classes))
        newest = histories.one_epoch(
            epoch, metrics, grid=grid, layers=LAYERS, label_names=names, attrs=attrs
        )
        joined = histories.append(joined, newest)
    return joined


def changed(history, **values):
    """`history` with all of a variable's numbers replaced."""
    history = history.copy(deep=True)
    for name, value in values.items():
        history[name][:] = value
    return history


def diverge(history, **where):
    """`history` with the runs at `where` diverged from the second epoch on. Clocks and decay go
    on.
    """
    history = history.copy(deep=True)
    for name in set(VOCABULARY) - {"effective_decay", "flow_time", "relaxation_time"}:
        history[name][where | {"epoch": slice(1, None)}] = 0 if name == "finite" else np.nan
    history[histories.COSINES][where] = np.nan
    return history


def save(history, folder):
    folder.mkdir()
    histories.save(history, folder / "history.nc")
    return str(folder)


def words(figure):
    """All that is written in a figure's legend."""
    return [
        text.get_text()
        for legend in figure.legends
        for text in (legend.get_title(), *legend.get_texts())
    ]


def assert_drawn(paths, names):
    assert {path.name for path in paths} == names
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 2_000
    assert not [path for path in paths[0].parent.iterdir() if path.suffix != ".png"]


@pytest.mark.slow
def test_every_figure_is_written(tmp_path):
    assert_drawn(draw.draw_all(make_history(), tmp_path / "figures"), EVERY_FIGURE)


def test_layers_are_drawn_where_they_were_measured(tmp_path, without_layout):
    """Linear pairs solid, others dotted; the law of the former is dashed."""
    history = make_history(vocabulary=EVERY_METRIC)
    history["layer"].attrs["pairs"] = "relu"
    history["layer_imbalance"][..., -1] = np.nan
    style = draw.Style(only=("layers_against_epoch", "layers_by_depth"))
    names = {f"{name}.png" for name in style.only}
    assert_drawn(draw.draw_all(history, tmp_path / "a", style=style), names)
    assert not draw.draw_all(make_history(), tmp_path / "b", style=style)
    figure = layer_figures.layers_against_epoch(history, 1e-3)
    (imbalance,) = [axes for axes in figure.axes if "Imbalance" in axes.get_title()]
    styles = [line.get_linestyle() for line in imbalance.lines]
    assert styles == [":", "-", "--"]
    values = history["layer_imbalance"].sel(weight_decay=1e-3).isel(layer=0)
    expected = (values / values.isel(epoch=0)).mean("seed")
    np.testing.assert_allclose(imbalance.lines[0].get_ydata(), expected, rtol=1e-6)
    by_depth = layer_figures.layers_by_depth(history).axes[0]
    assert [text.get_text() for text in by_depth.get_xticklabels()] == list(LAYERS)
    final = history["layer_nc1"].sel(split="train", weight_decay=1e-3).isel(epoch=-1).mean("seed")
    np.testing.assert_allclose(by_depth.lines[1].get_ydata(), final, rtol=1e-6)


def test_layers_without_decay_or_a_number_are_drawn(tmp_path, without_layout):
    style = draw.Style(only=("layers_against_epoch", "layers_by_depth"))
    history = make_history(vocabulary=EVERY_METRIC, weight_decay=(0.0,), seed=(0,))
    lost = changed(history, **dict.fromkeys(LAYER_VOCABULARY, np.nan))
    assert len(draw.draw_all(lost, tmp_path / "a", style=style)) == 2


EVERY_METRIC = VOCABULARY | LAYER_VOCABULARY


def test_terminal_phase_begins_where_every_seed_is_right_on_the_training_split():
    reached_late = [[0.5, 1.0, 1.0, 1.0], [0.5, 0.9, 1.0, 1.0]]
    never_together = [[0.5, 1.0, 0.9, 1.0], [1.0, 0.9, 1.0, 0.9]]
    survivor = [[0.5, 0.9, np.nan, np.nan], [0.5, 0.9, 0.9, 1.0]]
    all_diverged = [[np.nan] * 4] * 2
    accuracy = xr.DataArray(
        [reached_late, never_together, survivor, all_diverged],
        {"epoch": [0, 1, 10, 100]},
        ("weight_decay", "seed", "epoch"),
    )
    np.testing.assert_array_equal(panels.terminal_epoch(accuracy), [10, np.nan, 100, np.nan])


def test_terminal_phase_is_marked_at_its_epoch_and_explained_only_if_it_begins():
    history = make_history(weight_decay=(1e-3,))
    assert "training error" not in "".join(words(figures.collapse_against_epoch(history)))
    history["accuracy"].loc[{"split": "train", "epoch": [1, 10]}] = 1
    figure = figures.collapse_against_epoch(history)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    np.testing.assert_array_equal([line.get_xdata() for line in marks], [[1]])
    assert "training error" in "".join(words(figure))


def test_curves_are_means_over_seeds_and_bands_reach_the_extremes():
    history = make_history(weight_decay=(1e-3,), seed=(0, 1, 2))
    axes = figures.collapse_against_epoch(history).axes[0]
    nc1 = history["nc1"].sel(split="train").values[0].astype(np.float64)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), nc1.mean(0))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (nc1.min(), nc1.max())


def test_most_collapsed_weight_decay_has_the_least_mean_nc3_of_the_last_epoch():
    history = make_history(weight_decay=(0.0, 1e-3, 1e-2))
    history["nc3"].loc[{"split": "train", "epoch": 10}] = [[0.1, 0.9], [0.3, 0.4], [np.nan, np.nan]]
    assert figures.most_collapsed(history) == 1


@pytest.mark.usefixtures("without_layout")
@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            make_history(epochs=(1,), classes=2, weight_decay=(1e-3,), seed=(0,)),
            id="one run, two classes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            diverge(make_history(epochs=(0, 1))), id="all diverged", marks=pytest.mark.slow
        ),
    ],
)
def test_unusual_histories_are_drawn(history, tmp_path):
    assert_drawn(draw.draw_all(history, tmp_path), EVERY_FIGURE)


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            diverge(make_history(epochs=(10, 20))).isel(epoch=[1]),
            id="diverged before the first measurement",
        ),
        pytest.param(changed(make_history(), epsilon=1.0), id="all put out"),
        pytest.param(make_history(epochs=(1,), weight_decay=(1e-3, 0.0, 1e-5)), id="unsorted"),
        pytest.param(make_history(fields=[("loss", "cross_entropy")]), id="cross-entropy"),
    ],
)
def test_figures_of_other_unusual_histories_are_made(history, tmp_path):
    assert {path.name for path in draw.draw_all(history, tmp_path)} == EVERY_FIGURE


@pytest.mark.usefixtures("unwritten")
def test_a_history_of_epoch_0_alone_has_a_clock_that_has_not_started(tmp_path):
    history = make_history(epochs=(0,))
    kept = {"finite", "relaxation_time", *(f"budget_{term}" for term in TERMS)}
    zeros = changed(history, **dict.fromkeys(VOCABULARY.keys() - kept, 0))
    for one in (history, zeros):
        assert {path.name for path in draw.draw_all(one, tmp_path)} == WITHOUT_CLOCK


@pytest.mark.usefixtures("unwritten")
def test_without_a_clock_as_with_adam_nothing_is_drawn_against_it_and_no_law_is_fitted(tmp_path):
    history = changed(make_history(), relaxation_time=np.nan, flow_time=np.nan)
    assert {path.name for path in draw.draw_all(history, tmp_path)} == WITHOUT_CLOCK
    assert theory_figures.fitted_law(history) is None


@pytest.mark.usefixtures("unwritten")
def test_without_weight_decay_there_is_no_equilibrium_to_draw(tmp_path):
    history = make_history(weight_decay=(0.0,))
    assert {path.name for path in draw.draw_all(history, tmp_path)} == WITHOUT_DECAY


def test_diverged_runs_are_counted_and_the_others_drawn():
    history = diverge(make_history(), weight_decay=1, seed=0)
    figure = figures.collapse_against_epoch(history)
    assert "(1 of 4 diverged)" in words(figure)[0]
    assert words(figure)[2].endswith("(1 of 2 diverged)")
    survivor = history["nc1"].sel(split="train", seed=1).values[1]
    solid = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose(solid[0].get_ydata()[1:], survivor[1:])


@pytest.mark.parametrize(
    ("width", "points", "columns"),
    [
        ("3.25in", 234, 1),
        pytest.param("16cm", 16 / 2.54 * 72, 2, marks=pytest.mark.slow),
        pytest.param("90mm", 255, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("without_layout")
def test_a_figure_is_as_wide_as_it_is_asked_to_be(width, points, columns, tmp_path, monkeypatch):
    drawn = []
    write = draw._write
    monkeypatch.setattr(
        draw, "_write", lambda figure, path: drawn.append(figure) or write(figure, path)
    )
    save(make_history(), tmp_path / "a")
    only = ["--only", "collapse_against_lambda", "--format", "pdf", "--width", width]
    assert plot.main([str(tmp_path / "a"), *only]) == 0
    content = (tmp_path / "a" / "figures" / "collapse_against_lambda.pdf").read_bytes()
    box = content.partition(b"/MediaBox [ 0 0 ")[2].split()
    assert float(box[0]) == pytest.approx(points, abs=0.2)
    (figure,) = drawn
    lefts = {round(axes.get_position().x0, 3) for axes in figure.axes}
    assert len(lefts) == columns
    assert figure.get_figheight() < 11
    assert panels._page.get() == panels._Page()


@pytest.mark.parametrize(
    ("style", "sizes", "line"), [("paper", {8}, 1), ("talk", {12, 14}, 1.8), (None, {7, 8}, 1)]
)
def test_a_style_sets_the_size_of_text_and_lines(style, sizes, line, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(draw, "_write", lambda figure, path: drawn.append(figure) or path)
    save(make_history(), tmp_path / "a")
    only = ["--only", "collapse_against_epoch", "--width", "3.25in"]
    flags = ["--style", style] if style else []
    assert plot.main([str(tmp_path / "a"), *only, *flags]) == 0
    (figure,) = drawn
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert {text.get_fontsize() for text in shown} == sizes
    assert figure.axes[0].lines[0].get_linewidth() == line
    # The same colours, whatever the style: black without weight decay.
    assert figure.axes[0].lines[0].get_color() == "#000000"


def test_text_is_text_in_pdf_and_svg_and_global_settings_stay(tmp_path):
    save(make_history(), tmp_path / "a")
    before = {name: matplotlib.rcParams[name] for name in ("pdf.fonttype", "svg.fonttype")}
    for kind in ("pdf", "svg"):
        flags = ["--only", "modes_against_lambda", "--format", kind, "--style", "paper"]
        assert plot.main([str(tmp_path / "a"), *flags]) == 0
    assert before == {name: matplotlib.rcParams[name] for name in before}
    pdf = (tmp_path / "a" / "figures" / "modes_against_lambda.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    svg = ElementTree.parse(tmp_path / "a" / "figures" / "modes_against_lambda.svg")
    texts = ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "eigenvalue" in texts
    assert "measured mode" in texts


@pytest.mark.parametrize("inches", np.linspace(1.5, 5, 12))
def test_captions_do_not_break_mathematics_nor_what_it_equals(inches):
    words = r"law, while every mode lives; $\gamma$ measured at $\lambda$ = $10^{-3}$, n = 12 runs"
    lines = panels._wrapped(words, inches)
    assert " ".join(lines) == words
    assert sum(r"$\lambda$ = $10^{-3}$" in line for line in lines) == 1
    assert sum("n = 12" in line for line in lines) == 1
    assert max(len(panels._visible(line)) for line in lines) <= max(19 * inches, 24)


def test_a_panel_of_zeros_has_its_line_at_the_bottom_and_no_other_label():
    history = changed(make_history(), nc4=0.0)
    figure = figures.collapse_against_lambda({"": history})
    [axes] = [axes for axes in figure.axes if axes.get_title().startswith("NC4")]
    low, high = axes.get_ylim()
    assert (axes.get_yticks().tolist(), low < 0 <= high / 10) == ([0], True)


@pytest.mark.parametrize("floor", [0.0, 1e-9, 0.004, 0.2])
def test_a_floor_is_within_the_panel_or_marked_at_its_edge(floor):
    history = changed(make_history(), nc3=0.3, nc3_centered=0.3, nc3_floor=floor)
    figure = figures.collapse_against_lambda({"": history})
    [axes] = [axes for axes in figure.axes if axes.get_title().startswith("NC3")]
    [dashed] = [line for line in axes.lines if line.get_linestyle() == "--"]
    marks = [line for line in axes.lines if line.get_marker() == "v"]
    [caption] = [legend.get_title().get_text() for legend in figure.legends]
    if floor >= 0.003:
        assert axes.get_ylim()[0] < floor
        np.testing.assert_allclose(dashed.get_ydata(), floor, rtol=1e-6)
        assert not marks
    else:
        assert np.isnan(dashed.get_ydata()).all()
        assert marks[0].get_xdata().tolist() == [0, 1e-3]
        assert 0.1 < axes.get_ylim()[0] < 0.3
    assert bool(marks) == ("\N{BLACK DOWN-POINTING TRIANGLE}" in caption)


def test_dead_modes_have_a_mark_of_their_own():
    history = make_history(weight_decay=(0.0, 1e-3, 1e-2))
    modes = history["mode_eigenvalues"].isel(epoch=-1).transpose("weight_decay", "seed", "mode")
    modes.values[1:] = 0.5
    for dead in (0, 1, 3):
        modes.values[2, 0, :dead] = [0.001, -0.002, 0.0099][:dead]
        figure = theory_figures.modes_against_lambda([history])
        crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
        assert sum(line.get_xdata().size for line in crosses) == dead
        assert all((line.get_xdata() == 1e-2).all() for line in crosses)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(labels) - len({label for label in labels if "dead" not in label}) == (dead > 0)


def test_values_that_are_close_have_few_plain_labels():
    history = changed(make_history(weight_decay=(1e-3,)), nc1=0.0224)
    history["nc1"][{"seed": 0}] = 0.0231
    figure = figures.collapse_against_lambda({"": history})
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels(which="both")]
    assert 1 < len(list(filter(None, labels))) <= 6
    assert all(float(label) for label in labels if label)


def test_figures_that_a_run_does_not_have_are_refused(tmp_path, capsys):
    """Of one run there are none that compare several."""
    save(make_history(), tmp_path / "a")
    assert plot.main([str(tmp_path / "a"), "--only", "compare_against_epoch"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: --only: got 'compare_against_epoch'; ")


@pytest.mark.slow
def test_many_weight_decays_share_a_colour_bar():
    history = make_history(weight_decay=(0.0, *np.logspace(-5, -2, 11)))
    figure = figures.collapse_against_epoch(history)
    assert len(figure.axes) == 7
    assert not figure.legends[0].get_texts()
    figure.draw_without_rendering()


def test_of_hundreds_of_weight_decays_some_are_drawn_and_the_caption_says_how_many():
    decays = (0.0, *np.geomspace(1e-5, 1e-2, 299))
    history = make_history(epochs=(0, 1), weight_decay=decays, seed=(0,))
    curves = panels.one_per_lambda(history)
    shown = [curve.run["weight_decay"].item() for curve in curves]
    assert len(curves) == 24
    assert (shown[0], shown[-1]) == (0.0, decays[-1])
    assert curves[0].colour == "#000000"
    figure = figures.collapse_against_epoch(history)
    assert "24 of 300 weight decays, evenly chosen" in words(figure)[0]
    assert panels.remark_on_curves(make_history()) == ""


@pytest.mark.parametrize("count", [1, 4, 10, 20, 200])
def test_bands_upon_one_another_hide_no_line(count):
    assert 1 - (1 - panels.band_opacity(count)) ** count <= 1 - 0.85**10
    assert panels.band_opacity(count) > 0


def test_marks_do_not_cover_one_another():
    for count, size in ((3, 3.5), (300, 1)):
        history = make_history(epochs=(1,), weight_decay=tuple(np.geomspace(1e-5, 1e-2, count)))
        figure = figures.collapse_against_lambda({"": history})
        drawn = [line for line in figure.axes[0].lines if len(line.get_xdata())]
        assert {line.get_markersize() for line in drawn} == {size}


def test_many_classes_are_not_labelled():
    few, many = (
        figures.class_mean_cosines(make_history(epochs=(1,), classes=c)).axes[0] for c in (4, 31)
    )
    assert (len(few.get_xticklabels()), len(many.get_xticklabels())) == (4, 0)


@pytest.mark.usefixtures("unwritten")
def test_every_setting_of_another_axis_has_its_own_figures(tmp_path):
    paths = draw.draw_all(
        make_history(epochs=(1,), weight_decay=(0.0,), learning_rate=(0.1, 0.25)), tmp_path
    )
    names = {
        n.replace(".png", f"-learning_rate={lr}.png") for n in WITHOUT_DECAY for lr in (0.1, 0.25)
    }
    assert {path.name for path in paths} == names


@pytest.mark.usefixtures("unwritten")
def test_of_many_settings_some_have_figures_and_a_line_says_so(tmp_path, capsys):
    rates = tuple(range(1, 101))
    history = make_history(epochs=(1,), weight_decay=(0.0,), learning_rate=rates, seed=(0,))
    assert plot.main([save(history, tmp_path / "a"), "--only", "collapse_against_epoch"]) == 0
    *paths, line = capsys.readouterr().out.splitlines()
    found = [float(path.rpartition("=")[2].removesuffix(".png")) for path in paths]
    assert found == [1, 15, 29, 43, 58, 72, 86, 100]
    assert line == (
        "a: figures are of 8 of 100 settings, evenly chosen; the others are in history.nc"
    )
    assert draw.remark(make_history(epochs=(1,), learning_rate=(0.1, 0.25))) == ""


def test_every_setting_of_another_axis_has_a_panel_of_the_phase_diagram():
    history = make_history(epochs=(1,), learning_rate=(0.1, 0.25))
    figure = theory_figures.modes_against_lambda(list(figures.settings(history)))
    assert [axes.get_title() for axes in figure.axes] == ["learning_rate=0.1", "learning_rate=0.25"]


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
def test_command_redraws_every_run_and_compares_them(tmp_path, capsys):
    odd, plain, twin = (
        save(make_history(weight_decay=(0.0,)), tmp_path / "a$1$"),
        save(make_history(epochs=(1,)), tmp_path / "b"),
        save(make_history(epochs=(1,)), tmp_path / "c"),
    )
    assert plot.main([odd, plain, "--out", str(tmp_path / "both")]) == 0
    compared = {"collapse_against_lambda.png", "compare_against_epoch.png"}
    assert {path.name for path in (tmp_path / "both").iterdir()} == compared
    assert {path.name for path in (tmp_path / "b" / "figures").iterdir()} == EVERY_FIGURE
    assert len(capsys.readouterr().out.splitlines()) == 3 + 9 + 2
    assert plot.main([plain, twin, "--out", str(tmp_path / "decayed")]) == 0
    assert {path.name for path in (tmp_path / "decayed").iterdir()} == compared | {
        "theory_against_lambda.png"
    }


@pytest.mark.usefixtures("unwritten")
def test_out_of_one_run_is_where_its_figures_go(tmp_path, capsys):
    folder = save(make_history(weight_decay=(0.0,)), tmp_path / "a")
    assert plot.main([folder, "--out", str(tmp_path / "new" / "out")]) == 0
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == WITHOUT_DECAY
    assert not (tmp_path / "a" / "figures").exists()
    assert len(capsys.readouterr().out.splitlines()) == len(WITHOUT_DECAY)


@pytest.mark.parametrize("out", ["x.pdf", "x.PNG", "a/history.nc", "a/history.nc/x"])
@pytest.mark.parametrize("runs", [1, 2])
def test_figures_are_not_written_to_a_file(out, runs, tmp_path, capsys):
    folders = [save(make_history(epochs=(1,)), tmp_path / name) for name in "ab"[:runs]]
    assert plot.main([*folders, "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out: got ")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / out).is_dir()


def shown(text):
    """What matplotlib draws for a text without mathematics."""
    string, mathematics = text._preprocess_math(text.get_text())
    assert not mathematics, string
    return string


NAMES = ("[bold]", r"b$\frac$", "$1$", "_x", "-x", "a\nb", os.fsdecode(b"not\xffutf8"))


def test_runs_of_any_name_are_compared_under_it(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        draw, "_write", lambda figure, path: drawn.setdefault(path.name, figure) and path
    )
    monkeypatch.setattr(draw, "draw_all", lambda *_: [])
    history = make_history(epochs=(1,), weight_decay=(0.0,))
    folders = [save(history, tmp_path / name) for name in NAMES]
    assert plot.main([*folders, "--out", str(tmp_path / os.fsdecode(b"out\xff"))]) == 0
    out = capsys.readouterr().out
    assert len(out.encode().splitlines()) == 2
    legend = drawn["collapse_against_lambda.png"].legends[0]
    assert [shown(text) for text in legend.get_texts()] == [printable(name) for name in NAMES]
    figure = drawn["compare_against_epoch.png"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        printable(name).replace("$", r"\$") + r", $\lambda$ = 0" for name in NAMES
    ]
    figure.set_layout_engine("none")
    figure.draw_without_rendering()


def test_classes_of_any_name_are_named_as_they_are():
    history = make_history(epochs=(1,), classes=len(NAMES)).assign_coords(label=list(NAMES))
    figure = figures.class_mean_cosines(history)
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        assert [shown(text) for text in axis.get_ticklabels()] == [
            printable(name) for name in NAMES
        ]
    figure.draw_without_rendering()


EXTREMES = {
    "1e-3 and 1e300": (1e-3, 1e300),
    "least and greatest": (5e-324, 1e308),
    "least": (5e-324,),
    "greatest": (1.7e308,),
}


@pytest.mark.slow
@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize("decays", EXTREMES.values(), ids=EXTREMES.keys())
def test_weight_decays_of_any_size_are_drawn(decays, tmp_path):
    with np.errstate(over="ignore", invalid="ignore"):
        history = make_history(epochs=(0, 10), weight_decay=decays)
    history["relaxation_time"].loc[{"epoch": 10}] = 4.0  # a law is fitted
    assert {path.name for path in draw.draw_all(history, tmp_path)} == EVERY_FIGURE


@pytest.mark.parametrize("decays", [(1e-3,), (3e-4,), (1e3,), (1e-3, 1e-2), (1e-2, 1e-3, 0.0)])
def test_the_axis_of_weight_decay_ends_near_the_decays(decays):
    history = make_history(epochs=(10,), weight_decay=decays)
    axes = figures.collapse_against_lambda({"": history}).axes[0]
    low, high = axes.get_xlim()
    assert low < min(decays) <= max(decays) < high < 2 * max(decays)
    assert low > (-max(decays) if 0 in decays else 0)
    assert max(axes.get_xticks()) == pytest.approx(max(decays))


def test_an_axis_of_hundreds_of_decades_has_few_labels_and_is_drawn():
    history = make_history(epochs=(10,), weight_decay=(1e-308, 1e-3, 1e300))
    with np.errstate(over="ignore"):
        figure = figures.collapse_against_lambda({"": history})
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
    assert 2 <= len(figure.axes[0].get_xticks()) <= 10
    assert len(figure.axes[0].xaxis.get_minorticklocs()) < 100


def title_of_budget(monkeypatch, folder, *flags):
    """Exit code of the command, and the titles of the budgets it drew."""
    titles, draw = [], theory_figures.budget_against_epoch

    def noted(*arguments):
        figure = draw(*arguments)
        titles.append(figure.get_suptitle())
        return figure

    monkeypatch.setattr(theory_figures, "budget_against_epoch", noted)
    return plot.main([folder, *flags]), titles


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    ("flags", "shown"), [((), "10^{-2}"), (("--weight-decay", "1e-3"), "10^{-3}")]
)
def test_the_budget_is_that_of_the_most_collapsed_decay_or_of_the_one_asked_for(
    flags, shown, tmp_path, monkeypatch
):
    history = make_history(epochs=(1,), weight_decay=(0.0, 1e-3, 1e-2))
    history["nc3"].loc[{"split": "train", "epoch": 1}] = [[0.01, 0.01], [0.4, 0.4], [0.3, 0.3]]
    code, titles = title_of_budget(monkeypatch, save(history, tmp_path / "run"), *flags)
    assert code == 0
    assert titles == [f"Equilibrium budget at $\\lambda$ = ${shown}$"]


@pytest.mark.parametrize("value", ["0", "0.5", "nan"])
def test_a_weight_decay_that_the_run_lacks_is_one_line_with_those_it_has(
    value, tmp_path, capsys, monkeypatch
):
    folder = save(make_history(epochs=(1,), weight_decay=(0.0, 1e-3, 1e-2)), tmp_path / "run")
    code, titles = title_of_budget(monkeypatch, folder, "--weight-decay", value)
    assert (code, titles) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith("error: --weight-decay: got ")
    assert "0.001, 0.01" in error
    assert error.count("\n") == 1


def test_the_budget_draws_shares_that_reach_1_and_the_norm_of_the_whole():
    history = make_history(weight_decay=(0.0, 1e-3))
    figure = theory_figures.budget_against_epoch(history, 1e-3)
    shares, norms = figure.axes
    run = history.sel(weight_decay=1e-3).mean("seed")
    positive = sum(np.maximum(run[f"budget_{term}"].values, 0) for term in TERMS)
    top = max(collection.get_paths()[0].vertices[:, 1].max() for collection in shares.collections)
    assert top == pytest.approx(positive.max(), rel=1e-6)
    assert positive.max() > 1  # a gradient takes from the whole: what adds to it exceeds 1
    for line, term in zip(norms.lines, TERMS, strict=False):
        np.testing.assert_allclose(line.get_ydata(), run[f"budget_{term}_norm"].values, rtol=1e-6)
    head = history["weight_norm_sq"].sel(weight_decay=1e-3, layer="head").values.astype(float)
    np.testing.assert_allclose(norms.lines[5].get_ydata(), 1e-3 * np.sqrt(head).mean(0), rtol=1e-6)


def test_the_clock_figure_has_the_clock_as_its_axis_and_theory_dashed():
    figure = theory_figures.collapse_against_clock(make_history(weight_decay=(0.0, 1e-3, 1e-2)))
    axes = figure.axes[0]
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose([line.get_xdata() for line in solid], [[0, 1, 10], [0, 10, 100]])
    (theory,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(theory.get_ydata(), np.exp(-theory.get_xdata()), rtol=1e-12)
    assert (theory.get_xdata().min(), theory.get_xdata().max()) == (
        pytest.approx(1),
        pytest.approx(100),
    )


def test_norm_imbalance_is_drawn_as_a_share_of_its_start():
    history = make_history(weight_decay=(1e-3,), seed=(0,))
    norms = history["weight_norm_sq"].values[0, 0].astype(float)
    drawn = panels.training(history)["norm_imbalance"].values[0, 0]
    expected = np.abs(norms[:, 0] - norms[:, -1]) / np.abs(norms[0, 0] - norms[0, -1])
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def test_the_law_takes_gamma_at_the_least_decay_that_is_relaxed():
    history = make_history(weight_decay=(1e-2, 1e-4, 1e-3), fields=[("model.head_bias", "free")])
    history["normalized_margin"].loc[{"epoch": 10}] = [[0.5, 0.7], [0.1, 0.1], [0.3, 0.4]]
    history["relaxation_time"].loc[{"epoch": 10}] = [[100, 100], [1, 1], [3.5, 3.5]]
    law = theory_figures.fitted_law(history)
    assert (law.gamma, law.depth) == (pytest.approx(0.35), len(LAYERS))
    assert law.setting == closed_forms.Setting(3, "free", "one_hot")
    assert law.source.endswith("$10^{-3}$")
    short = changed(history, relaxation_time=2.9)
    assert theory_figures.fitted_law(short) is None
    assert theory_figures.fitted_law(make_history(fields=[("loss", "cross_entropy")])) is None


def test_the_law_of_an_unconstrained_model_is_in_closed_form():
    history = changed(make_history(weight_decay=(1e-3,)), closed_form_epsilon=0.1)
    law = theory_figures.fitted_law(history)
    assert law.gamma == closed_forms.unconstrained_gamma(2, 20, closed_forms.Setting(3))
    assert "closed form" in law.source
    figure = theory_figures.theory_against_lambda({"": history})
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed[0].get_ydata(), law.solution(dashed[0].get_xdata()).epsilon)


def test_a_run_that_decay_has_put_out_is_counted_and_not_drawn():
    history = make_history(weight_decay=(1e-3, 1e-2))
    for figure in (
        figures.collapse_against_lambda({"": history}),
        theory_figures.theory_against_lambda({"": history}),
    ):
        assert "put out" not in "".join(words(figure))
    out = {"split": "train", "epoch": 10, "weight_decay": 1e-2, "seed": 1}
    history["epsilon"].loc[out], history["delta"].loc[out] = 0.6666, 0.3333  # a bias meets the sum
    history["nc3"].loc[{"split": "train", "epoch": 10, "weight_decay": 1e-2}] = [0.25, 3.75]
    figure = figures.collapse_against_lambda({"": history})
    assert "1 runs that weight decay has put out are not shown" in words(figure)[0]
    (line,) = [
        line
        for line in figure.axes[3].lines
        if 0.25 in line.get_ydata() and line.get_linestyle() != "--"
    ]
    assert 3.75 not in line.get_ydata()
    assert "put out" in words(theory_figures.theory_against_lambda({"": history}))[0]


VALUES = {
    "60 decades": [1e-40, 1e-20, 1e-3, 1e-5],
    "equal": [0.2763932] * 4,
    "equal up to rounding": [0.2763932, 0.2763932 + 3e-8, 0.2763932, 0.2763932 - 3e-8],
    "zeros and tiny": [0.0, 1e-30, 0.0, 0.0],
    "zeros and one": [0.0, 1.0, 0.0, np.nan],
    "all nan": [np.nan] * 4,
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_values_of_any_span_are_drawn_in_limits_that_hold_them(values):
    history = make_history(epochs=(10,), weight_decay=(1e-3, 1e-2))
    history["nc3"].loc[{"split": "train", "epoch": 10}] = np.reshape(values, (2, 2)).astype(
        np.float32
    )
    history["nc3_centered"], history["nc3_floor"] = (
        history["nc3"],
        history["nc3"].sel(split="train", drop=True),
    )
    figure = figures.collapse_against_lambda({"": history})
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    low, high = figure.axes[3].get_ylim()
    finite = np.array(values)[np.isfinite(values)]
    assert low < high
    if finite.size:
        mean = np.nanmean(np.reshape(values, (2, 2)), axis=1)
        assert low <= np.nanmin(mean) <= np.nanmax(mean) <= high
    if values == VALUES["equal up to rounding"]:
        assert high / low > 1.05  # rounding does not fill the panel


def test_compared_histories_are_named():
    figure = figures.collapse_against_lambda(
        {"wide": make_history(), "narrow": make_history(seed=(0,))}
    )
    assert words(figure)[1:] == ["wide", "narrow"]
    assert "n = 1 to 2 seeds" in words(figure)[0]


def test_of_many_compared_histories_some_are_drawn_and_captions_say_so(monkeypatch):
    monkeypatch.setattr(thinning, "MOST_COMPARED", 2)
    drawn = draw._compared({name: make_history() for name in ("first", "middle", "last")})
    for name in ("collapse_against_lambda", "compare_against_epoch", "theory_against_lambda"):
        said = " ".join(words(drawn[name]()))
        assert "2 of 3 settings, evenly chosen" in said
        assert "middle" not in said


@pytest.mark.parametrize("content", [None, b"not a history"])
def test_bad_input_is_one_line_that_names_the_file(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "history.nc").write_bytes(content)
    assert plot.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "history.nc") in error
    assert error.count("\n") == 1


def test_another_netcdf_file_is_not_taken_for_a_history(tmp_path, capsys):
    folder = save(make_history(epochs=(1,)).drop_vars("nc3"), tmp_path / "run")
    assert plot.main([folder]) == 2
    assert "lacks nc3" in capsys.readouterr().err


def test_importing_plots_imports_neither_matplotlib_nor_jax():
    code = "import sys, ncjax.cli.plot; print({'matplotlib', 'jax'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "set()\n"
    )


def test_a_layer_without_equilibrium_has_no_panel_and_captions_fit_what_is_left():
    """As below batch normalization."""
    history = make_history()
    history["equilibrium_residual"].loc[{"layer": "layer_1"}] = np.nan
    for figure in (
        theory_figures.equilibrium_against_epoch(history),
        figures.collapse_against_epoch(history),
    ):
        titles = [axes.get_title() for axes in figure.axes]
        assert "layer 1" not in titles
        lines = figure.legends[0].get_title().get_text().splitlines()
        assert max(map(len, lines)) <= 19 * figure.get_figwidth()
    assert "head" in [
        axes.get_title() for axes in theory_figures.equilibrium_against_epoch(history).axes
    ]


def test_names_of_figures_are_separated_by_commas_and_may_stand_before_a_folder(capsys):
    names = ("collapse_against_epoch", "collapse_against_lambda")
    arguments = plot._parse(["--only", ",".join(names), "runs/digits"])
    assert (arguments.only, arguments.workdirs) == (names, [Path("runs/digits")])
    with pytest.raises(SystemExit) as stop:
        plot._parse(["--only", "collapse_against_epoch,collapse", "runs/digits"])
    assert stop.value.code == 2
    assert "no figure is called 'collapse'" in capsys.readouterr().err
