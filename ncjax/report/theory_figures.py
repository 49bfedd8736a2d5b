"""Draws theory over measurement: pure functions from histories to matplotlib figures.

Every prediction is drawn with the condition under which it holds. A history given to a figure has
one setting of every axis but weight_decay and seed.
"""

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from ncjax.metrics import closed_forms
from ncjax.metrics.vocabulary import BUDGET_TERMS, GRAM_CAUSES
from ncjax.report import panels
from ncjax.report.figures import setting_title
from ncjax.report.panels import Panel, number
from ncjax.storage.history import DEAD, RELAXED, imbalance_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TERM_WORDS = (
    r"theorem $\frac{t}{C}\dot M^{\top}$",
    r"mean $\frac{q}{C}1\mu_G^{\top}$",
    r"asymmetry $\frac{1}{C}EM^{\top}$",
    r"within classes $K$",
    r"gradient $G$",
)


def equilibrium_against_epoch(history: xr.Dataset) -> "Figure":
    """Draws how far every layer is from a critical point.

    Weight decay 0 is left out, because the distance is undefined there.
    """
    label = r"$\Vert\lambda W_k+\nabla_{W_k}\mathrm{fit}\Vert\,/\,\Vert\lambda W_k\Vert$"
    layers = [str(layer) for layer in history["layer"].values]
    drawn = [Panel(layer.replace("_", " "), label, (layer,)) for layer in layers]
    decayed = _decayed(history)
    curves, remark = panels.one_per_lambda(decayed), panels.remark_on_curves(decayed)
    return panels.against(curves, drawn, setting_title(history), remark=remark)


_CLOCK_PANELS = (
    Panel(
        "Norm balance (dashed: theory)",
        r"$|\Vert W_1\Vert^2-\Vert W_L\Vert^2|$, of its start",
        ("norm_imbalance",),
    ),
    panels.HEAD_EQUILIBRIUM,
    panels.NC3,
    panels.NC1,
)


def collapse_against_clock(history: xr.Dataset) -> "Figure":
    """Draws collapse and norm balance of every lambda against the clock 2 lambda t.

    Along gradient flow, norm balance is the same function of this clock for all lambdas.
    """
    decayed = _decayed(history)
    curves, remark = panels.one_per_lambda(decayed), panels.remark_on_curves(decayed)
    what = "Four measures against the relaxation clock"
    title = ", ".join(filter(None, [what, setting_title(history)]))
    figure = panels.against(curves, _CLOCK_PANELS, title, clock="relaxation_time", remark=remark)
    times = np.concatenate([panels.clock_of(curve.run, "relaxation_time") for curve in curves])
    axes = figure.axes[0]
    low = axes.get_ylim()
    grid = np.geomspace(times[times > 0].min(), times.max(), 300)
    predicted = closed_forms.norm_imbalance(grid / 2, np.ones_like(grid))  # the clock is 2 lambda t
    axes.plot(grid, predicted, color="0.4", linestyle="--", linewidth=1)
    axes.set_ylim(*low)
    return figure


_THEORY_PANELS = (
    Panel("Shortfall of an example's own output", r"$\epsilon$", ("epsilon",)),
    Panel(
        "Norm of the head (dotted: balance)",
        r"$\Vert W_L\Vert_F^2$",
        ("head_norm_sq", "norm_target"),
        "predicted_head_norm_sq",
    ),
    panels.NC3._replace(predicted="nc3_floor"),
    Panel(
        "Angles of the head",
        r"mean of $|\cos+1/(C-1)|$",
        ("nc2_equiangular_head",),
        "predicted_equiangular_head",
    ),
    Panel(
        "Error of the theorem as stated",
        r"$\Vert W_L-W_{\rm theorem}\Vert\,/\,\Vert W_L\Vert$",
        ("theorem_residual",),
    ),
    Panel(
        "Margin of the network with norms one",
        r"$\gamma=a\,/\,\prod_k\Vert W_k\Vert_F$",
        ("normalized_margin",),
    ),
)


