"""What the kernels of window attention must do; ``test_triton.py`` says how this file is run."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import ATTENTION_TOLERANCE, DEVICE, DTYPES
from visionattn.kernels.window import triton as window_triton
from visionattn.kernels.window.op import window_attention_reference
from visionattn.kernels.window.triton import unsupported, window_attention_triton

CASES = {  # B, H, W, h, D, window, shift
    "windows of 7": (1, 14, 7, 1, 32, (7, 7), (3, 3)),
    "a remainder, several images": (2, 5, 7, 1, 16, (4, 4), (2, 2)),
    "map smaller than the window": (1, 2, 3, 2, 16, (4, 4), (2, 2)),
    "another window per axis, odd head dim": (1, 7, 5, 2, 24, (3, 2), (1, 0)),
    "several blocks": (1, 6, 6, 1, 16, (6, 6), (0, 3)),
    "several blocks, a remainder": (1, 5, 8, 1, 16, (6, 7), (3, 3)),
}

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "few_programs"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, of positions that are masked
]


@pytest.fixture
def few_programs(monkeypatch):
    """Have programs take several windows of small maps, too."""
    monkeypatch.setattr(window_triton, "PROGRAMS", 1)


def make(B, H, W, h, D, window, shift, dtype=torch.float32, biased=True, padded=True, masked=-1.5):
    """qkv, bias, padding, and the arguments for the kernels as a function of these."""

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()

    qkv = tensor(B, H, W, 3, h, D)
    bias = tensor((2 * window[0] - 1) * (2 * window[1] - 1), h) if biased else None
    padding = tensor(3, h, D) if padded and (H % window[0] or W % window[1]) else None
    return qkv, bias, padding, lambda q, b, p: (q, window, shift, b, p, masked, 0.3)


def compare(qkv, bias, padding, arguments):
    """Output and gradients of the kernels and of the reference in float64, by relative error."""
    dtype = qkv.dtype
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (qkv, bias, padding)]
    out = window_attention_triton(*arguments(qkv, bias, padding))
    truth = window_attention_reference(*arguments(*exact))
    weight = torch.randn_like(truth).to(dtype)
    tensors, exact = ([t for t in ts if t is not None] for ts in ((qkv, bias, padding), exact))
    grads = torch.autograd.grad(out, tensors, weight)
    true_grads = torch.autograd.grad(truth, exact, weight.double())
    assert out.is_contiguous()
    pairs = [("out", out, truth)]
    pairs += [(f"d{n}", *pair) for n, *pair in zip("qkv", grads[0].unbind(3), true_grads[0].unbind(3), strict=True)]
    pairs += [("other", *pair) for pair in zip(grads[1:], true_grads[1:], strict=True)]
    for name, result, true in pairs:
        assert result.dtype == dtype and result.shape == true.shape
        error = (result.double() - true).norm() / true.norm()
        assert error < ATTENTION_TOLERANCE[dtype], f"relative error {error:.1e} of {name}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case):
    compare(*make(*case))


@pytest.mark.parametrize("case", ["a remainder, several images", "several blocks, a remainder"])
def test_output_and_gradients_without_bias_and_padding(case):
    compare(*make(*CASES[case], biased=False, padded=False))


@pytest.mark.parametrize(
    "case", ["windows of 7", "another window per axis, odd head dim", "several blocks, a remainder"]
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(case, dtype):
    compare(*make(*CASES[case], dtype=dtype))


@pytest.mark.parametrize("masked", [-100.0, float("-inf")])
def test_masks(masked):
    qkv, bias, padding, arguments = make(*CASES["several blocks"], masked=masked)
    compare(qkv, bias, padding, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "window, shift", [((7, 7), (3, 3)), ((12, 12), (6, 6)), ((24, 24), (12, 12)), ((4, 16), (0, 8))]
)
def test_larger_maps(dtype, window, shift, monkeypatch):
    monkeypatch.undo()
    for H, W in ((56, 56), (29, 50)):
        compare(*make(2, H, W, 3, 32, window, (window[0] // 2, window[1] // 2), dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(dtype, D):
    compare(*make(2, 14, 15, 2, D, (7, 7), (3, 3), dtype=dtype))


@pytest.mark.gpu
def test_two_runs_on_a_large_map_are_bit_identical():
    test_two_runs_are_bit_identical((16, 56, 56, 3, 32, (7, 7), (3, 3)))


@pytest.mark.parametrize("case", [CASES["a remainder, several images"]])
def test_two_runs_are_bit_identical(case):
    qkv, bias, padding, arguments = make(*case)
    tensors = [t for t in (qkv, bias, padding) if t is not None]
    runs = []
    for _ in range(2):
        out = window_attention_triton(*arguments(qkv, bias, padding))
        runs.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_any_strides():
    wide = torch.randn(2, 4, 8, 3, 2, 16, device=DEVICE)
    views = (
        wide[:, :, ::2],
        wide.transpose(1, 2),
        wide.permute(0, 1, 2, 3, 5, 4),
        wide[:1].expand(2, -1, -1, -1, -1, -1),
    )
    for view in views:
        view = view[..., :16]
        bias = torch.randn(view.shape[4], 9, device=DEVICE).t()
        arguments = (view, (2, 2), (1, 1), bias, None, -100.0, 0.3)
        expected = window_attention_reference(*arguments)
        torch.testing.assert_close(window_attention_triton(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_come_expanded_or_transposed():
    qkv, bias, padding, arguments = make(*CASES["a remainder, several images"])
    results = [f(*arguments(qkv, bias, padding)) for f in (window_attention_triton, window_attention_reference)]
    B, H, W, h, D = results[0].shape
    transposed = torch.randn(B, h, D, H, W, device=DEVICE).permute(0, 3, 4, 1, 2)
    for weight in (torch.ones((), device=DEVICE).expand(results[0].shape), transposed):
        grads = [torch.autograd.grad(o, (qkv, bias, padding), weight, retain_graph=True) for o in results]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_inf_reach_the_windows_that_hold_them_only(which, bad):
    qkv, bias, padding, arguments = make(1, 6, 6, 1, 16, (3, 3), (1, 1))
    with torch.no_grad():
        qkv[0, 2, 2, which, 0, 5] = bad
        results = [f(*arguments(qkv, bias, padding)) for f in (window_attention_triton, window_attention_reference)]
    assert 0 < (~results[1].isfinite()).sum() <= 9 * 16
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_logits_beyond_the_range_of_exp():
    qkv, bias, padding, arguments = make(1, 4, 6, 1, 16, (4, 3), (2, 1))
    with torch.no_grad():
        qkv[:, :, :, 0] *= 200
        bias += 200
    out, truth = (f(*arguments(qkv, bias, padding)) for f in (window_attention_triton, window_attention_reference))
    # Logits of some hundred carry the rounding of their size into the exponential.
    torch.testing.assert_close(out, truth, rtol=1e-3, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (qkv, bias)))


def test_empty_batch():
    qkv, bias, padding, arguments = make(0, 5, 6, 2, 16, (3, 3), (1, 1))
    out = window_attention_triton(*arguments(qkv, bias, padding))
    grads = torch.autograd.grad(out.sum(), (qkv, bias, padding))
    assert out.shape == (0, 5, 6, 2, 16) and grads[0].shape == qkv.shape and not grads[1].any() and not grads[2].any()


def test_operators_pass_opcheck():
    ops = torch.ops.visionattn
    for padded, biased in ((True, True), (False, False)):
        qkv, bias, padding, _ = make(1, 3, 4, 1, 16, (3, 3), (1, 1), padded=padded, biased=biased)
        rest = ([3, 3], [1, 1], -100.0, 0.25)
        torch.library.opcheck(ops.window_attention.default, (qkv, bias, padding, *rest))
        out, lse = ops.window_attention(qkv, bias, padding, *rest)
        tensors = [None if t is None else t.detach() for t in (torch.randn_like(out), qkv, bias, padding, out, lse)]
        torch.library.opcheck(ops.window_attention_backward.default, (*tensors, *rest, biased))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def layer(qkv, bias, function=window_attention_triton):
        return function(qkv * 2, (3, 3), (1, 1), bias, None, -100.0, 0.25).sin()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for H, W in ((3, 6), (4, 5)):
        tensors = make(1, H, W, 1, 16, (3, 3), (1, 1))[:2]
        out, expected = compiled(*tensors), layer(*tensors, window_attention_reference)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(o.square().sum(), tensors) for o in (out, expected)]
        # Each graph has its own rounding of the output, which the squared loss carries into every gradient.
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_autocast():
    qkv, bias, padding, arguments = make(1, 4, 5, 1, 16, (3, 3), (1, 1))
    with torch.autocast(DEVICE, torch.float16):
        out = window_attention_triton(*arguments(qkv, bias, padding))
    assert out.dtype == torch.float16
    grads = torch.autograd.grad(out.sum(), (qkv, bias, padding))
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.parametrize("case", [(1, 3, 3, 1, 16, (3, 3), (0, 0)), (1, 2, 3, 1, 16, (2, 2), (1, 1))], ids=str)
def test_second_derivatives(case):
    qkv, bias, padding, arguments = make(*case, dtype=torch.float64)
    tensors = [t for t in (qkv, bias, padding) if t is not None]
    run = lambda q, b, p=None: window_attention_triton(*arguments(q, b, p))  # noqa: E731
    assert gradgradcheck(run, tensors, fast_mode=True)


def test_flops_count_padded_tokens():
    qkv, bias, padding, arguments = make(1, 4, 5, 2, 16, (3, 3), (1, 1))
    product = 2 * 6 * 6 * 2 * 16 * 9
    with FlopCounterMode(display=False) as counter:
        out = window_attention_triton(*arguments(qkv, bias, padding))
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (qkv, bias))
    assert counter.get_total_flops() == 5 * product


def test_what_is_not_covered_is_told():
    qkv = torch.empty(1, 8, 8, 3, 1, 144, device=DEVICE)
    assert "head dim is 144" in unsupported(qkv, (7, 7))
    assert "window has 1089 tokens" in unsupported(qkv[..., :64], (33, 33))
    assert "dtype" in unsupported(qkv[..., :64].to(torch.int32), (7, 7))
    assert unsupported(qkv[..., :64], (24, 24)) is None
