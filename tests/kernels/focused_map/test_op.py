"""The focused feature map and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.kernels import focused
from visionattn.kernels.common import cache
from visionattn.kernels.focused_map.export import focused_export


@pytest.mark.parametrize("samples", [1, 3])
def test_focused_features_have_the_gradients_of_their_formula(monkeypatch, samples):
    monkeypatch.setattr(cache, "SLICE_ELEMENTS", samples * 30)
    x, scale = torch.randn(3, 5, 2, 3).double(), torch.randn(1, 1, 6).double()
    inputs = [t.requires_grad_() for t in (x, scale)]
    for power in (3.0, 2.0):
        assert torch.autograd.gradcheck(lambda x, s, p=power: focused(x, p, s), inputs)
        assert torch.autograd.gradgradcheck(lambda x, s, p=power: focused(x, p, s), inputs)
    half = x.detach().bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(focused(half, 3.0, scale).sum(), half)
    (expected,) = torch.autograd.grad(focused_export(half, 3.0, F.softplus(scale).view(2, 3)).sum(), half)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, expected)
