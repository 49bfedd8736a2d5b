"""Computes on the host the metrics that need no device."""

import numpy as np

from ncjax.config import Config
from ncjax.metrics import closed_forms, theory
from ncjax.training import program
from ncjax.training.sweep import Sweep


def derived_metrics(sweep: Sweep, class_mean_logits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the metrics that follow from the grid and one measurement, without the devices.

    These are the clocks of gradient flow, the eigenvalues of the modes, and the closed form, which
    is NaN where the network has none.
    """
    columns, recipe, config = sweep.columns, sweep.recipe, sweep.plan.config
    weight_decay = recipe.effective_decay(columns["weight_decay"], columns["momentum"])
    flow_time = program.flow_time(
        recipe, columns["learning_rate"], columns["momentum"], np.array([sweep.epoch])
    )[:, 0]
    num_classes, depth = sweep.plan.dataset.num_classes, len(config.model.widths) + 1
    per_class = recipe.train_size // num_classes
    setting = closed_forms.Setting(num_classes, recipe.head_bias, config.targets)
    gamma = closed_forms.unconstrained_gamma(depth, per_class, setting)
    solution = closed_forms.homogeneous_solution(weight_decay, gamma, depth, setting)
    known = (weight_decay > 0) & (_is_unconstrained(config) and recipe.is_balanced)
    return {
        "effective_decay": weight_decay,
        "flow_time": flow_time,
        "relaxation_time": theory.relaxation_time(flow_time, weight_decay),
        "mode_eigenvalues": theory.mode_eigenvalues(class_mean_logits),
        "closed_form_epsilon": np.where(known, solution.epsilon, np.nan),
        "closed_form_nc3": np.where(known, solution.nc3, np.nan),
        "closed_form_norm_sq": np.where(known, solution.weight_norm_sq, np.nan),
    }


def _is_unconstrained(config: Config) -> bool:
    """Returns whether the closed form applies to a config.

    It does to the unconstrained-feature model that is wide enough for all its modes, trained by an
    optimizer that seeks critical points of the regularized loss.
    """
    return (
        (config.data.name, config.model.activation, config.loss) == ("identity", "linear", "square")
        and config.train.optimizer != "adamw"
        and min(config.model.widths) >= (config.data.num_classes or 10)
    )