_SYMMETRIC = (
    "dashed: symmetric solution with the same mean outputs, valid at equilibrium once K is small "
    "beside $\\lambda W_L$"
    "\n(of NC3: the least that any class means leave the head, always valid)"
)


def theory_against_lambda(histories: dict[str, xr.Dataset], remark: str = "") -> "Figure":
    """Draws measured and predicted values at the last epoch, against weight decay.

    They are epsilon, the head's norm, NC3 and angles, the error of the theorem, and gamma. `remark`
    is what a caption also says.
    """
    decayed = {name: _decayed(history) for name, history in histories.items()}
    laws = {name: fitted_law(history) for name, history in decayed.items()}
    laws_remark = (
        f"{_SYMMETRIC}\n"
        r"dashed $\epsilon$: homogeneous law, valid at equilibrium and collapse while every mode "
        r"lives; " + "; ".join(dict.fromkeys(law.source for law in laws.values() if law))
        if any(laws.values())
        else _SYMMETRIC
    )
    remarks = "\n".join(filter(None, (laws_remark, remark)))
    figure, all_axes = panels.against_lambda(decayed, _THEORY_PANELS, remarks)
    low, high = all_axes[0].get_xlim()
    for law, history, colour in zip(
        laws.values(), decayed.values(), itertools.cycle(panels.COLOURS), strict=False
    ):
        if law:
            weight_decay = np.geomspace(max(low, high / 1e6), high, 400)
            effective = float((history["effective_decay"] / history["weight_decay"]).mean())
            epsilon = law.solution(effective * weight_decay).epsilon
            all_axes[0].plot(weight_decay, epsilon, color=colour, linestyle="--", linewidth=1)
            bottom, top = all_axes[0].get_ylim()
            shown = epsilon[weight_decay >= history["weight_decay"].values.min()]
            all_axes[0].set_ylim(min(bottom, 0.9 * np.nanmin(shown, initial=np.inf)), top)
    return figure


class Law(NamedTuple):
    """Holds the homogeneous law of one history; see `closed_forms`."""

    gamma: float
    depth: int
    setting: closed_forms.Setting
    source: str  # where gamma comes from

    @property
    def greatest(self) -> float:
        return closed_forms.critical_decays(self.gamma, self.depth, self.setting)[1]

    def solution(self, weight_decay: np.ndarray) -> closed_forms.Solution:
        return closed_forms.homogeneous_solution(weight_decay, self.gamma, self.depth, self.setting)


def fitted_law(history: xr.Dataset) -> Law | None:
    """Returns the homogeneous law of a history, or None if it has none.

    gamma is in closed form for the unconstrained-feature model, else measured at the least lambda
    whose runs have relaxed. There is no law with cross-entropy, with layers of another degree or
    another decay, for classes of different sizes, or if no run has relaxed, as with Adam, which has
    no clock.
    """
    config = json.loads(history.attrs["config"])
    final = history.isel(epoch=-1).sortby("weight_decay")
    setting = closed_forms.Setting(
        history.sizes["label"], config["model"]["head_bias"], config["targets"]
    )
    depth = history.sizes["layer"]
    degrees = np.atleast_1d(history["layer"].attrs.get("degree", 1.0))
    factors = [tuple(given) != (1.0,) for given in config.get("decay", {}).values()]
    if config["loss"] != "square" or (degrees != 1).any() or any(factors):
        return None
    if imbalance_ratio(history) > 1:
        return None
    if final["closed_form_epsilon"].notnull().any():
        gamma = closed_forms.unconstrained_gamma(depth, int(history.attrs["per_class"]), setting)
        return Law(gamma, depth, setting, r"$\gamma$ in closed form")
    margin = final["normalized_margin"].where(final["relaxation_time"] >= RELAXED).mean("seed")
    usable = np.flatnonzero(np.isfinite(margin.values) & (margin.values > 0))
    if not usable.size:
        return None
    reference = number(final["weight_decay"].values[usable[0]])
    return Law(
        float(margin.values[usable[0]]),
        depth,
        setting,
        rf"$\gamma$ measured at $\lambda$ = {reference}",
    )


