"""What the operators launch compiles for every target, without spills and within its shared memory; needs no GPU."""

import json

import pytest

pytest.importorskip("triton")

from tests.kernels.launch_lists import launched  # noqa: E402

# Shared memory that one program may use, in bytes.
TARGETS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


MOST_SCALARS = 160  # spilled, on AMD: the gradient of a 13x13 bias has 146
# Typical launches of which one program alone fills the registers of an SM, or of a compute unit of AMD's: findings, to
# become fewer.
ALONE = {"linear_keys", "linear_queries_bwd", "linear_keys_bwd", "window_bwd"}
ALONE_ON_AMD = ALONE | {"neighborhood_bwd_dkv", "window_fwd"}

DEFAULT = ("sm_90", "gfx942")  # one of each maker; all of them are slow


def compile_and_check(run_python, target, dtypes, extent):
    command = ("-m", "tests.kernels.aot_compile", target, dtypes, extent)
    rows = json.loads(run_python(*command, TRITON_INTERPRET=None))
    assert {row["kernel"] for row in rows} == {name for _, name in launched()}
    too_much = [row for row in rows if row["shared"] > TARGETS[target]]
    spilling = [row for row in rows if row["spilled"] > 32 and not row["may_spill"]]  # bytes: four registers
    scalars = [row for row in rows if row["scalars_spilled"] > MOST_SCALARS and not row["may_spill"]]
    assert not too_much + spilling + scalars, "\n".join(map(str, too_much + spilling + scalars))
    if extent == "typical":
        expected = ALONE_ON_AMD if target.startswith("gfx") else ALONE
        assert {row["kernel"] for row in rows if row["programs"] < 2} <= expected


@pytest.mark.parametrize("target", [pytest.param(t, marks=() if t in DEFAULT else pytest.mark.slow) for t in TARGETS])
def test_typical_launches_compile_within_the_limits(run_python, target):
    compile_and_check(run_python, target, "bf16,fp32", "typical")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles_within_the_limits(run_python, target):
    compile_and_check(run_python, target, "bf16,fp16,fp32,fp64", "every")
