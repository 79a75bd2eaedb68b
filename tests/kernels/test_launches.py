"""Operators list what they launch: every kernel, with the types that it is really launched with."""

import json

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.launch_lists import launched, lists, name_of  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hip", [False, True])
def test_every_launched_kernel_is_listed(dtype, hip):
    listed = [launch for launches in lists().values() for launch in launches(dtype, hip)]
    wanted = launched()
    missing = wanted - {name_of(launch) for launch in listed}
    assert not missing, f"no function `launches` yields {sorted(missing)}"
    missing = wanted - {name_of(launch) for launch in listed if launch.typical}
    assert not missing, f"no launch is `typical` of {sorted(missing)}"
    assert {name_of(launch) for launch in listed} == wanted


def test_launches_name_every_argument_once():
    for launches in lists().values():
        for launch in launches(torch.bfloat16, False):
            code = launch.kernel.fn.__code__
            parameters = set(code.co_varnames[: code.co_argcount])
            options = {"num_warps", "num_stages"}
            assert launch.constants.keys() - options | launch.arguments.keys() == parameters, launch
            assert not launch.constants.keys() & launch.arguments.keys(), launch


def test_kernels_are_launched_with_the_types_that_are_listed(run_python):
    """In the interpreter, where every operator is called once, forward and backward."""
    seen = json.loads(run_python("-m", "tests.kernels.record_launches", TRITON_INTERPRET="1"))
    listed = {}
    for launches in lists().values():
        for launch in launches(torch.float32, False):
            types = {name: plain_types(t) for name, t in launch.arguments.items()}
            listed.setdefault(name_of(launch), []).append(types)
    missing = launched() - {tuple(row["kernel"]) for row in seen}
    assert not missing, f"add a call that launches {sorted(missing)} to tests/kernels/record_launches.py"
    for row in seen:
        types, options = row["types"], listed[tuple(row["kernel"])]
        differing = [{name: (types[name], t) for name, t in o.items() if types[name] != t} for o in options]
        assert {} in differing, (row["kernel"], "types of the launch and of the list", min(differing, key=len))


def plain_types(types):
    return [plain_types(t) for t in types] if isinstance(types, tuple) else types.removesuffix(":16")