def budget_against_epoch(history: xr.Dataset, weight_decay: float) -> "Figure":
    """Draws the equilibrium budget of one lambda: shares of lambda W_L, stacked, and term norms."""
    run = history.sel(weight_decay=weight_decay)
    what = rf"Equilibrium budget at $\lambda$ = {number(weight_decay)}"
    title = ", ".join(filter(None, [what, setting_title(history)]))
    figure, (shares, norms) = panels.frame(2, "epoch", title)
    epochs = run["epoch"].values
    colours = (panels.COLOURS[0], panels.COLOURS[1], panels.COLOURS[2], panels.COLOURS[3], "0.7")
    values = np.stack([panels.over_seeds(run[f"budget_{term}"])[0] for term in BUDGET_TERMS])
    for sign in (1, -1):  # positive shares are above the axis, negative ones below
        part = np.where(np.isnan(values), 0, np.maximum(sign * values, 0)) * sign
        shares.stackplot(epochs, part, colors=colours, linewidth=0)
    shares.axhline(1, color="black", linewidth=0.8)
    handles = []
    for term, words, colour in zip(BUDGET_TERMS, _TERM_WORDS, colours, strict=True):
        mean, least, greatest = panels.over_seeds(run[f"budget_{term}_norm"])
        handles += norms.plot(
            epochs, mean, color=colour, marker="o", markersize=1.5, linewidth=1, label=words
        )
        norms.fill_between(epochs, least, greatest, color=colour, alpha=0.15, linewidth=0)
    whole = panels.over_seeds(run["weight_norm_sq"].isel(layer=-1) ** 0.5 * run["effective_decay"])[
        0
    ]
    handles += norms.plot(
        epochs, whole, color="black", linestyle="--", linewidth=1, label=r"whole $\lambda W_L$"
    )
    drawn = np.concatenate([line.get_ydata() for line in handles])
    panels.scale_x(shares, epochs)
    panels.scale_x(norms, epochs)
    panels.finish(
        shares,
        Panel("Share by projection (they sum to 1)", r"share of $\lambda W_L$", ()),
        np.array([]),
    )
    panels.finish(norms, Panel("Frobenius norm of each term", "norm", ()), drawn)
    low, high = np.minimum(values, 0).sum(0), np.maximum(values, 0).sum(0)
    shares.set_ylim(
        max(-2.0, 1.1 * np.nanmin(low, initial=0)), min(3.0, 1.1 * np.nanmax(high, initial=1))
    )
    remark = (
        "an identity at every epoch, no assumption (docs/theory.md); shares are cut at "
        "\N{MINUS SIGN}2 and 3; "
    )
    remark += f"training split, {panels.caption_of([history])}"
    panels.legend(figure, handles, remark)
    return figure


_CAUSE_WORDS = (
    "asymmetry",
    "within classes",
    "gradient",
    "class-mean outputs",
)
_FEW = 3  # weight decays that a line does not join
# A title, a label, a measure, its upper bound and, if there is one, its floor.
_BOUNDED = (
    ("NC1", panels.NC1.label, "nc1", "nc1_bound", ""),
    ("NC2: distance to a simplex ETF", "etf_error", "etf_error", "nc2_bound_etf", ""),
    ("NC3: self-duality", panels.NC3.label, "nc3", "nc3_bound", "nc3_floor"),
    ("NC4: nearest class mean", "share of examples", "nc4", "nc4_bound", ""),
)


