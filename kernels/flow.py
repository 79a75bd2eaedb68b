"""Flow attention (Flowformer, arXiv 2202.06258). B batch, L queries, S keys, h heads, D head dim, V width of a value.

With Q = sigmoid(q), K = sigmoid(k) and a small e added to both factors of every product written with a dot:

    I[i] = 1 / (Q[i] . sum_j K[j])              O[j] = 1 / (K[j] . sum_i Q[i])           inverses of what flows in, out
    sink[i] = Q[i] . sum_j O[j] K[j]            source[j] = K[j] . sum_i I[i] Q[i]       flows where the others are one
    out[i] = sigmoid(sink[i] L / S) I[i] Q[i] sum_j K[j]^T v[j] c[j],   c = S softmax_j(clamp(source, -1, 1))

Sources compete for attention without a softmax over pairs, so time and memory grow with L + S.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import (
    check_filled,
    check_flags,
    check_floating,
    check_same,
    check_tensors,
    positive,
)
from visionattn.kernels.common.mode import autocasting, exporting
from visionattn.kernels.common.precision import precise
from visionattn.kernels.linear_attn import causal_sums

__all__ = ["flow_attention", "flow_attention_torch"]


# A CPU sums over a head quickest with the tokens side by side, if there are so many more of them than channels that
# the transposition pays. Forward, and forward with backward, times the speed of heads side by side, on an AMD EPYC:
# 1.6 and 1.2 at N = 3136, D = 8; 1.07 and 1.1 at N = 784, D = 16; 0.75 and 0.9 at N = 196, D = 32.
TOKENS_PER_CHANNEL = 16


def flow_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, eps: float = 1e-6, flow_eps: float = 0.0
) -> Tensor:
    """Every weight of every pair. Arguments as in :func:`flow_attention`."""
    L, S = q.shape[1], k.shape[1]
    Q, K = torch.sigmoid(precise(q)), torch.sigmoid(precise(k))
    n = torch.arange(1, L + 1, device=q.device)[:, None, None] if causal else 1  # causal flows are means of a prefix

    def total(x: Tensor) -> Tensor:
        return x.cumsum(1) if causal else x.sum(1, keepdim=True)

    def flow(x: Tensor, y: Tensor) -> Tensor:
        return ((x + eps) * (total(y) + eps)).sum(-1, keepdim=True) + flow_eps

    incoming, outgoing = n / flow(Q, K), n / flow(K, Q)
    sink, source = flow(Q, K * outgoing) / n, flow(K, Q * incoming) / n
    strength = source.clamp(-1, 1).exp()
    competition = strength / total(strength) * (n if causal else S)
    weights = torch.einsum("blhd,bshd->bhls", Q * incoming / n, K)
    weights = weights.tril() if causal else weights
    out = torch.einsum("bhls,bshv->blhv", weights, precise(v) * competition)
    return (out * torch.sigmoid(sink * (L / S))).to(v.dtype)


def flow_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, eps: float = 1e-6, flow_eps: float = 0.0
) -> Tensor:
    """The fastest form known in operators of PyTorch, which TorchScript and exporters know too.

    Arguments as in :func:`flow_attention`.
    """
    if causal:
        return _causal(q, k, v, eps)
    L, S = q.shape[1], k.shape[1]
    inside = q.device.type == "cpu"
    if not torch.jit.is_scripting():
        # While a graph is exported for any size the numbers are symbols, of which nothing must be asked.
        inside = inside and type(S) is int and type(L) is int and S >= TOKENS_PER_CHANNEL * q.shape[3]
    query, key, value = _heads_first(q, inside), _heads_first(k, inside), _heads_first(v, inside)
    query, key = torch.sigmoid(query), torch.sigmoid(key)  # B h D N, like all that follow
    incoming = 1 / _flow(query, key.sum(3, keepdim=True), eps, flow_eps)
    outgoing = 1 / _flow(key, query.sum(3, keepdim=True), eps, flow_eps)
    sink = _flow(query, key @ outgoing.transpose(2, 3), eps, flow_eps)
    source = _flow(key, query @ incoming.transpose(2, 3), eps, flow_eps)
    competition = source.clamp(-1, 1).softmax(3) * S
    state = (value * competition) @ key.transpose(2, 3)  # B h V D
    out = (state @ query) * (incoming * torch.sigmoid(sink * (L / S)))
    return out.permute(0, 3, 1, 2).to(v.dtype)


def _flow(x: Tensor, total: Tensor, eps: float, flow_eps: float) -> Tensor:
    """``(x + eps) . (total + eps) + flow_eps`` of every token. [B, h, D, N] and [B, h, D, 1] to [B, h, 1, N]"""
    total = total + eps
    return total.transpose(2, 3) @ x + (eps * total.sum(2, keepdim=True) + flow_eps)


def _causal(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    query, key = torch.sigmoid(precise(q)), torch.sigmoid(precise(k))
    n = torch.arange(1, q.shape[1] + 1, device=q.device)[:, None, None]
    incoming = n / _prefix_flow(query, key, eps)
    outgoing = n / _prefix_flow(key, query, eps)
    sink = _prefix_flow(query, key * outgoing, eps) / n
    strength = (_prefix_flow(key, query * incoming, eps) / n).clamp(-1, 1).exp()
    competition = strength / strength.cumsum(1) * n
    out = causal_sums(query * (incoming / n), key, precise(v) * competition)
    return (out * torch.sigmoid(sink)).to(v.dtype)


def _prefix_flow(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return ((x + eps) * (y.cumsum(1) + eps)).sum(-1, keepdim=True)


def _heads_first(x: Tensor, tokens_inside: bool) -> Tensor:
    """[B, N, h, D] to [B, h, D, N], with the tokens or else the channels of a head side by side in memory."""
    x = precise(x)
    if tokens_inside:
        return x.permute(0, 2, 3, 1).contiguous()
    return x.transpose(1, 2).contiguous().transpose(2, 3)


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    eps: float = 1e-6,
    flow_eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend by conserved flows from values to queries, at a cost that grows with the number of tokens.

    All sums are formed in float32, or in float64 for such inputs, autocast or not. No input makes a divisor zero: flows
    are at least ``D * eps ** 2``.

    Args:
        q: Queries, on a sequence or a grid, of any strides. [B, L, h, D] or [B, H, W, h, D]
        k: Keys. [B, S, h, D] or [B, H', W', h, D]
        v: Values. [B, S, h, V] or [B, H', W', h, V]
        causal: Whether position i sees positions up to i only; flows are then means over the i + 1 of them.
        eps: Added to both factors of every flow; positive.
        flow_eps: Added to every flow; the authors' vision model has 1e-6, their other code 0. Not with ``causal``.
        backend: ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        The mixed values in the dtype of ``v``. [B, L, h, V] or [B, H, W, h, V]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or an argument is not one of the allowed.
        BackendError: If the backend that was asked for cannot run this call.
    """
    if not (torch.jit.is_tracing() or exporting()):
        _check(q, k, v, causal, eps, flow_eps)
    spatial = q.shape[1:-2]
    if len(spatial) > 1:
        q, k, v = q.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3)
    chosen = choose("flow_attention", q, backend, lambda: "there are no kernels for it")
    full = torch.autocast(q.device.type, enabled=False) if autocasting(q) else contextlib.nullcontext()
    with full:
        out = _IMPLEMENTATIONS[chosen](q, k, v, causal, eps, flow_eps)
    return out.unflatten(1, spatial) if len(spatial) > 1 else out


