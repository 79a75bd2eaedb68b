"""Deformable token merging on a GPU: what it computes on the CPU, what torchvision's kernel computes, repeatably."""

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from tests.parity import relative_error
from visionattn.layers.token_merging import DeformableTokenMerging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture
def layer():
    """With offsets that leave the map."""
    layer = DeformableTokenMerging(16, 32).double()
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    return layer


def step(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, *layer.parameters()]
    seed = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    return [y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y, leaves, seed))]


@pytest.mark.parametrize("size", [(16, 12), (15, 33), (1, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_cpu(layer, size, training):
    x = torch.randn(3, 16, *size, dtype=torch.float64)
    expected = step(layer.train(training), x)
    for actual, wanted in zip(step(layer.cuda(), x.cuda()), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_equals_torchvision_s_kernel(layer):
    layer = layer.cuda().float()
    x = torch.randn(2, 16, 30, 22, device="cuda")
    offset = layer.conv_offset(x)
    weight = layer.proj.weight.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        expected = layer.act(layer.norm(deform_conv2d(x, offset, weight, layer.proj.bias, stride=2)))
        assert relative_error(layer(x).cpu(), expected.cpu()) < 1e-5
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_gradients_repeat_under_deterministic_algorithms(layer):
    layer, x = layer.cuda().float(), torch.randn(4, 16, 28, 28, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS wants an environment variable
    try:
        first, second = step(layer, x), step(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(layer, dtype):
    layer, x = layer.cuda().float().eval(), torch.randn(4, 16, 28, 28, device="cuda")
    with torch.inference_mode():
        expected = layer(x)
        with torch.autocast("cuda", dtype):
            assert relative_error(layer(x).cpu(), expected.cpu()) < 2e-2
        # Rounded weights move the places that are sampled.
        assert relative_error(layer.to(dtype)(x.to(dtype)).cpu(), expected.cpu()) < 1e-1
