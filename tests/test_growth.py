"""benchmarks/growth: what it fits and writes, on made-up measurements."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from benchmarks import growth


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_is_the_slope_of_the_upper_half(slope):
    sizes = [1, 4, 16, 64, 256, 1024, 4096]
    # Overhead hides how small sizes grow.
    values = [7.0, 7.0, 7.0, *(3 * size**slope for size in sizes[3:])]
    assert growth.exponent(sizes, values) == pytest.approx(slope, abs=1e-12)
    noisy = np.array(values) * [1, 1, 1, 1.1, 0.9, 0.9, 1.1]
    assert growth.exponent(sizes, noisy.tolist()) == pytest.approx(slope, abs=0.1)
    assert math.isnan(growth.exponent([1], [2.0]))


def test_all_sizes_are_configs_that_hold_what_they_name():
    for name, (field, values, base) in growth.QUANTITIES.items():
        for value in values:
            size = base._replace(**{field: value})
            config = size.config
            assert len(config.sweep.seed) == size.runs
            assert tuple(config.model.widths) == (size.width,) * size.depth
            assert config.data.per_class * size.classes == size.examples, name
            assert config.log.layers == size.layers
    for runs, axes in growth.HOST.items():
        sweep = growth.host_config(*axes).sweep
        assert len(sweep.weight_decay) * len(sweep.learning_rate) * len(sweep.seed) == runs


def made_up():
    """Everything that `measure_devices` returns, of a time that is linear and one that is not."""
    found = {}
    for name, (_, values, base) in growth.QUANTITIES.items():
        points = [
            {"compile_s": 4.0, "epoch_s": v * 1e-3, "measurement_s": v**2 * 1e-4, "bytes": v << 20}
            for v in values
        ]
        summary = growth.summary(values, points, growth.MEASURED)
        found[name] = summary | {"base": base._asdict()}
    return found


def test_the_table_has_both_ends_and_the_exponent(tmp_path):
    result, console = made_up(), Console(width=110, file=io.StringIO())
    assert [row[-1] for row in growth.rows(result)][:4] == ["0.00", "1.00", "2.00", "1.00"]
    growth.show_table(result, console)
    (row,) = [
        line for line in console.file.getvalue().splitlines() if "epoch" in line and "runs" in line
    ]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["runs", "1 to 4,096", "epoch", "1 ms", "4.1 s", "1.00"]
    growth.draw(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_stage_of_a_tiny_grid_is_timed():
    found = growth.time_host(2, 1, 2)
    stages = {"plan", "history of a measurement", "checkpoint", "resume", "tables"}
    stages |= {f"ncjax {command}" for command in ("show", "plot", "report")}
    files = {"history.nc", "metrics.jsonl", "report.html"}
    assert set(found) == stages | files | {"peak resident", "characters"}
    assert all(value > 0 for value in found.values())
