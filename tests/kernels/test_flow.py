"""Flow attention: the reference against loops over tokens, the fast path against the reference, hard inputs."""

import math

import pytest
import torch

from visionattn.kernels import flow_attention, use_backend
from visionattn.kernels.flow import flow_attention_reference, flow_attention_torch


def qkv(B=2, L=7, S=None, h=2, D=3, V=None, dtype=torch.float64, scale=1.0):
    S, V = S or L, V or D
    return [scale * torch.randn(B, n, h, c, dtype=dtype) for n, c in ((L, D), (S, D), (S, V))]


def loops(q, k, v, causal=False, eps=1e-6, flow_eps=0.0):
    """One sample, one head, one token at a time, as the paper defines the steps. [L, D], [S, D], [S, V]"""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    Q, K, v = ([[f(x) for x in row] for row in t.tolist()] for t, f in ((q, sigmoid), (k, sigmoid), (v, float)))
    L, S, D, V = len(Q), len(K), len(Q[0]), len(v[0])

    def flow(x, others, last, weights=None):
        seen = range(last + 1) if causal else range(len(others))
        totals = [sum(others[j][d] * (weights[j] if weights else 1) for j in seen) for d in range(D)]
        return sum((x[d] + eps) * (totals[d] + eps) for d in range(D)) + flow_eps

    n = [i + 1 if causal else 1 for i in range(max(L, S))]
    incoming = [n[i] / flow(Q[i], K, i) for i in range(L)]
    outgoing = [n[j] / flow(K[j], Q, j) for j in range(S)]
    sink = [flow(Q[i], K, i, outgoing) / n[i] for i in range(L)]
    source = [min(1, max(-1, flow(K[j], Q, j, incoming) / n[j])) for j in range(S)]
    result = []
    for i in range(L):
        row = [0.0] * V
        for j in range(i + 1 if causal else S):
            rivals = source[: j + 1] if causal else source
            share = math.exp(source[j]) / sum(map(math.exp, rivals)) * len(rivals)
            weight = sum(Q[i][d] * K[j][d] for d in range(D)) * incoming[i] / n[i] * share
            row = [r + weight * x for r, x in zip(row, v[j], strict=True)]
        result.append([r * sigmoid(sink[i] * L / S) for r in row])
    return torch.tensor(result, dtype=torch.float64)


CASES = [dict(), dict(S=3), dict(S=12, V=5, h=3), dict(L=1), dict(L=40, D=2), dict(B=1, h=1, D=1)]


@pytest.mark.parametrize("form", [flow_attention_reference, flow_attention_torch])
@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.parametrize("flow_eps", [0.0, 1e-2])
def test_equals_loops_over_tokens(form, sizes, flow_eps):
    q, k, v = qkv(**sizes)
    out = form(q, k, v, eps=1e-3, flow_eps=flow_eps)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            expected = loops(q[b, :, h], k[b, :, h], v[b, :, h], eps=1e-3, flow_eps=flow_eps)
            torch.testing.assert_close(out[b, :, h], expected)


@pytest.mark.parametrize("form", [flow_attention_reference, flow_attention_torch])
@pytest.mark.parametrize("sizes", [dict(), dict(L=1), dict(L=70, B=1, h=1), dict(V=5)], ids=str)
def test_causal_equals_loops_over_tokens(form, sizes):
    q, k, v = qkv(**sizes)
    out = form(q, k, v, causal=True, eps=1e-3)
    expected = loops(q[0, :, 0], k[0, :, 0], v[0, :, 0], causal=True, eps=1e-3)
    torch.testing.assert_close(out[0, :, 0], expected)


def test_causal_does_not_look_ahead():
    q, k, v = qkv(L=130)
    before = flow_attention(q, k, v, causal=True)
    for t in (q, k, v):
        t[:, 100:] = torch.randn_like(t[:, 100:])
    torch.testing.assert_close(flow_attention(q, k, v, causal=True)[:, :100], before[:, :100])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [dict(L=33, D=8), dict(L=400, D=8, V=4), dict(L=200, D=2), dict(B=0), dict(L=65)])
def test_fast_path_equals_reference_in_float32(sizes, causal):
    q, k, v = qkv(**sizes, dtype=torch.float32)
    with use_backend("reference"):
        expected = flow_attention(q, k, v, causal)
    torch.testing.assert_close(flow_attention(q, k, v, causal), expected, rtol=2e-5, atol=1e-5)


def test_grids_and_strided_views_are_the_same_sequences():
    fused = torch.randn(2, 5, 6, 3, 4, 8)
    q, k, v = fused.unbind(3)  # B H W h D, not contiguous
    out = flow_attention(q, k, v)
    flat = [t.flatten(1, 2).contiguous() for t in (q, k, v)]
    torch.testing.assert_close(out.flatten(1, 2), flow_attention(*flat))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L", [5, 50])  # channels or tokens side by side
def test_gradients(L, causal):
    q, k, v = (t.requires_grad_() for t in qkv(B=1, L=L, h=1, D=2))
    assert torch.autograd.gradcheck(lambda *t: flow_attention(*t, causal), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_lose_their_own_rounding_only(dtype, causal):
    q, k, v = qkv(L=700, D=8, dtype=dtype)
    out = flow_attention(q, k, v, causal)
    assert out.dtype == dtype
    expected = flow_attention(q.double(), k.double(), v.double(), causal)
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_autocast_keeps_the_sums_in_full_precision():
    q, k, v = qkv(L=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flow_attention(q, k, v), flow_attention(q, k, v), rtol=0, atol=0)
        inside = flow_attention(q, k, v)
    torch.testing.assert_close(inside, flow_attention(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("logit", [-1e4, -90.0, 90.0, 1e4])
def test_vanishing_and_saturated_flows_stay_finite(logit, dtype, causal):
    q, k, v = qkv(L=40, D=4, dtype=dtype)
    for t, u in ((q, k), (k, q)):
        u = u.clone()
        t = torch.full_like(t, logit).requires_grad_()
        for pair in ((t, u), (u, t), (t, t)):
            out = flow_attention(*pair, v, causal)
            assert out.isfinite().all()
        (grad,) = torch.autograd.grad(flow_attention(t, u, v, causal).sum(), t)
        assert grad.isfinite().all()


def test_long_sequences_of_half_precision_stay_finite_and_right():
    q, k, v = (t[:, :, None, :] for t in torch.randn(3, 1, 65536, 2).half())
    v = v.sign() * 3e4  # k'v alone is far beyond 65504
    out = flow_attention(q, k, v)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), flow_attention(q.double(), k.double(), v.double()), rtol=2e-3, atol=2.0)


BAD = [
    (dict(eps=0.0), "eps.*0.0"),
    (dict(flow_eps=-1.0), "flow_eps.*-1.0"),
    (dict(flow_eps=1e-6, causal=True), "flow_eps"),
    (dict(backend="triton"), "triton"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=str)
def test_bad_options_are_refused(kwargs, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        flow_attention(*qkv(), **kwargs)


def test_bad_shapes_are_refused():
    q, k, v = qkv()
    for args, message in [
        ((q[0], k, v), "q must be"),
        ((q, k[:1], v), "k must have"),
        ((q, k[..., :2], v), "head dim of q, 3, got 2"),
        ((q, k, v[:, :3]), "positions of k"),
        ((q[:, :0], k, v), "at least one position"),
        ((q, k, v.float()), "v must be torch.float64"),
        ((q.long(), k, v), "floating point"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow_attention(*args)
    with pytest.raises(ValueError, match="as many keys as queries"):
        flow_attention(*qkv(S=3), causal=True)
