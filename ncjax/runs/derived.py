"""Computes on the host the metrics that need no device."""

from typing import Any

import numpy as np

from ncjax import config as configuration
from ncjax.config import Config
from ncjax.metrics import closed_forms, theory
from ncjax.training.sweep import Sweep


def derived_metrics(sweep: Sweep, class_mean_logits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the metrics that follow from the grid and one measurement, without the devices.

    These are the clocks of gradient flow, the eigenvalues of the modes, and the closed form, which
    is NaN if the network has none.
    """
    columns, recipe, config = sweep.columns, sweep.recipe, sweep.plan.config
    weight_decay = recipe.effective_decay(columns["weight_decay"], columns["momentum"])
    flow_time = sweep.flow_time[:, sweep.epoch]
    hidden, head, bias = (columns[name] for name in configuration.DECAY_FACTORS)
    num_classes, depth = sweep.plan.dataset.num_classes, len(config.model.widths) + 1
    per_class = recipe.train_size // num_classes
    setting = closed_forms.Setting(num_classes, recipe.head_bias, config.targets)
    gamma: Any = closed_forms.unconstrained_gamma(depth, per_class, setting)
    has_decay = weight_decay * hidden * head > 0
    factors = np.where(has_decay, hidden ** (depth - 1) * head, 1)
    known = has_decay & (_is_unconstrained(config) and recipe.is_balanced)
    if recipe.head_bias == "decayed" and depth > 2:
        known &= (hidden == 1) & (head == 1) & (bias == 1)
    if (factors != 1).any():
        # In layers times the root of their factor, all are decayed by lambda.
        gamma = gamma / np.sqrt(factors)
    solution = closed_forms.homogeneous_solution(
        weight_decay, gamma, depth, setting, bias_decay=weight_decay * bias
    )
    head_norm_sq = solution.weight_norm_sq / np.where(has_decay, head, 1)
    # Layers of different decay have no common clock.
    relaxing = np.where(hidden == head, weight_decay * head, 0)
    return {
        "effective_decay": weight_decay,
        "flow_time": flow_time,
        "relaxation_time": theory.relaxation_time(flow_time, relaxing),
        "nc0_law": sweep.nc0_law[:, sweep.epoch],
        "mode_eigenvalues": theory.mode_eigenvalues(class_mean_logits),
        "closed_form_epsilon": np.where(known, solution.epsilon, np.nan),
        "closed_form_nc3": np.where(known, solution.nc3, np.nan),
        "closed_form_norm_sq": np.where(known, head_norm_sq, np.nan),
    }


def _is_unconstrained(config: Config) -> bool:
    """Returns whether the closed form applies to a config.

    It applies to an unconstrained-feature model that is wide enough for all its modes, and that is
    trained by an optimizer which seeks critical points of the regularized loss.
    """
    model = config.model
    return (
        not model.network
        and (model.kind, model.normalization, model.feature_normalization)
        == ("mlp", "none", "none")
        and (config.data.name, config.model.activation, config.loss)
        == ("identity", "linear", "square")
        and configuration.OPTIMIZERS[config.train.optimizer].seeks_critical_points
        and min(config.model.widths) >= (config.data.num_classes or 10)
    )
