"""Targets: what --target accepts, what its programs are made of, and what compiles for a TPU that
is not here.
"""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import pytest

from ncjax.cli import train
from ncjax.errors import InputError
from ncjax.plan import examine
from ncjax.training import parallel, program, sweep, targets
from tests import chaos

# The custom calls that XLA itself takes out again, whatever the platform.
HARMLESS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
# Every config that ships; `smoke` variants differ in sizes alone.
SHIPPED = (
    "digits",
    "mnist",
    "ufm",
    "fig1_cifar10",
    "fig1_cifar10:batch_norm",
    "fig2_mnist",
    "fig2_mnist:batch_norm",
)


@pytest.mark.parametrize(
    ("text", "platform", "kind", "shape"),
    [
        ("tpu:v5e:2x2", "tpu", "v5e", (2, 2)),
        ("tpu:v4:2x2x4", "tpu", "v4", (2, 2, 4)),
        ("tpu:v6e:16x16", "tpu", "v6e", (16, 16)),
        ("cuda:h100", "cuda", "h100", (1,)),
        ("cuda:a100:8", "cuda", "a100", (8,)),
    ],
)
def test_a_target_is_a_platform_a_kind_and_a_number_of_chips(text, platform, kind, shape):
    assert targets.parse(text) == (text, platform, kind, shape)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("", "name tpu:KIND:TOPOLOGY with KIND one of v4, v5e, v5p, v6e, as in tpu:v5e:2x2, or"),
        ("tpu", "name tpu:KIND:TOPOLOGY"),
        ("h100", "KIND one of a100, h100, h200, as in cuda:h100:4"),
        ("tpu:v9:2x2", "KIND one of v4, v5e, v5p, v6e"),
        ("cuda:v100", "KIND one of a100, h100, h200"),
        ("tpu:v5e", "TOPOLOGY must be 2 sides in chips, as in 2x2"),
        ("tpu:v5e:0x2", "TOPOLOGY must be 2 sides"),
        ("tpu:v5e:2x2x2", "TOPOLOGY must be 2 sides"),
        ("tpu:v5p:2x2", "TOPOLOGY must be 3 sides in chips, as in 2x2x2"),
        ("tpu:v5e:32x32", "its largest slice has 256 chips, and this would have 1,024"),
        ("cuda:h100:", "CARDS must be a number from 1 to 8"),
        ("cuda:h100:0", "CARDS must be a number from 1 to 8"),
        ("cuda:h100:9", "CARDS must be a number from 1 to 8"),
    ],
)
def test_what_is_no_target_is_one_line_that_says_what_is(text, way_out, capsys):
    assert train.main(["ncjax", "--dry-run", f"--target={text}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --target: got '{text}'; ")
    assert way_out in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "way_out"),
    [
        (["--workdir=run"], "nothing can train there; add --dry-run"),
        (
            ["--dry-run", "--coordinator=localhost:1", "--processes=2", "--process=0"],
            "one process compiles for all; start one",
        ),
    ],
)
def test_a_target_goes_with_a_dry_run_of_one_process(flags, way_out, capsys):
    assert train.main(["ncjax", "--target=cuda:h100", *flags]) == 2
    assert capsys.readouterr().err == f"error: --target: got 'cuda:h100'; {way_out}\n"


@pytest.mark.parametrize(("text", "extra"), [("tpu:v5e:2x2", "tpu"), ("cuda:h100", "cuda")])
def test_without_its_compiler_the_message_is_what_installs_it(text, extra, monkeypatch, capsys):
    monkeypatch.setattr(targets, "_compiler", lambda platform: None)
    before = dict(os.environ)
    assert train.main(["ncjax", "--dry-run", f"--target={text}"]) == 2
    assert f'is missing; pip install "ncjax[{extra}]"\n' in capsys.readouterr().err
    assert dict(os.environ) == before