_IMPLEMENTATIONS = {"torch": flow_attention_torch, "reference": flow_attention_reference}


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, eps: float, flow_eps: float) -> None:
    check_tensors(q=q, k=k, v=v)
    check_flags(causal=causal)
    if q.dim() not in (4, 5):
        raise ValueError(f"q must be [B, L, heads, D] or [B, H, W, heads, D], got shape {tuple(q.shape)}")
    check_floating(q=q)
    check_filled("q", q, head=-2, channel=-1)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != q.dim() or tensor.shape[0] != q.shape[0] or tensor.shape[-2] != q.shape[-2]:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} must have the batch, axes and heads of q {tuple(q.shape)}, got shape {shape}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[1:-2] != k.shape[1:-2]:
        raise ValueError(f"v must have the positions of k, {tuple(k.shape[1:-2])}, got {tuple(v.shape[1:-2])}")
    if q.shape[1:-2].numel() == 0 or k.shape[1:-2].numel() == 0:
        raise ValueError(f"q and k must have at least one position, got {tuple(q.shape)} and {tuple(k.shape)}")
    if causal and k.shape[1:-2] != q.shape[1:-2]:
        raise ValueError(f"causal=True needs as many keys as queries, got {tuple(k.shape)} and {tuple(q.shape)}")
    check_filled("v", v, channel=-1)
    positive("eps", eps)
    if positive("flow_eps", flow_eps, zero=True) and causal:
        raise ValueError(f"flow_eps must be 0 or, without causal, positive, got {flow_eps!r}")
    check_same(q, k=k, v=v)
