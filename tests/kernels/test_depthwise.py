"""The depthwise convolution: reference against loops, the PyTorch path against the reference."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from visionattn.kernels import depthwise_conv2d

CHANNELS_LAST = torch.channels_last

# B, C, H, W, K, dilation. The last four are large enough for the CPU's own gradients.
SHAPES = [
    (2, 5, 7, 13, 7, 3),
    (1, 3, 1, 1, 5, 1),
    (2, 4, 3, 2, 7, 3),
    (1, 1, 9, 6, 3, 2),
    (3, 6, 10, 10, 9, 1),
    (2, 4, 8, 9, 1, 1),
    (0, 4, 6, 6, 7, 3),
    (2, 100, 14, 14, 7, 3),
    (3, 70, 13, 7, 5, 1),
    (1, 48, 19, 20, 3, 4),
    (1, 16, 37, 41, 5, 3),
]


def tensors(B, C, H, W, K, dtype=torch.float32, scale=1.0):
    made = (torch.randn(B, C, H, W), torch.randn(C, 1, K, K), torch.randn(C))
    return [(t * scale).to(dtype).requires_grad_() for t in made]


def loops(x, weight, bias, dilation):
    B, C, H, W = x.shape
    K = weight.shape[-1]
    out = bias[None, :, None, None].expand(B, C, H, W).clone()
    for y in range(H):
        for col in range(W):
            for i in range(K):
                for j in range(K):
                    at = y + (i - K // 2) * dilation, col + (j - K // 2) * dilation
                    if 0 <= at[0] < H and 0 <= at[1] < W:
                        out[:, :, y, col] += weight[:, 0, i, j] * x[:, :, at[0], at[1]]
    return out


@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3, 1), (1, 2, 4, 7, 5, 2), (1, 2, 3, 2, 7, 3)])
def test_reference_equals_loops(shape):
    x, weight, bias = (t.detach() for t in tensors(*shape[:-1], dtype=torch.float64))
    out = depthwise_conv2d(x, weight, bias, shape[-1], backend="reference")
    torch.testing.assert_close(out, loops(x, weight, bias, shape[-1]))


@pytest.mark.parametrize("memory_format", [CHANNELS_LAST, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference_forward_and_gradients(shape, memory_format):
    x, weight, bias = tensors(*shape[:-1])
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for backend in ("torch", "reference"):
        out = depthwise_conv2d(x, weight, bias, shape[-1], backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum() / 100, (x, weight, bias))))
        with torch.no_grad():  # another path through the code than with gradients
            torch.testing.assert_close(depthwise_conv2d(x, weight, bias, shape[-1], backend=backend), out)
    # The same sums in another order; weight gradients add up to some thousand terms.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    if x.numel() > 0 and shape[1] > 1 and shape[2] > 1:
        assert results[0][0].is_contiguous(memory_format=memory_format)
        assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 2}, {1, 2}])
def test_frozen_inputs_and_no_bias(frozen):
    inputs = tensors(2, 64, 14, 14, 7)
    for index in frozen:
        inputs[index].requires_grad_(False)
    trained = [t for t in inputs if t.requires_grad]
    x, weight, bias = inputs
    for given in (bias, None):
        wanted = [t for t in trained if given is not None or t is not bias]
        if not wanted:
            continue
        grads = [
            torch.autograd.grad(depthwise_conv2d(x, weight, given, 3, backend=backend).sum(), wanted)
            for backend in ("torch", "reference")
        ]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-3)  # weight gradients add up 392 terms


def test_strided_views_of_any_kind():
    wide = torch.randn(4, 20, 15, 17)
    weight = torch.randn(10, 1, 7, 7)
    views = {
        "every other channel": wide[:, ::2],
        "a window": wide.contiguous(memory_format=CHANNELS_LAST)[:, :10, 2:9, 3:],
        "transposed": wide[:, :10].transpose(2, 3),
        "expanded": wide[:1, :10].expand(3, -1, -1, -1),
    }
    for name, x in views.items():
        expected = depthwise_conv2d(x, weight, None, 3, backend="reference")
        out = depthwise_conv2d(x, weight, None, 3)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dilation", [1, 3])
def test_bfloat16_is_as_close_to_float64_as_the_reference(dilation):
    exact = tensors(2, 48, 14, 13, 7, torch.float64)
    x, weight, bias = (t.detach().bfloat16().requires_grad_() for t in exact)
    with torch.no_grad():
        for t, rounded in zip(exact, (x, weight, bias), strict=True):
            t.copy_(rounded)

    def results(tensors, backend):
        out = depthwise_conv2d(*tensors, dilation, backend=backend)
        return [r.double() for r in (out, *torch.autograd.grad(out.sum(), tensors))]

    truth = results(exact, "reference")
    errors = {
        backend: [(r - t).norm() / t.norm() for r, t in zip(results((x, weight, bias), backend), truth, strict=True)]
        for backend in ("torch", "reference")
    }
    for ours, reference in zip(errors["torch"], errors["reference"], strict=True):
        assert ours <= 1.5 * reference + 4e-3  # 4e-3: one rounding to bfloat16


def test_large_values_stay_finite():
    x, weight, bias = tensors(1, 32, 23, 25, 7, scale=1e15)
    out = depthwise_conv2d(x, weight, bias, 3)
    # Values near 1e30; where terms cancel, what is left is the rounding of those.
    torch.testing.assert_close(out, depthwise_conv2d(x, weight, bias, 3, backend="reference"), rtol=1e-3, atol=1e27)


@pytest.mark.parametrize("large", [False, True])
def test_derivatives_of_first_and_second_order(large):
    shape = (1, 2, 4, 5, 5) if not large else (1, 32, 23, 24, 5)
    inputs = tensors(*shape, dtype=torch.float64)
    for backend in ("torch", "reference"):
        call = lambda *t, backend=backend: depthwise_conv2d(*t, 2, backend=backend)  # noqa: E731
        assert gradcheck(call, inputs, fast_mode=True)
        assert gradgradcheck(call, inputs, fast_mode=True)


def test_per_sample_gradients_by_vmap():
    x, weight = torch.randn(3, 32, 23, 24), torch.randn(32, 1, 5, 5)
    loss = lambda w, x: depthwise_conv2d(x[None], w, None, 3).square().sum()  # noqa: E731
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    # Sums of 552 products of numbers of some ten, in another order.
    torch.testing.assert_close(grads[1], torch.func.grad(loss)(weight, x[1]), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def chain(x, weight, bias):
        return depthwise_conv2d(depthwise_conv2d(x, weight, bias), weight, bias, 3)

    compiled = torch.compile(chain, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for H, W in ((20, 22), (14, 14), (7, 13)):
        inputs = tensors(2, 48, H, W, 7)
        out, expected = compiled(*inputs), chain(*inputs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(o.mean(), inputs) for o in (out, expected)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor():
    inputs = tensors(2, 48, 14, 13, 7)
    out = torch.compile(depthwise_conv2d, fullgraph=True)(*inputs, 3)
    torch.testing.assert_close(out, depthwise_conv2d(*inputs, 3), rtol=1e-4, atol=1e-4)
    torch.autograd.grad(out.sum(), inputs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_returns_what_a_convolution_returns(backend):
    x, weight, bias = tensors(1, 48, 21, 20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_conv2d(x, weight, bias, 2, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 5, 5)}, r"x must be \[B, C, H, W\], got shape \(4, 5, 5\)"),
        ({"weight": torch.ones(3, 1, 3, 3)}, r"weight must be \[C, 1, K, K\] with C = 4 as in x, got .*\(3, 1, 3, 3\)"),
        ({"weight": torch.ones(4, 4, 3, 3)}, r"weight must be \[C, 1, K, K\]"),
        ({"weight": torch.ones(4, 1, 3, 5)}, r"weight must be \[C, 1, K, K\]"),
        ({"weight": torch.ones(4, 1, 4, 4)}, "weight must have an odd kernel side, got 4"),
        ({"weight": torch.ones(4, 1, 3, 3).double()}, "weight must be torch.float32 as x is, got torch.float64"),
        ({"weight": torch.ones(4, 1, 3, 3, device="meta")}, "weight must be on cpu as x is, got meta"),
        ({"bias": torch.ones(5)}, r"bias must be \[C\] with C = 4 as in x, got shape \(5,\)"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.ones(1, 4, 5, 5), "weight": torch.ones(4, 1, 3, 3), "bias": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**arguments)


@pytest.mark.parametrize("dilation, side", [(1, 3), (1, 7), (3, 7)])
@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias"])
def test_compiled_for_a_cpu_gradients_are_those_of_pytorch(dilation, side, frozen):
    """Of a contiguous map and of one with its channels last; large enough for gradients of our own."""
    torch._dynamo.reset()
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = {
            "x": torch.randn(2, 16, 23, 24).contiguous(memory_format=layout),
            "weight": torch.randn(16, 1, side, side),
            "bias": torch.randn(16),
        }
        for name, tensor in tensors.items():
            tensor.requires_grad_(name != frozen)
        learned = [t for t in tensors.values() if t.requires_grad]

        def step(convolve, learned=learned, tensors=tensors):
            out = convolve(*tensors.values(), dilation)
            return out, *torch.autograd.grad(out.square().sum(), learned)

        compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(step(compiled), step(partial(depthwise_conv2d, backend="reference")), strict=True):
            # Gradients of the kernel are sums of 1104 products of numbers of some ten, in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        out = compiled(*tensors.values(), dilation)
        assert out.is_contiguous(memory_format=layout)