def test_libtpu_looks_for_no_chip_and_jax_for_no_gpu(monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": "cuda"})
    monkeypatch.setattr(targets, "_compiler", lambda platform: "libtpu 1")
    targets.prepare(targets.parse("tpu:v5e:2x2"))
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_what_the_compiler_refuses_is_one_line(monkeypatch):
    def refuse(**options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    monkeypatch.setattr(targets, "_compiler", lambda platform: "libtpu 1")
    with pytest.raises(InputError, match=r"^--target: got 'tpu:v5e:3x3'; libtpu 1 cannot.*divis"):
        targets.find(targets.parse("tpu:v5e:3x3"))


def test_collectives_are_read_from_the_text_with_their_bytes():
    text = """
      %all-reduce.1 = f32[2,347]{1,0:T(8,128)} all-reduce(%fusion), channel_id=1
      %all-reduce-start = (f64[3]{0}, f32[5]{0}) all-reduce-start(%a, %b), to_apply=%add
      %all-reduce-done = (f64[3]{0}, f32[5]{0}) all-reduce-done(%all-reduce-start)
      %g = bf16[4,2]{1,0} all-gather(%c), dimensions={0}
      %fusion = f32[7]{0} fusion(%all-reduce.1), kind=kLoop
    """
    expected = {"all-reduce": [2 * 347 * 4, 3 * 8 + 5 * 4], "all-gather": [4 * 2 * 2]}
    assert sweep.collectives_in(text) == expected


def tiny(named):
    """A config that ships, on few examples of digits and with narrow layers."""
    config = train.load_config(named)
    if config.data.name != "synthetic":
        config.data.name, config.data.num_classes, config.data.per_class = "digits", 0, 12
    config.model.widths = (4,) * len(config.model.widths)
    config.train.batch_size = min(config.train.batch_size, 24)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("named", SHIPPED)
def test_programs_lower_for_every_accelerator_without_a_call_of_a_library(
    named, monkeypatch, fresh_metrics
):
    """LAPACK's eigenvalues, for one, are a custom call that some platforms lack."""
    one = sweep.make_uncompiled(examine(tiny(named), None))
    for platform, names in (("gpu", ("cuda", "rocm")), ("tpu", ("tpu",))):
        monkeypatch.setattr(parallel, "platform", lambda mesh, platform=platform: platform)
        program._make_metrics.cache_clear()
        advance = program.make_advance(one.recipe, one.mesh)
        with jax.enable_x64(True):
            for traced in advance.trace(*one._started, one._data):
                for name in names:
                    text = traced.lower(lowering_platforms=(name,)).as_text()
                    assert set(re.findall(r"custom_call @(\w+)", text)) <= HARMLESS


# What four chips exchange in a step and in a measurement where two share each batch. In a step it
# is the float32 gradients of a chip's runs, and with batch normalization the statistics of four
# layers, two forward and two backward.
EXCHANGED = {
    # 9 runs of 42,240 parameters
    "digits": ("1 all-reduce of 1.45 MiB", "2 all-reduces of 1.64 MiB in all"),
    # 6 runs of 930,816
    "mnist": ("1 all-reduce of 21.3 MiB", "2 all-reduces of 21.8 MiB in all"),
    # 6 runs of 399,136, and 0.05 MiB of statistics
    "fig1_cifar10:batch_norm": (
        "17 all-reduces of 9.18 MiB in all",
        "2 all-reduces of 10.1 MiB in all",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)])
@pytest.mark.parametrize("named", EXCHANGED)
def test_what_ships_compiles_for_four_chips(named, mesh, request):
    """All runs fit the chips at once. Runs exchange nothing; where chips share batches, a step adds
    up the gradients of a chip's runs in one all-reduce, beside which batch normalization has 16 of
    its statistics. A process of its own compiles, because the JAX of the tests has started.
    """
    run, data = mesh
    command = [sys.executable, "-m", "ncjax.main", f"--config={named}", "--dry-run"]
    flags = [f"--config.mesh.run={run}", f"--config.mesh.data={data}", "--target=tpu:v5e:2x2"]
    # Digits are part of scikit-learn.
    more = {} if named == "digits" else {"TFDS_DATA_DIR": request.getfixturevalue("tfds_dir")}
    environment = chaos.environment(chaos.ROOT / ".jax_cache", COLUMNS="1000", **more)
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=chaos.ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    training, measurement = ("none", "none") if data == 1 else EXCHANGED[named]
    assert f"in a training step {training}; in a measurement {measurement}" in done.stdout
    assert "runs at once" in done.stdout
    assert "which has 16 GiB" in done.stdout
