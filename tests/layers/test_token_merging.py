"""Deformable token merging against torchvision's deformable convolution and what the authors' module computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.backbones.litv2 import checkpoint_filter_fn
from visionattn.layers import token_merging
from visionattn.layers.token_merging import DeformableTokenMerging, bilinear_sample


def merging(dim=4, out_dim=6, offsets=2.0, **kwargs):
    """With offsets that leave the map, and normalisation that shows."""
    layer = DeformableTokenMerging(dim, out_dim, **kwargs)
    with torch.no_grad():
        nn.init.normal_(layer.conv_offset.weight, std=offsets / (4 * dim) ** 0.5)
        nn.init.normal_(layer.conv_offset.bias, std=offsets)
        for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return layer


def by_torchvision(layer, x):
    weight = layer.proj.weight.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)
    y = deform_conv2d(x.contiguous(), layer.conv_offset(x), weight, layer.proj.bias, stride=2)
    return F.gelu(layer.norm(y))


@pytest.fixture(params=["embedding_bag", "exportable"])
def path(request, monkeypatch):
    """Both ways to sample."""
    if request.param == "exportable":
        monkeypatch.setattr(token_merging, "exporting", lambda: True)
    else:
        monkeypatch.setattr(token_merging, "bilinear_sample", None)


def test_equals_the_authors():
    fixture = load_fixture("litv2/op_dtm")
    weights = {f"layers.0.downsample.{name}": value for name, value in fixture_weights(fixture).items()}
    state = {k.removeprefix("stages.1.downsample."): v for k, v in checkpoint_filter_fn(weights, None).items()}
    layer = DeformableTokenMerging(8, 16).eval()
    layer.load_state_dict({**layer.state_dict(), **state})
    expected = torch.tensor(fixture["output"]["values"]).view(fixture["output"]["shape"])
    assert relative_error(layer(fixture_image(fixture)), expected) < 2e-6  # a wrong eps is 6e-6


@pytest.mark.parametrize("size", [(8, 6), (15, 13), (2, 2), (3, 9)])
@pytest.mark.parametrize(("training", "offsets"), [(False, 0.3), (True, 4.0), (False, 1e3)])
def test_equals_torchvision_with_all_gradients(path, size, training, offsets):
    layer = merging(offsets=offsets, dtype=torch.float64).train(training)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), by_torchvision(layer, x)
    assert y.shape == (2, 6, size[0] // 2, size[1] // 2)
    torch.testing.assert_close(y, expected)
    leaves = [x, *layer.parameters()]
    seed = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, leaves, seed), torch.autograd.grad(expected, leaves, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradients(path):
    layer = merging(2, 3, dtype=torch.float64).eval()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)


def test_samples_are_interpolated_and_zero_outside():
    x = torch.tensor([[[[1.0], [2.0]], [[3.0], [5.0]]]])
    places = [(0, 0, 1), (0.5, 0, 2), (0.5, 0.5, 2.75), (-0.5, 0, 0.5), (1, 1.75, 1.25), (-1, 0, 0), (2, 1, 0)]
    rows, columns, expected = torch.tensor(places).T
    torch.testing.assert_close(bilinear_sample(x, rows[None], columns[None])[0, :, 0], expected)
    far = torch.tensor([[-1e30, 1e30, float("inf"), -float("inf")]])
    assert not bilinear_sample(x, far, far).any()


def test_starts_as_an_ordinary_convolution():
    layer = DeformableTokenMerging(4, 6).eval()
    assert not any(p.any() for p in layer.conv_offset.parameters())
    weight = layer.proj.weight.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)
    x = torch.randn(2, 4, 8, 6)
    torch.testing.assert_close(layer(x), F.gelu(layer.norm(F.conv2d(x, weight, layer.proj.bias, stride=2))))
    bound = (4 * 4) ** -0.5  # Kaiming uniform with a = sqrt(5), as PyTorch's convolutions
    assert 0.8 * bound < weight.abs().max() <= bound and 0 < layer.proj.bias.abs().max() <= bound
    assert layer.norm.eps == 1e-5 and layer.act.approximate == "none"


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)])
def test_maps_narrower_than_the_kernel_are_padded(path, size):
    layer = merging().eval()
    x = torch.randn(2, 4, *size)
    padded = F.pad(x, (0, max(2 - size[1], 0), 0, max(2 - size[0], 0)))
    torch.testing.assert_close(layer(x), layer(padded))


def test_empty_batch(path):
    assert merging().eval()(torch.randn(0, 4, 6, 6)).shape == (0, 6, 3, 3)


def test_positions_are_float32_in_half_precision(monkeypatch):
    seen = []
    sample = token_merging._corners
    monkeypatch.setattr(token_merging, "_corners", lambda r, c, H, W: seen.append((r, c)) or sample(r, c, H, W))
    layer = merging(16, 8).eval()
    x = torch.randn(1, 16, 40, 40)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    for exact, under_autocast in zip(*seen, strict=True):
        torch.testing.assert_close(under_autocast, exact, rtol=0, atol=0)
    assert relative_error(y, expected) < 2e-2  # bfloat16 has 8 bits
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert seen[-1][0].dtype == torch.float32


def test_result_is_channels_last():
    y = merging().eval()(torch.randn(2, 4, 8, 8))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_runs_under_deterministic_algorithms(path):
    layer = merging()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(layer(x).square().sum(), x)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert grads[0].equal(grads[1])
