"""What the kernels of operators of one file must do; ``test_triton.py`` says how this file is run."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import DEVICE, DTYPES
from tests.kernels.test_derivatives import CASES, check_tangents_of_the_backward_pass
from visionattn.kernels import depthwise, depthwise_conv2d, gated_pointwise, use_backend

# Sums in another order than the reference's. Half precision: the reference rounds between its operators, too.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}

DEPTHWISE = [  # B, C, H, W, K, dilation
    (2, 5, 7, 13, 7, 3),
    (1, 3, 1, 1, 5, 1),
    (2, 33, 2, 3, 7, 3),
    (1, 64, 6, 8, 5, 1),
    (1, 48, 5, 14, 7, 3),
    (2, 6, 9, 5, 3, 1),
    (1, 32, 4, 9, 3, 2),
]
POINTWISE = [(2, 5, 7, 13, 6), (1, 3, 1, 1, 3), (1, 70, 3, 5, 40), (1, 32, 5, 9, 80)]  # B, C, H, W, D

# Of every operator with kernels, a case of ``test_derivatives.py``.
WITH_KERNELS = [
    "depthwise",
    "gated",
    "neighborhood, biased",
    "window, biased and padded",
    "bilevel",
    "linear",
    "focused",
]

pytestmark = pytest.mark.usefixtures("poisoned_empty", "few_steps")


@pytest.fixture
def few_steps(monkeypatch):
    """Make the partial sums of weight gradients short, so that small maps have several."""
    monkeypatch.setattr(depthwise, "WEIGHT_GRAD_STEPS", 2)


def make(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def depthwise_tensors(B, C, H, W, K, dtype=torch.float32):
    return make((B, C, H, W), (C, 1, K, K), (C,), dtype=dtype)


def pointwise_tensors(B, C, H, W, D, dtype=torch.float32):
    return make((B, C, H, W), (D, C, 1, 1), (D,), (B, D, H, W), dtype=dtype)


def compare(function, tensors):
    """Outputs and all gradients of the backend and of the reference in float64, by relative error."""
    dtype = tensors[0].dtype
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, truth = function(*tensors, backend="triton"), function(*exact, backend="reference")
    weight = torch.randn_like(truth).to(dtype)
    results = (out, *torch.autograd.grad(out, tensors, weight))
    truths = (truth, *torch.autograd.grad(truth, exact, weight.double()))
    for result, true in zip(results, truths, strict=True):
        assert result.dtype == dtype and result.shape == true.shape
        error = (result.double() - true).norm() / true.norm().clamp_min(1e-30)
        assert error < TOLERANCE[dtype], f"relative error {error:.1e} of shape {tuple(true.shape)}"
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise_forward_and_gradients(shape, dtype):
    dilation = shape[-1]
    compare(lambda *t, backend: depthwise_conv2d(*t, dilation, backend=backend), depthwise_tensors(*shape[:-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_pointwise_forward_and_gradients(shape, dtype):
    compare(gated_pointwise, pointwise_tensors(*shape, dtype))


def test_weight_gradient_over_many_partial_sums():
    compare(lambda *t, backend: depthwise_conv2d(*t, backend=backend), depthwise_tensors(1, 3, 9, 14, 3))


def test_float16_sums_are_kept_in_float32():
    x, weight, bias = depthwise_tensors(1, 2, 5, 5, 7, torch.float16)
    with torch.no_grad():
        x.fill_(300), weight.fill_(30), bias.zero_()
        weight[:, :, 3] = -30
        weight[:, :, 2] = -30
    out = depthwise_conv2d(x, weight, bias, backend="triton")  # partial sums go beyond 65504
    torch.testing.assert_close(out, depthwise_conv2d(x.double(), weight.double(), backend="reference").to(x.dtype))


@pytest.mark.parametrize("without", ["bias", "gradient of x", "gradient of weight"])
def test_parts_that_are_not_needed(without):
    for function, tensors in (
        (lambda *t, **k: depthwise_conv2d(*t, 2, **k), depthwise_tensors(1, 4, 5, 6, 3)),
        (gated_pointwise, pointwise_tensors(1, 4, 5, 6, 3)),
    ):
        if without == "bias":
            tensors[2] = None
        else:
            tensors[0 if without == "gradient of x" else 1].requires_grad_(False)
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        outs = [function(*tensors, backend=backend) for backend in ("triton", "reference")]
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(out.square().sum(), wanted) for out in outs]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_memory_format_is_that_of_the_input(memory_format):
    x, weight, bias = depthwise_tensors(2, 4, 5, 6, 3)
    x = x.contiguous(memory_format=memory_format)
    matrix = torch.ones(4, 4, 1, 1, device=DEVICE)
    for backend in ("triton", "torch", "reference"):
        with use_backend(backend):
            assert depthwise_conv2d(x, weight, bias).is_contiguous(memory_format=memory_format)
            assert gated_pointwise(x, matrix, bias, x).is_contiguous(memory_format=memory_format)


def test_strided_views():
    wide = torch.randn(2, 8, 9, 11, device=DEVICE)
    weight, matrix = torch.randn(4, 1, 3, 3, device=DEVICE), torch.randn(4, 4, 1, 1, device=DEVICE).transpose(0, 1)
    for x in (wide[:, ::2], wide[:, 1:5, 2:7].transpose(2, 3), wide[:1, :4].expand(3, -1, -1, -1)):
        for function, args in ((depthwise_conv2d, (weight,)), (gated_pointwise, (matrix, None, x))):
            expected = function(x, *args, backend="reference")
            torch.testing.assert_close(function(x, *args, backend="triton"), expected, rtol=1e-4, atol=1e-4)


def test_empty_batch():
    for function, tensors in (
        (depthwise_conv2d, depthwise_tensors(0, 4, 5, 6, 3)),
        (gated_pointwise, pointwise_tensors(0, 4, 5, 6, 3)),
    ):
        out = function(*tensors, backend="triton")
        grads = torch.autograd.grad(out.sum(), tensors)
        assert out.shape == (0, out.shape[1], 5, 6)
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors, strict=True))


def test_derivatives_of_first_and_second_order():
    for function, tensors in (
        (lambda *t: depthwise_conv2d(*t, 2, backend="triton"), depthwise_tensors(1, 2, 2, 3, 3, torch.float64)),
        (lambda *t: gated_pointwise(*t, backend="triton"), pointwise_tensors(1, 2, 3, 2, 3, torch.float64)),
    ):
        # Not the last bit alike on every run on a GPU: cuBLAS, in the gradients of the pointwise convolution.
        assert gradcheck(function, tensors, fast_mode=True, nondet_tol=1e-12)
        assert gradgradcheck(function, tensors, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("case", WITH_KERNELS)
def test_a_recorded_pass_within_a_transform_leaves_the_kernels(case):
    shapes, function = CASES[case]
    tensors = make(*shapes, dtype=torch.float64)
    out = function(*tensors, backend="triton")
    check_tangents_of_the_backward_pass(out, tensors)
    several = torch.randn(2, *out.shape, dtype=out.dtype, device=DEVICE)
    mapped = torch.autograd.grad(out, tensors, several, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(tuple(g[1] for g in mapped), torch.autograd.grad(out, tensors, several[1]))


class _OtherStrides(TorchDispatchMode):
    """Gives operators of the library their tensors with another axis contiguous than the last."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.namespace == "visionattn":
            self.seen.add(str(function))
            arguments = [turned(a) for a in arguments]
        return function(*arguments, **(kwargs or {}))


