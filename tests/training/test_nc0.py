"""NC0 of trained networks against its law, in float64."""

import numpy as np
import pytest

import ncjax


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_with_cross_entropy_the_sum_of_the_heads_rows_obeys_weight_decay_alone(decay, tmp_path):
    config = ncjax.Config()
    config.data.name, config.data.per_class, config.data.num_classes = "synthetic", 30, 4
    config.loss, config.train.decay, config.train.precision = "cross_entropy", decay, "float64"
    config.model.widths, config.model.normalization = (12, 12), "batch"
    config.model.head_bias = "free"
    config.train.epochs, config.train.batch_size, config.train.schedule = 12, 16, "cosine"
    config.sweep.weight_decay, config.sweep.momentum = (0.0, 1e-2, 0.3), (0.0, 0.9)
    config.decay.head, config.sweep.seed = (1.0, 2.0), (0, 1)
    history = ncjax.train(config, tmp_path)
    ratio = history["nc0"] / history["nc0"].sel(epoch=0)
    np.testing.assert_allclose(ratio, history["nc0_law"].broadcast_like(ratio), rtol=1e-10)
    end = history["nc0_law"].isel(epoch=-1)
    assert float(end.sel(weight_decay=0).min()) == 1
    assert float(end.sel(weight_decay=0.3).max()) < 0.9
