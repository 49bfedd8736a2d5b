"""One sweep on several meshes of four simulated devices: `python -m tests.meshes FOLDER` prints
what came out, as JSON.

A process of its own, because the tests' has two devices.
"""

import contextlib
import json
import signal
import sys
from pathlib import Path
from unittest import mock

import jax

from ncjax.config import default_config
from ncjax.plan import prepare
from ncjax.runs import inspect, loop, processes, signals
from ncjax.training import sweep
from tests.helpers import unmeasured

MESHES = ((1, 1), (4, 1), (2, 2), (1, 4))


def make_config(run=0, data=1, **fields):
    """Four runs in float64; a batch that two devices can share evenly, and four cannot. Fields
    with __ for a dot.
    """
    config = default_config()
    config.data.name, config.data.num_classes, config.data.per_class = "synthetic", 3, 20
    config.model.widths, config.model.head_bias = (8, 8), "free"
    config.train.epochs, config.train.batch_size, config.train.precision = 3, 18, "float64"
    config.log.epochs, config.checkpoint.every = (0, 3), 2
    config.sweep.weight_decay, config.sweep.seed = (0.0, 1e-2), (0, 1)
    config.mesh.run, config.mesh.data = run, data
    config.update({name.replace("__", "."): value for name, value in fields.items()})
    return config


NORMALIZED = {
    "data__name": "digits",
    "data__num_classes": 0,
    "data__per_class": 12,
    "data__standardize": True,
    "model__kind": "conv",
    "model__widths": (3, 4),
    "model__normalization": "batch",
    "sweep__learning_rate": (0.003,),
    "train__batch_size": 24,
    "train__augment": "crop_flip",
}


def recorded(folder, *mesh, **fields):
    return loop.train(prepare(make_config(*mesh, **fields), folder))


def trained(folder, *mesh, **fields):
    """States after all epochs."""
    config = make_config(*mesh, **fields)
    with unmeasured():
        begun = sweep.Sweep(prepare(config, folder))
        begun.advance(config.train.epochs, measured=False)
    return jax.device_get(begun.states)


def deviation(found, expected):
    """The largest, over all variables of two histories."""
    names = [str(name) for name in expected.data_vars]
    assert set(names) == set(map(str, found.data_vars))
    return max(inspect.deviation(found[name].values, expected[name].values) for name in names)


def collectives(folder, run, data, **fields):
    """Returns what devices exchange in training and in a measurement, kind -> bytes of each."""
    return sweep.make_program(prepare(make_config(run, data, **fields), folder)).collectives


def main(folder: Path) -> dict:
    deviations, moved = {}, {}
    expected = recorded(folder / "1x1", 1, 1)
    for run, data in MESHES[1:]:
        name = f"{run}x{data}"
        deviations[name] = deviation(recorded(folder / name, run, data), expected)
        moved[name] = collectives(folder / "plan", run, data)._asdict()
    # Four programs of one run on two devices.
    parts = recorded(folder / "parts", 2, 1, sweep__runs_per_program=1)
    deviations["4 programs"] = deviation(parts, expected)
    # Stopped on one mesh after an epoch, ended on another.
    stop = mock.patch.object(processes, "agree", side_effect=[(0, 1), (signal.SIGTERM, 1)])
    with stop, contextlib.suppress(signals.Interrupted):
        recorded(folder / "moved", 4, 1)
    deviations["4x1, then 1x4"] = deviation(recorded(folder / "moved", 1, 4), expected)
    alone, spread = (trained(folder / "plan", *mesh, **NORMALIZED) for mesh in ((1, 1), (2, 2)))
    pairs = zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True)
    deviations["batch normalization, 2x2"] = max(inspect.deviation(a, b) for a, b in pairs)
    return {"deviations": deviations, "collectives": moved}


if __name__ == "__main__":
    from tests import chaos

    with chaos.one_program():
        print(json.dumps(main(Path(sys.argv[1]))))
