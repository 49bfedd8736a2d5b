"""Figures of small made-up histories: that they are drawn at all, without a warning, and what they are drawn from."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from ncjax import figures, plots
from ncjax import history as histories
from ncjax.config import SWEPT, Grid

LAYERS = ("layer_1", "head")
DEFAULTS = {
    "weight_decay": (0.0, 1e-3),
    "learning_rate": (0.1,),
    "momentum": (0.9,),
    "init_scale": (1.0,),
    "seed": (0, 1),
}
EVERY_FIGURE = {
    "collapse_against_epoch.png",
    "collapse_against_lambda.png",
    "class_mean_cosines.png",
    "equilibrium_against_epoch.png",
}


@pytest.fixture
def without_layout(monkeypatch):
    """Measuring every text to place the panels takes most of the time of a figure."""
    write = plots._write

    def write_plainly(figure, path):
        figure.set_layout_engine("none")
        return write(figure, path)

    monkeypatch.setattr(plots, "_write", write_plainly)


def make_history(epochs=(0, 1, 10), classes=3, **axes):
    """Random measurements in (0, 1), except that nothing has diverged and weight decay 0 has no residual."""
    axes = {name: axes.get(name, DEFAULTS[name]) for name in SWEPT}
    grid = Grid(axes, tuple(n for n in SWEPT if n in ("weight_decay", "seed") or len(axes[n]) > 1))
    rng, joined = np.random.default_rng(0), None
    sizes = {"split": 2, "layer": len(LAYERS), "label": classes}
    for epoch in epochs:
        metrics = {
            name: rng.uniform(0.01, 1, (grid.size, *(sizes[dim] for dim in variable.dims))).astype(np.float32)
            for name, variable in histories.VOCABULARY.items()
        }
        metrics["finite"][:] = 1
        metrics["equilibrium_residual"][np.array(grid.columns()["weight_decay"]) == 0] = np.nan
        metrics[histories.COSINES] = rng.uniform(-1, 1, (grid.size, classes, classes))
        names = tuple(f"class {i}" for i in range(classes))
        newest = histories.one_epoch(epoch, metrics, grid=grid, layers=LAYERS, label_names=names, attrs={})
        joined = histories.append(joined, newest)
    return joined


def diverge(history, **where):
    """`history` with the runs at `where` diverged from the second epoch on."""
    history = history.copy(deep=True)
    for name in histories.VOCABULARY:
        history[name][where | {"epoch": slice(1, None)}] = 0 if name == "finite" else np.nan
    history[histories.COSINES][where] = np.nan
    return history


def save(history, folder):
    folder.mkdir()
    histories.save(history, folder / "history.nc")
    return str(folder)


def words(figure):
    """All that is written in a figure's legend."""
    return [text.get_text() for legend in figure.legends for text in (legend.get_title(), *legend.get_texts())]


def assert_drawn(paths, names):
    assert {path.name for path in paths} == names
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 2_000
    assert not [path for path in paths[0].parent.iterdir() if path.suffix != ".png"]


def test_every_figure_is_written(tmp_path):
    assert_drawn(plots.draw_all(make_history(), tmp_path / "figures"), EVERY_FIGURE)


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
    np.testing.assert_array_equal(figures.terminal_epoch(accuracy), [10, np.nan, 100, np.nan])


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
        pytest.param(make_history(epochs=(1,), classes=2, weight_decay=(1e-3,), seed=(0,)), id="one run, two classes"),
        pytest.param(make_history(epochs=(0,)) * 0, id="only epoch 0, all zero"),
        pytest.param(diverge(make_history()), id="all diverged"),
    ],
)
def test_unusual_histories_are_drawn(history, tmp_path):
    assert_drawn(plots.draw_all(history, tmp_path), EVERY_FIGURE)


@pytest.mark.usefixtures("without_layout")
def test_without_weight_decay_there_is_no_equilibrium_to_draw(tmp_path):
    history = make_history(weight_decay=(0.0,))
    assert_drawn(plots.draw_all(history, tmp_path), EVERY_FIGURE - {"equilibrium_against_epoch.png"})


def test_diverged_runs_are_counted_and_the_others_drawn():
    history = diverge(make_history(), weight_decay=1, seed=0)
    figure = figures.collapse_against_epoch(history)
    assert "(1 of 4 diverged)" in words(figure)[0]
    assert words(figure)[2].endswith("(1 of 2 diverged)")
    survivor = history["nc1"].sel(split="train", seed=1).values[1]
    solid = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose(solid[0].get_ydata()[1:], survivor[1:])


def test_many_weight_decays_share_a_colour_bar():
    history = make_history(weight_decay=(0.0, *np.logspace(-5, -2, 11)))
    figure = figures.collapse_against_epoch(history)
    assert len(figure.axes) == 7
    assert not figure.legends[0].get_texts()
    figure.draw_without_rendering()


def test_many_classes_are_not_labelled():
    few, many = (figures.class_mean_cosines(make_history(epochs=(1,), classes=c)).axes[0] for c in (4, 31))
    assert (len(few.get_xticklabels()), len(many.get_xticklabels())) == (4, 0)


@pytest.mark.usefixtures("without_layout")
def test_every_setting_of_another_axis_has_its_own_figures(tmp_path):
    paths = plots.draw_all(make_history(epochs=(1,), weight_decay=(0.0,), learning_rate=(0.1, 0.25)), tmp_path)
    assert_drawn(
        paths,
        {
            n.replace(".png", f"-learning_rate={lr}.png")
            for n in EVERY_FIGURE - {"equilibrium_against_epoch.png"}
            for lr in (0.1, 0.25)
        },
    )


@pytest.mark.usefixtures("without_layout")
def test_command_redraws_every_run_and_compares_them(tmp_path, capsys):
    odd, plain = (
        save(make_history(weight_decay=(0.0,)), tmp_path / "a$1$"),
        save(make_history(epochs=(1,)), tmp_path / "b"),
    )
    assert plots.main([odd, plain, "--out", str(tmp_path / "both")]) == 0
    compared = list((tmp_path / "both").iterdir())
    assert_drawn(compared, {"collapse_against_lambda.png", "compare_against_epoch.png"})
    assert {path.name for path in (tmp_path / "b" / "figures").iterdir()} == EVERY_FIGURE
    assert len(capsys.readouterr().out.splitlines()) == 3 + 4 + 2


def test_compared_histories_are_named():
    figure = figures.collapse_against_lambda({"wide": make_history(), "narrow": make_history(seed=(0,))})
    assert words(figure)[1:] == ["wide", "narrow"]
    assert "n = 1 to 2 seeds" in words(figure)[0]


@pytest.mark.parametrize("content", [None, b"not a history"])
def test_bad_input_is_one_line_that_names_the_file(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "history.nc").write_bytes(content)
    assert plots.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "history.nc") in error
    assert error.count("\n") == 1


def test_another_netcdf_file_is_not_taken_for_a_history(tmp_path, capsys):
    folder = save(make_history(epochs=(1,)).drop_vars("nc3"), tmp_path / "run")
    assert plots.main([folder]) == 2
    assert "lacks nc3" in capsys.readouterr().err


def test_importing_plots_imports_neither_matplotlib_nor_jax():
    code = "import sys, ncjax.plots; print({'matplotlib', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
