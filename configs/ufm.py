"""The unconstrained-feature model: a linear net on x_n = e_n, where training must meet closed
forms.

    ncjax train --config=ufm --workdir=runs/ufm
    ncjax train --config=ufm --config.model.head_bias=free --workdir=runs/ufm_bias
    ncjax train --config=ufm --config.model.widths=64,64,64 --workdir=runs/ufm_depth4
    ncjax train --config=ufm:smoke --workdir=runs/ufm_smoke

Depth L = 3 (the features are one of the factors), C = 10, N = 5, full batch, float64, from an
initialization large enough that every mode starts above the unstable branch. lambda runs up to 98%
of the spinodal, 0.0276, and once beyond it, where every mode dies. Two CPU cores: 19 s with
figures, 6 s of it training. All 18 runs that have a closed form meet it: epsilon to 2e-14 and the
head's norm to 8e-14 relative, nc3 to 1e-15. Another depth: `model.widths`.
"""

from ncjax.config import Config, default_config


def get_config(variant: str = "") -> Config:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/ufm.py has no variant {variant!r}; it has smoke")
    config = default_config()
    config.data.name = "identity"
    config.data.per_class = 5
    config.model.activation = "linear"
    config.model.widths = (64, 64)
    config.train.precision = "float64"
    config.train.batch_size = 0
    config.train.schedule = "constant"
    config.train.epochs = 10_000
    config.sweep.learning_rate = (0.05,)
    config.sweep.init_scale = (1.5,)
    config.sweep.weight_decay = (0.003, 0.006, 0.012, 0.018, 0.024, 0.027, 0.03)
    config.sweep.seed = (0, 1, 2)
    config.checkpoint.every = 0
    if variant == "smoke":
        config.train.epochs = 2000
        config.sweep.weight_decay = (0.012, 0.018, 0.024)
        config.sweep.seed = (0, 1)
    return config