def turned(x):
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        return x
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("case", WITH_KERNELS)
def test_operators_take_any_strides(case):
    shapes, function = CASES[case]
    tensors = make(*shapes, dtype=torch.float64)

    def run():
        out = function(*tensors, backend="triton")
        return out, *torch.autograd.grad(out.sin().sum(), tensors)

    expected = run()
    with _OtherStrides() as mode:
        found = run()
    assert len(mode.seen) == (1 if case == "gated" else 2)
    torch.testing.assert_close(found, expected)


def test_two_backward_passes_are_bit_identical():
    tensors = depthwise_tensors(1, 3, 9, 14, 3)
    grads = [torch.autograd.grad(depthwise_conv2d(*tensors, backend="triton").sin().sum(), tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def channels_last(tensors):
    return [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in tensors]


def test_operators_pass_opcheck():
    ops = torch.ops.visionattn
    x, weight, bias = depthwise_tensors(2, 4, 5, 6, 3)
    (x,) = channels_last([x])
    for case in ((x, weight, bias, 2), (x, weight, None, 1)):
        torch.library.opcheck(ops.depthwise_conv2d.default, case)
    torch.library.opcheck(ops.depthwise_conv2d_weight_grad.default, (x, channels_last([x.flip(0)])[0], 3, 2))
    x, weight, bias, gate = pointwise_tensors(2, 4, 5, 6, 3)
    x, gate = channels_last([x, gate])
    for case in ((x, weight, bias, gate), (x, weight, None, gate)):
        torch.library.opcheck(ops.gated_pointwise.default, case)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def layer(x, weight, bias, matrix, backend="triton"):
        y = depthwise_conv2d(x, weight, bias, 2, backend=backend)
        return gated_pointwise(y, matrix, bias, x, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for H, W in ((5, 6), (4, 7)):
        x, weight, bias = depthwise_tensors(2, 4, H, W, 3)
        tensors = (x, weight, bias, *make((4, 4, 1, 1)))
        out, expected = compiled(*tensors), layer(*tensors, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(o.square().sum(), tensors) for o in (out, expected)]
        # Two operators in a row: the squared loss carries the rounding of both outputs into every gradient.
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


def test_autocast_returns_what_the_reference_returns():
    x, weight, bias = depthwise_tensors(1, 4, 3, 3, 3)
    matrix = make((4, 4, 1, 1))[0]
    dtype = torch.float16  # in the interpreter; bfloat16 has no tl.dot there
    with torch.autocast(DEVICE, dtype):
        for function, tensors in ((depthwise_conv2d, (x, weight, bias)), (gated_pointwise, (x, matrix, bias, x))):
            out, expected = (function(*tensors, backend=backend) for backend in ("triton", "reference"))
            assert out.dtype == expected.dtype
            torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)  # float16 rounds to 1e-3, and twice
    grads = torch.autograd.grad(out.sum(), (x, matrix, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_flops_are_those_of_convolutions():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = depthwise_tensors(1, 4, 5, 6, 3)
    matrix = make((3, 4, 1, 1))[0]
    gate = make((1, 3, 5, 6))[0]
    convolution, product = 2 * 4 * 5 * 6 * 9, 2 * 3 * 4 * 5 * 6
    with FlopCounterMode(display=False) as counter:
        out = depthwise_conv2d(x, weight, bias, backend="triton")
    assert counter.get_total_flops() == convolution
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (x, weight, bias))
    assert counter.get_total_flops() == 2 * convolution
    with FlopCounterMode(display=False) as counter:
        out = gated_pointwise(x, matrix, None, gate, backend="triton")
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (x, matrix, gate))
    assert counter.get_total_flops() == 3 * product  # x, weight, and the convolution once more for the gate


@pytest.mark.skipif(DEVICE != "cuda", reason="on the cpu operators of PyTorch are the automatic choice")
def test_automatic_choice_runs_the_kernels():
    x, weight, _ = depthwise_tensors(1, 4, 3, 3, 3)
    assert "visionattn" in str(depthwise_conv2d(x, weight).grad_fn).lower()
