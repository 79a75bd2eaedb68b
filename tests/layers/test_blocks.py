import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from visionattn.layers import blocks
from visionattn.layers.blocks import DepthwiseConv, Linear, ScaledResidual, activated, in_slices, resize_table


class Recorder(nn.Module):
    """Doubles its input and remembers how many samples each call had."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return 2 * x


@pytest.mark.parametrize(
    ("batch", "slice_bytes", "expected"),
    [(5, 2 * 16 * 12 * 4, [2, 2, 1]), (5, 1, [1] * 5), (5, 10**9, [5]), (0, 1, [0]), (1, 1, [1])],
)
def test_inference_runs_as_many_samples_at_a_time_as_fit(monkeypatch, batch, slice_bytes, expected):
    monkeypatch.setattr(blocks, "SLICE_BYTES", slice_bytes)
    branch = Recorder()
    x = torch.randn(batch, 3, 3, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = in_slices(branch, x, widest=16)
    assert branch.batches == expected
    torch.testing.assert_close(y, 2 * x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_training_is_not_sliced(monkeypatch):
    monkeypatch.setattr(blocks, "SLICE_BYTES", 1)
    branch = Recorder()
    in_slices(branch, torch.randn(5, 3, 3, 4), widest=16)
    assert branch.batches == [5]


def test_sliced_inference_of_a_network_equals_the_whole(monkeypatch):
    import timm

    import visionattn  # noqa: F401

    model = timm.create_model("van_b0", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(3, 3, 64, 64)
    expected = model(x).detach()
    monkeypatch.setattr(blocks, "SLICE_BYTES", 1)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_residual_drops_whole_samples_only_in_training(training):
    layer = ScaledResidual(4, init_value=0.5, drop_path=0.5, nchw=True).train(training)
    x, branch = torch.zeros(64, 4, 2, 2), torch.ones(64, 4, 2, 2)
    kinds = {tuple(sample.unique().tolist()) for sample in layer(x, branch)}
    assert kinds == ({(0.0,), (1.0,)} if training else {(0.5,)})


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 4, 5, 16), (1, 7, 7, 16), (0, 4, 16), (2, 8, 6, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_equals_pytorch_s(shape, bias, dtype):
    layer = Linear(16, 24, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    y, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(y.square().sum(), leaves)
    for actual, reference in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(actual, reference)


def test_linear_takes_any_strides_and_autocast():
    layer = Linear(8, 4)
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(layer(x.permute(0, 2, 3, 1)), layer(x.permute(0, 2, 3, 1).contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.permute(0, 2, 3, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("init_value", [None, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_residual_with_channels_last(init_value, training):
    layer = ScaledResidual(4, init_value, drop_path=0.5).train(training)
    assert (layer.gamma is None) == (init_value is None)
    kinds = {tuple(s.unique().tolist()) for s in layer(torch.zeros(64, 2, 2, 4), torch.ones(64, 2, 2, 4))}
    scale = init_value or 1.0
    assert kinds == ({(0.0,), (2 * scale,)} if training else {(scale,)})


def test_slices_count_the_positions_of_maps_with_channels_last(monkeypatch):
    monkeypatch.setattr(blocks, "SLICE_BYTES", 2 * 16 * 12 * 4)
    branch = Recorder()
    with torch.no_grad():
        in_slices(branch, torch.randn(5, 3, 4, 7), widest=16, channels=7)
    assert branch.batches == [2, 2, 1]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(28, 29), (56, 41), (7, 130), (15, 9)])
def test_a_table_is_resized_as_interpolation_does(mode, size):
    """Far larger ones are stretched by matrix products; their gradients, in any dtype, are those of interpolation."""
    table = torch.randn(3, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    assert_close(resize_table(table, *size, mode), F.interpolate(table, size, mode=mode))
    grad = torch.randn(3, 5, *size, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(f(), table, grad)[0]
        for f in (lambda: resize_table(table, *size, mode), lambda: F.interpolate(table, size, mode=mode))
    )
    assert_close(ours, theirs)
    half = resize_table(table.detach().bfloat16(), *size, mode)
    assert half.dtype == torch.bfloat16
    assert_close(half, F.interpolate(table.detach().bfloat16().float(), size, mode=mode).bfloat16())


LAYERS = {
    "linear": lambda: Linear(12, 20),
    "depthwise of NHWC": lambda: DepthwiseConv(12, 3),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "dilated depthwise": lambda: nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12),
    "pointwise": lambda: nn.Conv2d(12, 20, 1),
    "strided": lambda: nn.Conv2d(12, 20, 1, stride=2, bias=False),
    "without a weight": nn.Identity,
}


def map_for(name, shape=(2, 7, 5, 12)):
    x = torch.randn(shape)
    return x if name in ("linear", "depthwise of NHWC") else x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
def test_an_activation_joined_to_a_layer_is_the_one_behind_it(name, act):
    """On maps of both layouts and of one position, in inference and in training."""
    layer = LAYERS[name]()
    for x in (map_for(name), map_for(name).contiguous(), map_for(name, (1, 1, 1, 12)), map_for(name, (0, 3, 3, 12))):
        expected = act(layer(x))
        assert_close(activated(layer, act, x), expected)
        with torch.no_grad():
            y = activated(layer, act, x)
        assert_close(y, expected.detach())
        layout = torch.channels_last
        assert y.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout) or not len(x)


@pytest.mark.parametrize("name", ["linear", "depthwise of NHWC", "depthwise", "pointwise"])
@pytest.mark.parametrize("of", ["layer", "act"])
def test_hooks_of_layer_and_activation_run(name, of):
    layer, act = LAYERS[name](), nn.GELU()
    seen = []
    (layer if of == "layer" else act).register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad():
        activated(layer, act, map_for(name))
    assert len(seen) == 1
