"""What the kernels of neighborhood attention must do; ``test_triton.py`` says how this file is run."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import ATTENTION_TOLERANCE, DEVICE, DTYPES
from visionattn.kernels.neighborhood.op import neighborhood_attention_reference
from visionattn.kernels.neighborhood.triton import neighborhood_attention_triton, unsupported

CASES = {  # spatial, K, dilation, causal, B, h, D
    "two tiles": ((9, 11), 7, 1, False, 1, 1, 16),
    "window as large as the map": ((7, 7), 7, 1, False, 1, 2, 32),
    "many tiles": ((25, 10), 3, 1, False, 1, 1, 16),
    "odd head dim": ((13, 7), 5, 1, False, 1, 2, 24),
    "residues of unequal length": ((13, 7), 3, 2, False, 2, 1, 16),
    "another dilation per axis": ((10, 7), (3, 5), (3, 1), False, 1, 1, 24),
    "first tile's keys seen from afar": ((20, 8), (13, 3), 1, False, 1, 1, 16),
    "causal": ((9, 11), 5, 1, True, 1, 1, 16),
    "one causal axis, even window": ((9, 10), 4, (1, 2), (True, False), 1, 1, 16),
    "window of one": ((5, 9), (1, 3), 1, False, 1, 1, 16),
    "1-D": ((75,), 9, 2, False, 1, 2, 16),
    "1-D, causal": ((70,), 33, 1, True, 1, 1, 16),
    "3-D": ((3, 5, 9), (2, 5, 3), 1, False, 1, 1, 16),
    "3-D, dilated, causal": ((5, 3, 4), (2, 3, 4), (2, 1, 1), (True, False, False), 1, 1, 16),
}

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, of positions that are masked
]


def per_axis(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def make(spatial, K, d, causal, B, h, D, dtype=torch.float32, biased=True):
    """Views of one projection, a bias or None, and the arguments after q, k and v."""
    K, d, causal = (per_axis(t, len(spatial)) for t in (K, d, causal))
    qkv = torch.randn(B, *spatial, 3, h, D, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(h, *(2 * side - 1 for side in K), dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    return qkv, bias if biased else None, (K, d), (causal, D**-0.5)


def compare(qkv, bias, window, rest):
    """Output and gradients of the kernels and of the reference in float64, by relative error."""
    dtype = qkv.dtype
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (qkv, bias)]
    out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
    truth = neighborhood_attention_reference(*exact[0].unbind(-3), *window, exact[1], *rest)
    weight = torch.randn_like(truth).to(dtype)
    tensors, exact = ([t for t in ts if t is not None] for ts in ((qkv, bias), exact))
    grads = torch.autograd.grad(out, tensors, weight)
    true_grads = torch.autograd.grad(truth, exact, weight.double())
    assert out.is_contiguous()
    pairs = [("out", out, truth)]
    pairs += [(f"d{n}", *pair) for n, *pair in zip("qkv", grads[0].unbind(-3), true_grads[0].unbind(-3), strict=True)]
    pairs += [("dbias", *pair) for pair in zip(grads[1:], true_grads[1:], strict=True)]
    for name, result, true in pairs:
        assert result.dtype == dtype and result.shape == true.shape
        error = (result.double() - true).norm() / true.norm()
        assert error < ATTENTION_TOLERANCE[dtype], f"relative error {error:.1e} of {name}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_with_bias(case):
    compare(*make(*case))


@pytest.mark.parametrize("case", ["two tiles", "residues of unequal length", "causal", "1-D"])
def test_output_and_gradients_without_bias(case):
    compare(*make(*CASES[case], biased=False))


@pytest.mark.parametrize("case", ["odd head dim", "another dilation per axis"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(case, dtype):
    compare(*make(*CASES[case], dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_maps(dtype, biased):
    for spatial, K, d in (((56, 57), 7, 1), ((31, 40), 7, (3, 2)), ((37, 29), 13, 2), ((300,), 31, 3)):
        compare(*make(spatial, K, d, False, 2, 3, 32, dtype=dtype, biased=biased))
    compare(*make((7, 11, 9), (3, 5, 7), 1, (True, False, False), 2, 2, 32, dtype=dtype, biased=biased))


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype, D", [(DTYPES[-1], D) for D in (16, 24, 64, 80, 128)] + [(torch.float32, 128)], ids=str)
def test_head_dims(dtype, D, biased):
    compare(*make((29, 30), 7, 1, False, 2, 2, D, dtype=dtype, biased=biased))


@pytest.mark.parametrize("spatial", [(5, 10)] + [(61, 62)] * (DEVICE == "cuda"), ids=str)
def test_two_runs_are_bit_identical(spatial):
    qkv, bias, window, rest = make(spatial, 5, 1, False, 1, 1, 16)
    runs = []
    for _ in range(2):
        out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), (qkv, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_any_strides():
    q, k, v = torch.randn(3, 1, 5, 9, 2, 16, device=DEVICE)
    bias = torch.randn(5, 2, 5, device=DEVICE).permute(1, 0, 2)
    args = ((3, 3), (1, 2), bias, (False, False), 0.3)
    expected = neighborhood_attention_reference(q, k, v, *args)
    heads_first = k.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    channels_first = v.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    wide = torch.randn(1, 5, 18, 2, 16, device=DEVICE)
    wide[:, :, ::2] = q
    out = neighborhood_attention_triton(wide[:, :, ::2], heads_first, channels_first, *args)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_come_expanded_or_transposed():
    qkv, bias, window, rest = make((5, 9), 3, 1, False, 1, 2, 16)
    truth = neighborhood_attention_reference(*qkv.unbind(-3), *window, bias, *rest)
    out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
    transposed = torch.randn(1, 2, 16, 5, 9, device=DEVICE).permute(0, 3, 4, 1, 2)
    for weight in (torch.ones((), device=DEVICE).expand(out.shape), transposed):
        grads = [torch.autograd.grad(o, (qkv, bias), weight, retain_graph=True) for o in (out, truth)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_bias_may_be_fixed_and_of_another_dtype():
    qkv, bias, window, rest = make((5, 8), 3, 1, False, 1, 1, 16, dtype=torch.float16)
    for fixed in (bias.detach().float(), bias.float().detach().requires_grad_()):
        out = neighborhood_attention_triton(*qkv.unbind(-3), *window, fixed, *rest)
        wanted = [t for t in (qkv, fixed) if t.requires_grad]
        grads = torch.autograd.grad(out.float().square().sum(), wanted)
        assert [g.dtype for g in grads] == [t.dtype for t in wanted]
        truth = neighborhood_attention_reference(*qkv.double().unbind(-3), *window, fixed.double(), *rest)
        exact = torch.autograd.grad(truth.square().sum(), wanted)
        for result, true in zip((out, *grads), (truth, *exact), strict=True):
            assert (result - true).norm() / true.norm() < 4e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_inf_reach_the_windows_that_hold_them_only(which, bad):
    qkv, bias, window, rest = make((5, 6), 3, 1, False, 1, 1, 16)
    with torch.no_grad():
        qkv[0, 1, 1, which, 0, 5] = bad
        out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
        truth = neighborhood_attention_reference(*qkv.unbind(-3), *window, bias, *rest)
    assert 0 < (~truth.isfinite()).sum() < truth.numel() / 2 or which == 1
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_logits_beyond_the_range_of_exp():
    qkv, bias, window, rest = make((4, 5), 3, 1, False, 1, 1, 16)
    with torch.no_grad():
        qkv[:, :, :, 0] *= 200
    out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
    truth = neighborhood_attention_reference(*qkv.unbind(-3), *window, bias, *rest)
    # Logits of some hundred carry the rounding of their size into the exponential.
    torch.testing.assert_close(out, truth, rtol=1e-3, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (qkv, bias)))


def test_empty_batch():
    qkv, bias, window, rest = make((5, 6), 3, 1, False, 0, 2, 16)
    out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
    grads = torch.autograd.grad(out.sum(), (qkv, bias))
    assert out.shape == (0, 5, 6, 2, 16) and grads[0].shape == qkv.shape and not grads[1].any()


def test_operators_pass_opcheck():
    ops = torch.ops.visionattn
    qkv, bias, (K, d), (causal, scale) = make((3, 4), 3, 1, False, 1, 1, 16)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(-3))
    rest = (list(K), list(d), list(causal), scale)
    torch.library.opcheck(ops.neighborhood_attention.default, (q, k, v, bias, *rest))
    out, lse = ops.neighborhood_attention(q, k, v, bias, *rest)
    tensors = [t.detach() for t in (torch.randn_like(out), q, k, v, bias, out, lse)]
    torch.library.opcheck(ops.neighborhood_attention_backward.default, (*tensors, *rest, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def layer(qkv, bias, function=neighborhood_attention_triton):
        return function(*(qkv * 2).unbind(-3), (3, 3), (1, 1), bias, (False, False), 0.25).sin()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for spatial in ((5, 6), (4, 7)):
        tensors = make(spatial, 3, 1, False, 1, 1, 16)[:2]
        out, expected = compiled(*tensors), layer(*tensors, neighborhood_attention_reference)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(o.square().sum(), tensors) for o in (out, expected)]
        # Each graph has its own rounding of the output, which the squared loss carries into every gradient.
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_autocast():
    qkv, bias, window, rest = make((4, 5), 3, 1, False, 1, 1, 16)
    with torch.autocast(DEVICE, torch.float16):
        out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
    assert out.dtype == torch.float16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (qkv, bias))] == [torch.float32] * 2


@pytest.mark.parametrize("spatial, causal", [((3, 4), False), ((5,), True)])
def test_second_derivatives(spatial, causal):
    qkv, bias, window, rest = make(spatial, 3, 1, causal, 1, 1, 16, dtype=torch.float64)
    run = lambda x, b: neighborhood_attention_triton(*x.unbind(-3), *window, b, *rest)  # noqa: E731
    assert gradgradcheck(run, (qkv, bias), fast_mode=True)


def test_flops_count_the_keys_of_a_window():
    qkv, bias, window, rest = make((4, 6), (3, 2), 1, False, 1, 2, 16)
    pair = 2 * 4 * 6 * 2 * 16 * 6
    with FlopCounterMode(display=False) as counter:
        out = neighborhood_attention_triton(*qkv.unbind(-3), *window, bias, *rest)
    assert counter.get_total_flops() == 2 * pair
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (qkv, bias))
    assert counter.get_total_flops() == 5 * pair


def test_what_is_not_covered_is_told():
    q = torch.empty(1, 80, 80, 1, 144, device=DEVICE)
    bias = torch.empty(1, 65, 65, device=DEVICE)
    side, rest = (33, 33), ((1, 1), (False, False))
    assert "head dim is 144" in unsupported(q, side, *rest, None)
    assert "window is 33" in unsupported(q[..., :64], side, *rest, bias)
    assert "dtype" in unsupported(q[..., :64].to(torch.int32), side, *rest, None)
    assert unsupported(q[..., :64], side, *rest, None) is None
