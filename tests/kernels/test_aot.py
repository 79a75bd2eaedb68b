"""What the operators launch compiles for every target, without spills and within its shared memory; needs no GPU."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILER = str(Path(__file__).with_name("aot_compile.py"))
# Shared memory that one program may use, in bytes.
TARGETS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
KERNELS = {"_depthwise_fwd", "_depthwise_bwd_weight", "_gated_pointwise_fwd"}
KERNELS |= {f"_neighborhood_{name}" for name in ("fwd", "bwd_dq", "bwd_dkv")}
KERNELS |= {f"_linear_{name}" for name in ("keys", "queries", "queries_bwd", "keys_bwd")}
KERNELS |= {"_focused_fwd", "_focused_bwd"}
KERNELS |= {f"_bilevel_{name}" for name in ("fwd", "bwd_dq", "bwd_dkv")}
KERNELS |= {f"_window_{name}" for name in ("fwd", "bwd", "bwd_dq", "bwd_dkv")}


def compile_and_check(run_python, target, dtypes, every):
    rows = json.loads(run_python(COMPILER, target, dtypes, "every" if every else "some", TRITON_INTERPRET=None))
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= TARGETS[target], row
        if (
            row["dtype"] != "fp64" or "depthwise" in row["kernel"] or "pointwise" in row["kernel"]
        ):  # else for tests only
            assert row["spilled"] <= 32, row  # bytes stored and loaded: four registers


@pytest.mark.parametrize("target", TARGETS)
def test_largest_kernels_compile_within_the_limits(run_python, target):
    compile_and_check(run_python, target, "bf16,fp32", every=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_within_the_limits(run_python, target):
    compile_and_check(run_python, target, "bf16,fp16,fp32,fp64", every=True)
