"""What the kernels of the focused feature map must do; ``test_triton.py`` says how this file is run."""

import pytest
import torch

from tests.kernels.cases import DEVICE
from visionattn.kernels import focused
from visionattn.kernels.focused_map import triton as focused_triton

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 70, 2, 16), (3, 1, 1, 1), (1, 9, 5, 120)], ids=str)
@pytest.mark.parametrize("power", [3.0, 2.5])
def test_focused_features_read_tokens_of_any_strides_once(shape, power):
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(shape[0], shape[1], 3, *shape[2:], generator=generator).to(DEVICE)
    views[:, 0] = -1  # a token of nothing positive
    transposed = torch.randn(*shape[:2], shape[3], shape[2], generator=generator).to(DEVICE).transpose(2, 3)
    scale = torch.randn(1, 1, shape[2] * shape[3], generator=generator).to(DEVICE).requires_grad_()
    for x in (views[:, :, 1].requires_grad_(), transposed.requires_grad_()):
        results = []
        weight = torch.linspace(-1, 2, shape[3], device=DEVICE)
        for backend in ("triton", "reference"):
            out = focused(x.double() if backend == "reference" else x, power, scale, backend=backend)
            results.append((out.double(), *torch.autograd.grad((out * weight).sum(), [x, scale])))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    wide = torch.full((1, 1, 2, 64), 1e18, device=DEVICE)  # the cube of which is no float32
    torch.testing.assert_close(focused(wide, backend="triton"), wide, rtol=1e-5, atol=0)


def test_focused_features_split_their_sums_and_pass_opcheck(monkeypatch):
    x, factor = torch.randn(2, 150, 64, device=DEVICE).requires_grad_(), torch.rand(64, device=DEVICE).requires_grad_()
    gradients = []
    for programs in (512, 1):
        monkeypatch.setattr(focused_triton, "PROGRAMS", programs)
        out = torch.ops.visionattn.focused(x, factor, 3.0)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, factor]))
    torch.testing.assert_close(*gradients)
    torch.library.opcheck(torch.ops.visionattn.focused.default, (x, factor, 3.0))
    arguments = (torch.randn_like(x).detach(), x.detach(), factor.detach(), 3.0)
    torch.library.opcheck(torch.ops.visionattn.focused_backward.default, arguments)
    empty = torch.ops.visionattn.focused(x[:0], factor, 3.0)
    assert empty.shape == (0, 150, 64) and not torch.autograd.grad(empty.sum(), factor)[0].any()


@pytest.mark.parametrize("power", [3.0, 2.5])
def test_second_derivatives(power):
    x = torch.randn(1, 4, 2, 3, device=DEVICE, dtype=torch.float64).requires_grad_()
    scale = torch.randn(2, 3, device=DEVICE, dtype=torch.float64).requires_grad_()
    run = lambda x, scale: focused(x, power, scale, backend="triton")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, scale), fast_mode=True)