def bounds_against_lambda_and_epoch(history: xr.Dataset, weight_decay: float) -> "Figure":
    """Draws NC1 to NC4 beside their proved bounds, and the causes of the bound on NC2.

    The left panels are of the last epoch against weight decay, the right ones of one weight decay
    against epochs.
    """
    title = ", ".join(
        filter(None, ("Measured values and their proved bounds", setting_title(history)))
    )
    final = panels.training(_decayed(history).sortby("weight_decay")).isel(epoch=-1)
    run = panels.training(history.sel(weight_decay=weight_decay))
    by_epoch = (run, "epoch", "epoch", rf"at $\lambda$ = {number(weight_decay)}")
    by_lambda = (final, "weight_decay", r"weight decay $\lambda$", "at the last epoch")
    # A single weight decay or epoch is no line.
    sides = [side for side in (by_lambda, by_epoch) if side[0].sizes[side[1]] > 1] or [by_epoch]
    # Ten panels below one another are longer than a page.
    sides = sides[:1] if panels.is_narrow() else sides
    pairs = [(row, side) for row in (*_BOUNDED, None) for side in sides]
    common = sides[0][2] if len(sides) == 1 else ""
    figure, all_axes = panels.frame(len(pairs), common, title)
    drawn: dict[str, Any] = {}
    for axes, (row, (one, axis, label, where)) in zip(all_axes, pairs, strict=True):
        if row is None:
            areas = _draw_causes(axes, one, axis, f"Causes of the bound on NC2, {where}")
            axes.set_xlabel(label, size=panels.SIZE)
        else:
            areas = _draw_bounded(axes, one, axis, row[2:], Panel(f"{row[0]}, {where}", row[1], ()))
        drawn |= {str(area.get_label()): area for area in areas}
    remark = (
        "bounds hold at any weights, no equilibrium assumed (docs/theory.md); bands and bars go "
        "from the least seed to the greatest; training split, "
    )
    panels.legend(figure, list(drawn.values()), remark + panels.caption_of([history]))
    return figure


def _draw_bounded(
    axes: "Axes", run: xr.Dataset, axis: str, names: Sequence[str], panel: Panel
) -> list:
    """Draws a measure, its bound and its floor against weight decay or epochs; returns the
    lines.
    """
    looks: tuple[dict[str, Any], ...] = (
        {"color": panels.COLOURS[0], "label": "measured", "marker": "o"},
        {"color": "black", "linestyle": "--", "label": "at most", "marker": "v"},
        {"color": "black", "linestyle": ":", "label": "at least", "marker": "^"},
    )
    # A line through few weight decays would say what lies between them.
    are_few = axis == "weight_decay" and run.sizes[axis] <= _FEW
    drawn, lines = [], []
    for name, look in zip(names, looks, strict=True):
        if name:
            mean, least, greatest = panels.over_seeds(run[name])
            at = run[axis].values
            shown: dict[str, Any] = {**look, "linestyle": "none"} if are_few else look
            if panels.is_crowded(at):
                shown = {**look, "marker": ""}
            lines += axes.plot(at, mean, markersize=3 if are_few else 1.5, linewidth=1, **shown)
            if are_few:
                axes.vlines(at, least, greatest, color=look["color"], linewidth=1)
            else:
                axes.fill_between(at, least, greatest, color=look["color"], alpha=0.15, linewidth=0)
            drawn.append(np.concatenate([mean, least, greatest]))
    panels.scale_x(axes, run[axis].values)
    panels.finish(axes, panel, np.concatenate(drawn))
    return lines


def _draw_causes(axes: "Axes", run: xr.Dataset, axis: str, title: str) -> list:
    """Draws the share of every cause in the bound on NC2, stacked; returns the areas."""
    values = [panels.over_seeds(run[f"nc2_share_{cause}"])[0] for cause in GRAM_CAUSES]
    colours = (panels.COLOURS[2], panels.COLOURS[3], "0.7", panels.COLOURS[1])
    shares = np.nan_to_num(np.stack(values))
    areas = axes.stackplot(
        run[axis].values, shares, colors=colours, labels=_CAUSE_WORDS, linewidth=0
    )
    panels.scale_x(axes, run[axis].values)
    panels.finish(axes, Panel(title, "share", ()), np.array([]))
    axes.set_ylim(0, 1)
    return areas


