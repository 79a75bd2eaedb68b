"""Operators with kernels run where their tensors are, and take tensors of any strides."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.kernels.launch_lists import modules
from tests.kernels.test_derivatives import CASES
from visionattn.kernels.common import custom_op as door

KERNELS = ["depthwise", "gated", "neighborhood, biased", "window, biased and padded", "bilevel", "linear", "focused"]


class _Elsewhere:
    """As much of a tensor on another GPU as is looked at before an operator's own code."""

    is_cuda = True
    device = torch.device("cuda", 1)

    def stride(self, axis):
        return 1

    def contiguous(self):
        return self


def test_the_body_runs_under_the_device_of_its_tensors_and_leaves_it(monkeypatch):
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(new):
        current.append(new)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)

    def body(x: torch.Tensor, fail: bool) -> torch.Tensor:
        assert current[-1] == x.device
        if fail:
            raise KeyError
        return x

    bodies = []
    monkeypatch.setattr(torch.library, "custom_op", lambda *args, **kwargs: bodies.append)
    door.custom_op("nothing", rows=("x",))(body)
    bodies[0](_Elsewhere(), False)
    with pytest.raises(KeyError):
        bodies[0](_Elsewhere(), True)
    assert current == [torch.device("cuda", 0)]


def test_every_operator_that_launches_kernels_comes_through_this_door():
    """Those that are made otherwise are of CPUs only, or launch nothing."""
    for module in modules():
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
            launches = any(isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript) for n in ast.walk(function))
            ways = [ast.unparse(d.func) for d in function.decorator_list if isinstance(d, ast.Call)]
            assert not (launches and "torch.library.custom_op" in ways), (module.__name__, function.name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_run_on_the_second_gpu_while_the_first_is_current(case):
    shapes, function = CASES[case]
    tensors = [torch.randn(shape, device="cuda:1", requires_grad=True) for shape in shapes]
    found, expected = (function(*tensors, backend=backend) for backend in ("triton", "reference"))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.sin().sum(), tensors) for y in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)  # sums over all positions in another order
