"""The unconstrained-feature model trained by our own code, against its closed forms, in float64.

Depth 3 with three classes stands for all in the default suite; the other depths and class numbers
are slow to compile.
"""

import importlib.util

import numpy as np
import pytest

from ncjax import plan
from ncjax.metrics import closed_forms
from ncjax.metrics.closed_forms import Setting
from ncjax.runs import loop
from tests.helpers import ROOT

PER_CLASS, EPOCHS = 5, 3000
# Of the spinodal. Beyond it every mode dies.
RELATIVE_DECAYS = (0.4, 0.7, 1.3)
SLOW = pytest.mark.slow
CASES = [
    pytest.param(
        depth,
        classes,
        head_bias,
        targets,
        marks=() if (depth, classes, head_bias, targets) == (3, 3, "none", "one_hot") else SLOW,
    )
    for depth in (2, 3, 4)
    for classes in (3, 10)
    for head_bias, targets in (
        ("none", "one_hot"),
        ("free", "one_hot"),
        ("decayed", "one_hot"),
        ("none", "centered"),
    )
    if head_bias != "decayed" or (depth, classes) == (2, 3)
    if targets == "one_hot" or (depth, classes) == (2, 3)
]


@pytest.fixture(scope="module")
def ufm_config():
    """configs/ufm.py's own."""
    spec = importlib.util.spec_from_file_location("ufm", ROOT / "configs" / "ufm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "classes", "head_bias", "targets"), CASES)
def test_a_trained_unconstrained_model_meets_its_closed_form(
    depth, classes, head_bias, targets, ufm_config, tmp_path
):
    setting = Setting(classes, head_bias, targets)
    gamma = closed_forms.unconstrained_gamma(depth, PER_CLASS, setting)
    last = closed_forms.critical_decays(gamma, depth, setting)[1]
    weight_decay = np.array(RELATIVE_DECAYS) * last

    config = ufm_config()
    config.data.num_classes, config.model.widths = (
        classes,
        (16 if classes == 3 else 32,) * (depth - 1),
    )
    config.model.head_bias, config.targets = head_bias, targets
    config.sweep.weight_decay, config.sweep.seed = tuple(weight_decay), (0,)
    # At depth 4 three strong classes diverge from the config's own initialization.
    config.sweep.learning_rate = 0.03 if classes == 3 else 0.05
    config.sweep.init_scale = 1.0 if (depth, classes) == (4, 3) else 1.5
    config.train.epochs, config.log.epochs = EPOCHS, (EPOCHS,)
    assert (config.train.precision, config.data.per_class) == ("float64", PER_CLASS)
    history = loop.train(plan.prepare(config, tmp_path))
    history = history.isel(epoch=-1, seed=0).sel(split="train")
    alive, dead = history.isel(weight_decay=[0, 1]), history.isel(weight_decay=2)
    expected = closed_forms.homogeneous_solution(weight_decay[:2], gamma, depth, setting)

    # The laws of docs/theory.md, from their roots: lambda C N^{1/L} = a^{1-2/L} (1 - a).
    np.testing.assert_allclose(
        expected.margin ** (1 - 2 / depth) * (1 - expected.margin),
        weight_decay[:2] * classes * PER_CLASS ** (1 / depth),
    )
    np.testing.assert_allclose(alive["epsilon"], expected.epsilon, rtol=1e-6)
    np.testing.assert_allclose(alive["delta"], expected.delta, rtol=1e-6, atol=1e-9)
    for layer in history["layer"].values:
        np.testing.assert_allclose(
            alive["weight_norm_sq"].sel(layer=layer), expected.weight_norm_sq, rtol=1e-6
        )
    if setting.sum_is_fitted:
        np.testing.assert_allclose(
            alive["nc3"], 2 - 2 * np.sqrt((classes - 1) / classes), rtol=1e-6
        )
        np.testing.assert_allclose(alive["predicted_head_cosine"], 0, atol=1e-6)
    else:
        assert (alive["nc3"] < 1e-6).all()
        np.testing.assert_allclose(alive["predicted_head_cosine"], -1 / (classes - 1), rtol=1e-6)
    np.testing.assert_allclose(alive["symmetric_nc3"], alive["nc3"], atol=1e-6)
    np.testing.assert_allclose(alive["nc3_floor"], alive["nc3"], atol=1e-6)
    np.testing.assert_allclose(alive["normalized_margin"], gamma, rtol=1e-6)
    np.testing.assert_allclose(alive["predicted_head_norm_sq"], expected.weight_norm_sq, rtol=1e-6)
    np.testing.assert_allclose(alive["norm_target"], expected.weight_norm_sq, rtol=1e-6)
    modes = alive["mode_eigenvalues"].transpose("weight_decay", "mode").values
    np.testing.assert_allclose(
        modes[:, : setting.modes], np.tile(expected.margin[:, None], setting.modes), rtol=1e-6
    )
    np.testing.assert_allclose(modes[:, setting.modes :], 0, atol=1e-6)
    if head_bias == "free":  # the theorem as stated
        assert (alive["theorem_residual"] < 1e-6).all()
    for name, measured in (("epsilon", "epsilon"), ("nc3", "nc3"), ("norm_sq", "weight_norm_sq")):
        of_the_run = alive[measured].sel(layer="head") if name == "norm_sq" else alive[measured]
        np.testing.assert_allclose(alive[f"closed_form_{name}"], of_the_run, rtol=1e-6, atol=1e-9)

    assert abs(dead["mode_eigenvalues"]).max() < 1e-3
    assert (dead["weight_norm_sq"] < 1e-2 * alive["weight_norm_sq"]).all()
    assert dead["closed_form_epsilon"].isnull()
    assert float(history["budget_residual"].max()) < 1e-12
    assert float(alive["lemma2_residual"].max()) < 1e-12


@pytest.mark.slow
def test_factors_on_weight_decay_meet_the_closed_form_of_their_geometric_mean(ufm_config, tmp_path):
    """W_k -> W_k sqrt(factor_k) has one lambda for all layers: that of the geometric mean."""
    depth, classes, factors = 3, 3, np.array([2.0, 2.0, 0.25])
    setting = Setting(classes)
    gamma = closed_forms.unconstrained_gamma(depth, PER_CLASS, setting)
    last = closed_forms.critical_decays(gamma, depth, setting)[1]
    config = ufm_config()
    config.data.num_classes, config.model.widths = classes, (16, 16)
    config.decay.hidden, config.decay.head = (1.0, 2.0), (0.25, 1.0)
    config.sweep.weight_decay, config.sweep.seed = (0.4 * last,), (0,)
    config.sweep.learning_rate, config.sweep.init_scale = 0.03, 1.5
    config.train.epochs, config.log.epochs = EPOCHS, (EPOCHS,)
    history = loop.train(plan.prepare(config, tmp_path))
    assert history["decay_hidden"].values.tolist() == [1, 2]
    assert history["decay_head"].values.tolist() == [0.25, 1]
    final = history.isel(epoch=-1, seed=0, weight_decay=0).sel(split="train")
    run = final.sel(decay_hidden=2, decay_head=0.25)
    mean = float(np.prod(factors) ** (1 / depth))
    expected = closed_forms.homogeneous_solution(0.4 * last * mean, gamma, depth, setting)
    np.testing.assert_allclose(run["epsilon"], expected.epsilon, rtol=1e-6)
    np.testing.assert_allclose(
        run["weight_norm_sq"], expected.weight_norm_sq * mean / factors, rtol=1e-6
    )
    np.testing.assert_allclose(run["closed_form_epsilon"], expected.epsilon, rtol=1e-12)
    np.testing.assert_allclose(run["closed_form_norm_sq"], run["weight_norm_sq"][-1], rtol=1e-6)
    np.testing.assert_allclose(run["norm_target"], run["weight_norm_sq"][-1], rtol=1e-6)
    assert (run["equilibrium_residual"] < 1e-6).all()
    assert run["lemma2_residual"] < 1e-12
    assert run["relaxation_time"].isnull()
    # One decay for all layers: the clock runs at its pace.
    same = final.sel(decay_hidden=1, decay_head=1)
    np.testing.assert_allclose(
        same["relaxation_time"], 2 * same["effective_decay"] * same["flow_time"]
    )
    squares = float((factors * run["weight_norm_sq"].values).sum())
    np.testing.assert_allclose(
        run["loss"], run["fit_loss"] + 0.5 * float(run["effective_decay"]) * squares, rtol=1e-12
    )


@pytest.mark.slow
def test_a_bias_decayed_more_than_the_layers_meets_its_closed_form(ufm_config, tmp_path):
    """Depth 2: up to a threshold the bias alone fits the sum of the outputs, then the weights fit a
    part of it, so that the head is between the simplex ETF and the orthogonal frame.
    """
    setting = Setting(3, "decayed")
    gamma = closed_forms.unconstrained_gamma(2, PER_CLASS, setting)
    weight_decay = 0.4 * closed_forms.critical_decays(gamma, 2, setting)[1]
    threshold = 0.4 / 0.6 / weight_decay
    factors = (0.5 * threshold, 2 * threshold, 5 * threshold)
    config = ufm_config()
    config.data.num_classes, config.model.widths, config.model.head_bias = 3, (16,), "decayed"
    config.decay.bias = factors
    config.sweep.weight_decay, config.sweep.seed = (weight_decay,), (0,)
    config.sweep.learning_rate, config.sweep.init_scale = 0.03, 1.5
    config.train.epochs, config.log.epochs = EPOCHS, (EPOCHS,)
    history = loop.train(plan.prepare(config, tmp_path))
    run = history.isel(epoch=-1, seed=0, weight_decay=0).sel(split="train")
    for name, measured in (("epsilon", "epsilon"), ("nc3", "nc3"), ("norm_sq", "weight_norm_sq")):
        of_the_run = run[measured].sel(layer="head") if name == "norm_sq" else run[measured]
        np.testing.assert_allclose(run[f"closed_form_{name}"], of_the_run, rtol=1e-6, atol=1e-9)
    assert run["closed_form_nc3"][0] < 1e-9 < 1e-2 < run["closed_form_nc3"][1]
    assert (run["equilibrium_residual"] < 1e-6).all()