_MODE_LOOKS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "markersize": 2, "linestyle": "none", "color": panels.COLOURS[0]},
    {"marker": "x", "markersize": 4, "linestyle": "none", "color": panels.COLOURS[1]},
)


def modes_against_lambda(settings: Sequence[xr.Dataset]) -> "Figure":
    """Draws the phase diagram: mode eigenvalues of every run at its last epoch against lambda.

    Each setting has a panel.
    """
    figure, all_axes = panels.frame(len(settings), r"weight decay $\lambda$", "")
    from matplotlib.lines import Line2D

    sources = []
    for axes, history in zip(all_axes, settings, strict=True):
        final = _decayed(history).isel(epoch=-1).transpose("weight_decay", "seed", "mode", ...)
        decay, modes = final["effective_decay"].values, final["mode_eigenvalues"].values
        decays = np.broadcast_to(decay[..., None], modes.shape)
        for is_dead in (False, True):
            shown = (modes < DEAD) == is_dead
            axes.plot(decays[shown], modes[shown], alpha=0.4, **_MODE_LOOKS[is_dead])
        law = fitted_law(_decayed(history))
        panels.scale_x(axes, np.append(decay, 1.2 * law.greatest if law else []))
        panels.finish(axes, Panel(setting_title(history), "eigenvalue", ()), np.array([]))
        axes.set_ylim(
            min(-0.05, 1.1 * np.nanmin(modes, initial=0)),
            max(1.05, 1.1 * np.nanmax(modes, initial=0)),
        )
        if law:
            _draw_branches(axes, law)
            sources.append(law.source)
    looks: tuple[tuple[Any, str], ...] = (
        ("-", r"stable branch"),
        (":", "unstable branch and $\\lambda$ of equal loss"),
    )
    handles = [
        Line2D([], [], color="black", linewidth=1, linestyle=style, label=words)
        for style, words in looks
    ]
    points = [Line2D([], [], label="measured mode", **_MODE_LOOKS[0])]
    if any(
        (one["mode_eigenvalues"].isel(epoch=-1) < DEAD).any() for one in map(_decayed, settings)
    ):
        points.append(Line2D([], [], label=f"dead mode, below {DEAD}", **_MODE_LOOKS[1]))
    law_words = "; ".join(dict.fromkeys(sources))
    remark = f"all modes of all runs, {panels.caption_of(settings).removeprefix('means over ')}"
    remark += f"\nlaw: equilibrium, norms in balance; {law_words}" if sources else ""
    panels.legend(figure, [*points, *(handles if sources else [])], remark)
    return figure


def _draw_branches(axes: "Axes", law: Law) -> None:
    low, high = axes.get_xlim()
    scale, least = (
        closed_forms.scale(law.gamma, law.depth, law.setting),
        closed_forms.spinodal_margin(law.depth),
    )
    for margin, style in (
        (np.linspace(least, 1 - 1e-6, 400), "-"),
        (np.linspace(0, least, 400), ":"),
    ):
        weight_decay = scale * closed_forms.relative_decay(margin, law.depth)
        axes.plot(weight_decay, margin, color="black", linestyle=style, linewidth=1)
    if law.depth > 2:
        equal_loss, _ = closed_forms.critical_decays(law.gamma, law.depth, law.setting)
        axes.axvline(equal_loss, color="black", linestyle=":", linewidth=0.7)
    axes.set_xlim(low, high)


def _decayed(history: xr.Dataset) -> xr.Dataset:
    return history.isel(weight_decay=history["weight_decay"].values > 0)
