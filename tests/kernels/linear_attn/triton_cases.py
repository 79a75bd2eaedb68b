"""What the kernels of linear attention must do; ``test_triton.py`` says how this file is run."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import DEVICE
from visionattn.kernels import linear_attention, rotary_tables, use_backend
from visionattn.kernels.linear_attn import NORMALIZERS, launches
from visionattn.kernels.linear_attn.triton import IN_KERNEL, unsupported

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def make(N, M=None, h=2, D=16, V=None, B=1, dtype=torch.float32):
    """Views of one projection, as the layers have them, if sizes allow."""
    generator = torch.Generator().manual_seed(0)
    if M is None and V is None:
        qkv = torch.randn(B, N, 4, h, D, generator=generator).to(DEVICE, dtype)
        return [t.requires_grad_() for t in qkv.unbind(2)[:3]]
    shapes = ((B, N, h, D), (B, M or N, h, D), (B, M or N, h, V or D))
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def compare(tensors, options, rtol=1e-4, atol=1e-5):
    """Output and every gradient of the kernels against those of the reference in float64."""
    extras = {name: t for name, t in options.items() if isinstance(t, torch.Tensor)}
    leaves = [*tensors, *extras.values()]
    out = linear_attention(*tensors, **options, backend="triton")
    double = [t.detach().double().requires_grad_() for t in leaves]
    named = dict(zip(extras, double[3:], strict=True))
    exact = linear_attention(*double[:3], **{**options, **named}, backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    truth = torch.autograd.grad((exact * weight.double()).sum(), double)
    for grad, true, leaf in zip(grads, truth, leaves, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        torch.testing.assert_close(grad.double(), true, rtol=rtol, atol=max(atol, rtol * true.abs().max().item()))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("extra", ["nothing", "everything", "augmented"])
def test_kernels_equal_the_reference(normalizer, extra):
    tensors = make(70)  # more than one block of the kernels, the last one partly filled
    options = dict(feature_map="elu+1", normalizer=normalizer)
    if extra != "nothing":
        options |= dict(rotary=tuple(t.to(DEVICE) for t in rotary_tables(7, 10, 16)))
        options |= dict(residual=torch.randn(1, 70, 2, 16, device=DEVICE).requires_grad_())
        options |= dict(gate=torch.randn(1, 70, 2, 16, device=DEVICE).requires_grad_())
    if extra == "everything":
        options |= dict(key_weights=torch.rand(1, 70, 2, device=DEVICE).requires_grad_())
    compare(tensors, options | dict(rank_augmented=extra == "augmented"))


@pytest.mark.parametrize("feature_map", ["relu", "relu2", "exp", "focused"])
def test_feature_maps(feature_map):
    compare(make(20, D=16), dict(feature_map=feature_map))


def test_every_map_of_the_kernels_can_be_that_of_queries_or_keys():
    tensors = make(9, D=16, h=1)
    for maps in zip(IN_KERNEL, IN_KERNEL[1:] + IN_KERNEL[:1], strict=True):
        expected = linear_attention(*tensors, maps, "inline", backend="reference")
        torch.testing.assert_close(linear_attention(*tensors, maps, "inline", backend="triton"), expected)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2, 3), (5, 33, 3, 6, 20), (33, 5, 1, 24, 48), (17, 17, 1, 64, 64)], ids=str
)
def test_sizes(sizes):
    N, M, h, D, V = sizes
    compare(make(N, M, h, D, V, B=2), dict(feature_map="elu+1", normalizer="magnitude"))


def test_wide_heads():
    compare(make(20, 18, 1, 96, 90, dtype=torch.float16), dict(feature_map="elu+1", normalizer="inline"), 2e-3, 2e-3)


def test_sums_are_split_for_small_batches_and_added_up_in_a_fixed_order(monkeypatch):
    tensors = make(100, h=1)
    runs = []
    for programs in (1, 512, 512):
        monkeypatch.setattr(launches, "PROGRAMS", programs)
        out = linear_attention(*tensors, "elu+1", "magnitude", backend="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for actual, expected in zip(runs[0], runs[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))


def test_divisors_of_zero_and_no_keys_left():
    q = torch.ones(1, 2, 1, 16, device=DEVICE).requires_grad_()
    v = torch.randn(1, 2, 1, 16, device=DEVICE).requires_grad_()
    for normalizer in ("sum", "mean", "magnitude"):
        for total in (0.0, -1e-6):
            k = torch.ones(1, 2, 1, 16, device=DEVICE)
            k[:, 1] = -1 + total / 16
            out = linear_attention(q, k, v, normalizer=normalizer, scale=1.0, backend="triton")
            assert out.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, v)))
    weights = torch.zeros(1, 2, 1, device=DEVICE)
    assert not linear_attention(q, q, v, "relu", key_weights=weights, backend="triton").any()


def test_half_precision_sums_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    tensors = [(torch.rand(1, 1024, 1, 16, generator=generator) * 16).half().to(DEVICE) for _ in range(3)]
    out = linear_attention(*tensors, "relu2", "magnitude", scale=1e-3, backend="triton")  # k'v reaches 1e6
    exact = linear_attention(*(t.double() for t in tensors), "relu2", "magnitude", scale=1e-3)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), exact, rtol=3e-3, atol=1e-3)


def test_float64():
    compare(make(20, dtype=torch.float64), dict(feature_map="elu+1", normalizer="magnitude"), rtol=1e-5, atol=1e-6)


def test_float16_gradients():
    gate = torch.randn(1, 20, 2, 16, device=DEVICE).half().requires_grad_()
    # A rounding of the result, of 2 ** -11, and one of each gradient's last product.
    compare(make(20, dtype=torch.float16), dict(feature_map="elu+1", gate=gate), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("extra", ["nothing", "rala", "mala"])
def test_bfloat16_on_the_gpu(extra):
    options = {"nothing": dict(), "rala": dict(rank_augmented=True), "mala": dict(normalizer="magnitude")}[extra]
    rotary = tuple(t.to(DEVICE) for t in rotary_tables(56, 56, 64))
    gate = torch.randn(2, 3136, 2, 64, device=DEVICE).bfloat16().requires_grad_()
    options |= dict(feature_map="elu+1", rotary=rotary, gate=gate)
    compare(make(3136, D=64, B=2, dtype=torch.bfloat16), options, rtol=1e-2, atol=1e-2)


def test_empty_batch_and_no_keys():
    tensors = make(5, 6, B=0)
    out = linear_attention(*tensors, "relu", backend="triton")
    assert out.shape == (0, 5, 2, 16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]
    q, kv = torch.randn(1, 5, 2, 16, device=DEVICE), torch.randn(1, 0, 2, 16, device=DEVICE)
    assert not linear_attention(q, kv, kv, "relu", backend="triton").any()


def test_operators_pass_opcheck():
    ops = torch.ops.visionattn
    q, k, v = (t.detach().requires_grad_() for t in make(6, 6, 1))
    weights = torch.rand(1, 6, 1, device=DEVICE).requires_grad_()
    tables = tuple(t.to(DEVICE) for t in rotary_tables(2, 3, 16))
    gate = torch.randn_like(v).detach().requires_grad_()
    tensors, rest = (q, k, v, weights, *tables, None, gate), ("relu", "elu+1", "magnitude", 0.25, 1e-6)
    torch.library.opcheck(ops.linear_attention.default, (*tensors, *rest))
    results = ops.linear_attention(*tensors, *rest)
    saved = [None if t is None else t.detach() for t in (torch.randn_like(v), *tensors, *results[1:])]
    torch.library.opcheck(ops.linear_attention_backward.default, (*saved, *rest))


def test_compiles_as_one_graph():
    def layer(q, k, v):
        return linear_attention(q * 2, k, v, "elu+1", rank_augmented=True).sin()

    with use_backend("triton"):
        tensors = make(6, 6, 1)
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors)
        expected = layer(*tensors)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(o.square().sum(), tensors) for o in (out, expected)]
    torch.testing.assert_close(*grads)


def test_autocast():
    tensors = make(6, 6, 1)
    with torch.autocast(DEVICE, torch.float16):
        out = linear_attention(*tensors, "elu+1", backend="triton")
    assert out.dtype == torch.float16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), tensors)] == [torch.float32] * 3


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_second_derivatives(normalizer):
    rotary = tuple(t.to(DEVICE) for t in rotary_tables(2, 3, 4))
    tensors = [torch.randn(1, 6, 2, 4, device=DEVICE, dtype=torch.float64).requires_grad_() for _ in range(5)]
    weights = torch.rand(1, 6, 2, device=DEVICE, dtype=torch.float64).requires_grad_()

    def run(q, k, v, residual, gate, weights):
        return linear_attention(
            q, k, v, "elu+1", normalizer, rotary=rotary, key_weights=weights, residual=residual, gate=gate,
            backend="triton",
        )  # fmt: skip

    assert gradgradcheck(run, (*tensors, weights), fast_mode=True)


def test_flops_count_both_products():
    tensors = make(6, 8, 2)
    with FlopCounterMode(display=False) as counter:
        out = linear_attention(*tensors, "relu", backend="triton")
    assert counter.get_total_flops() == 2 * 2 * (6 + 8) * 16 * 16
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (3 * 6 + 2 * 8) * 16 * 16


def test_what_is_not_covered_is_told():
    from visionattn.kernels.linear_attn.forms import Form

    form = Form("relu", "relu", "sum", 1.0, 1e-6, False, False)
    q = torch.empty(1, 4, 1, 144, device=DEVICE)
    assert "head dims are 144" in unsupported(q, q, q, form)
    assert "up to 64" in unsupported(q[..., :96], q[..., :96], q[..., :96], form)
    assert unsupported(q[..., :96].half(), q[..., :96].half(), q[..., :96].half(), form) is None
    sharp = form._replace(query_map="focused")  # which is applied before, in float32
    assert "up to 64" in unsupported(q[..., :96].half(), q[..., :96].half(), q[..., :96].half(), sharp)
    assert unsupported(q[..., :64].half(), q[..., :64].half(), q[..., :64].half(), sharp) is None
    assert "head dims are 3" in unsupported(q[..., :3], q[..., :3], q[..., :4], form)
    assert "dtype" in unsupported(q[..., :4], q[..., :4], q[..., :4].to(torch.int32), form)
    assert "causal" in unsupported(q[..., :4], q[..., :4], q[..., :4], form._replace(causal=True))
    assert unsupported(q[..., :4], q[..., :4], q[..., :5], form) is None


@pytest.mark.parametrize("normalizer", ["sum", "magnitude"])
def test_numbers_of_float64_calls_are_not_rounded_to_float32(normalizer):
    q, k, v = make(20, dtype=torch.float64)
    # Divisors of the size of eps, which then decides how every digit comes out.
    tensors = [(t.detach() * size).requires_grad_() for t, size in ((q, 1e-4), (k, 1e-4), (v, 1.0))]
    compare(tensors, dict(feature_map="relu", normalizer=normalizer, scale=0.1, eps=1e-7), rtol=1e-12, atol=1e-14)
