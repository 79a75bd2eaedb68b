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
    assert {name_of(launch) for launch in listed} == launched()
    typical = {name_of(launch) for launch in listed if launch.typical}
    assert typical == launched()


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
    assert {tuple(row["kernel"]) for row in seen} == launched()
    for row in seen:
        options = listed[tuple(row["kernel"])]
        assert any(all(row["types"][name] == t for name, t in types.items()) for types in options), (row, options[0])


def plain_types(types):
    return [plain_types(t) for t in types] if isinstance(types, tuple) else types.removesuffix(":16")
