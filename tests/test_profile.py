"""Parts of a training step: read from a compiled program, timed by hand, and traced."""

import pytest

pytest.importorskip("torch")

from benchmarks import profile
from benchmarks.networks import Network
from benchmarks.profile import Operation

EPOCH = "jit(train)/while/body/while/body"
STEP = f"{EPOCH}/while/body/closed_call"
TEXT = f"""HloModule jit_train

%fused_computation (p: f32[2,2]) -> f32[2,2] {{
  %p = f32[2,2]{{1,0}} parameter(0)
  ROOT %dot.1 = f32[2,2]{{1,0}} dot(%p, %p), metadata={{op_name="{STEP}/jvp(M)/dot_general"}}
}}

%add (p: f32[2,2]) -> f32[2,2] {{
  ROOT %sum = f32[2,2]{{1,0}} add(%p, %p)
}}

ENTRY %main (q: f32[2,2]) -> f32[2,2] {{
  %ynn_fusion = f32[2,2]{{1,0}} fusion(%q), kind=kCustom, calls=%fused_computation
  %dot.2 = f32[2,2]{{1,0}} dot(%q, %q), metadata={{op_name="{STEP}/transpose(jvp(M))/transpose"}}
  %relu = (f32[2]{{0}}, f32[2]{{0}}) fusion(%q), calls=%f, metadata={{op_name="{STEP}/jvp(M)/max"}}
  %weights = f32[2,2]{{1,0}} fusion(%q), calls=%f, metadata={{op_name="{STEP}/add"}}
  %added = f32[2,2]{{1,0}} fusion(%q), calls=%add, metadata={{op_name="{STEP}/sub"}}
  %batches = u32[2]{{0}} fusion(%q), calls=%f, metadata={{op_name="{EPOCH}/closed_call/add"}}
  %read = f32[2]{{0}} fusion(%q), calls=%f, metadata={{op_name="{STEP}/gather"}}
  ROOT %copy = f32[2,2]{{1,0}} copy(%weights)
}}
"""


def test_parts_are_read_from_what_an_operation_was_made_of():
    parts = profile.parts_in(TEXT)
    assert parts["ynn_fusion"] == parts["dot.2"] == "matmuls"
    assert parts["relu"] == "between them"
    assert parts["weights"] == parts["added"] == "update"
    assert parts["batches"] == parts["read"] == parts["copy"] == "the rest"


def test_an_idle_device_is_still_multiplying():
    """A matmul that returned after 1 ns of 10, an update in its midst, and a copy."""
    parts = {"dot": "matmuls", "update": "update", "copy": "the rest"}
    of_device = [
        Operation(0, 2, "copy"),
        Operation(3, 4, "dot"),
        Operation(6, 8, "update"),
        Operation(13, 15, "copy"),
        Operation(15, 16, "copy"),
    ]
    taken = profile.seconds_by_part({0: of_device}, parts)
    expected = {"matmuls": 1 + 2 + 5, "between them": 0, "update": 2, "the rest": 2 + 1 + 2 + 1}
    expected[profile.IN_GAPS] = 2 + 5
    assert taken == pytest.approx({part: 1e-9 * each for part, each in expected.items()})


def test_a_trace_has_all_parts_of_a_step():
    network = Network((64,), (32, 32), batch=60, examples=240, samples=2_000)
    (traced,), (untraced,), devices = profile.profile(network, runs=2, repeats=1)
    assert devices == 2
    assert untraced > 0
    assert all(traced[part] > 0 for part in profile.PARTS)
