"""The gated 1x1 convolution: reference against einsum, the PyTorch path against the reference."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from visionattn.kernels import gated_pointwise

SHAPES = [(2, 5, 7, 13, 6), (1, 3, 1, 1, 3), (2, 70, 3, 2, 33), (0, 4, 6, 6, 4)]  # B, C, H, W, D


def tensors(B, C, H, W, D, dtype=torch.float32):
    shapes = ((B, C, H, W), (D, C, 1, 1), (D,), (B, D, H, W))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def test_reference_equals_einsum():
    x, weight, bias, gate = tensors(2, 5, 3, 4, 6, torch.float64)
    expected = gate * (torch.einsum("bcyx,dc->bdyx", x, weight[:, :, 0, 0]) + bias[:, None, None])
    torch.testing.assert_close(gated_pointwise(x, weight, bias, gate, backend="reference"), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference_forward_and_gradients(shape, memory_format):
    x, weight, bias, gate = tensors(*shape)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    for given in (bias, None):
        results = []
        for backend in ("torch", "reference"):
            out = gated_pointwise(x, weight, given, gate, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight, gate))))
        # The same sums in another order; weight gradients add up over all positions.
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
        assert results[0][0].stride() == results[1][0].stride()
    if x.numel() > 0 and shape[2] > 1:
        assert results[0][0].is_contiguous(memory_format=memory_format)


def test_derivatives_of_first_and_second_order():
    inputs = tensors(2, 3, 2, 4, 5, torch.float64)
    for backend in ("torch", "reference"):
        call = lambda *t, backend=backend: gated_pointwise(*t, backend=backend)  # noqa: E731
        assert gradcheck(call, inputs, fast_mode=True)
        assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    compiled = torch.compile(gated_pointwise, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in SHAPES[:2]:
        inputs = tensors(*shape)
        torch.testing.assert_close(compiled(*inputs), gated_pointwise(*inputs))


def test_autocast_promotes_the_product_as_a_multiplication_does():
    x, weight, bias, gate = tensors(1, 4, 3, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert gated_pointwise(x, weight, bias, gate).dtype == torch.float32
        assert gated_pointwise(x, weight, bias, gate.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 5, 5)}, r"x must be \[B, C, H, W\], got shape \(4, 5, 5\)"),
        ({"weight": torch.ones(6, 3, 1, 1)}, r"weight must be \[D, C, 1, 1\] with C = 4 as in x, got .*\(6, 3, 1, 1\)"),
        ({"weight": torch.ones(6, 4, 3, 3)}, r"weight must be \[D, C, 1, 1\]"),
        ({"bias": torch.ones(4)}, r"bias must be \[D\] with D = 6 as in weight, got shape \(4,\)"),
        ({"gate": torch.ones(1, 4, 5, 5)}, r"gate must be \[B, D, H, W\] = \(1, 6, 5, 5\), got shape \(1, 4, 5, 5\)"),
        ({"gate": torch.ones(1, 6, 5, 5).half()}, "gate must be torch.float32 as x is, got torch.float16"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "x": torch.ones(1, 4, 5, 5),
        "weight": torch.ones(6, 4, 1, 1),
        "bias": torch.ones(6),
        "gate": torch.ones(1, 6, 5, 5),
    }
    with pytest.raises(ValueError, match=message):
        gated_pointwise(**arguments | change)
