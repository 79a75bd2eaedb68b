"""Linear attention with any feature map. Shapes: B batch, N queries, M keys, h heads, D head dim, V width of a value.

    out[i] = sum_j a[i, j] v[j],   a[i, j] = normalized(w[j] * R phi(q[i]) . R phi(k[j]))

with a feature map phi, an optional rotation R by position and optional weights w of the keys. The sum over keys is
taken first, so time and memory grow with N + M instead of N * M. All sums are formed in float32 or float64.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

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
from visionattn.kernels.common.mode import autocast, autocasting, exporting
from visionattn.kernels.common.precision import precise
from visionattn.kernels.linear_attn.cpu import linear_attention_torch
from visionattn.kernels.linear_attn.forms import (
    FEATURE_MAPS,
    NORMALIZERS,
    Form,
    Rotary,
    away_from_zero,
    epilogue,
    features,
)
from visionattn.kernels.linear_attn.rotation import rotate_pairs
from visionattn.kernels.linear_attn.triton import linear_attention_triton, unsupported

__all__ = ["linear_attention"]


FeatureMap = str | Callable[[Tensor], Tensor]


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
    rotary: Rotary | None = None,
    key_weights: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Every weight of every pair. Arguments as in :func:`linear_attention`, with one axis of positions."""
    M, s, eps = k.shape[1], form.scale, form.eps
    query, key = features(precise(q), form.query_map), features(precise(k), form.key_map)
    total = torch.einsum("bnhd,bmhd->bhnm", query, key)  # by what a similarity is normalized: never rotated
    if form.rank_augmented:
        key_weights = torch.einsum("bhd,bmhd->bmh", s * query.mean(1), key).softmax(1)
    if rotary is not None:
        query, key = (rotate_pairs(t, *(table.to(t.dtype) for table in rotary)) for t in (query, key))
    similarity = torch.einsum("bnhd,bmhd->bhnm", query, key)
    if key_weights is not None:
        w = key_weights.to(query.dtype).transpose(1, 2)[:, :, None]
        similarity, total = similarity * w, total * w
    if form.causal:
        similarity, total = similarity.tril(), total.tril()
    total = total.sum(-1, keepdim=True)
    if form.normalizer == "sum":
        weights = similarity / away_from_zero(total + eps, eps)
    elif form.normalizer == "mean":
        weights = similarity / M / away_from_zero(total / M + eps, eps)
    elif form.normalizer == "inline":
        weights = s * similarity / M + (1 - s * total / M) / M
    elif form.normalizer == "magnitude":
        z = s * total / M
        weights = s * similarity / M * (1 + 1 / away_from_zero(z + eps, eps)) - z / M
    else:
        weights = s * similarity
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v.to(query.dtype)).to(v.dtype)
    return epilogue(out, residual, gate)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = "identity",
    normalizer: str = "sum",
    scale: float | None = None,
    eps: float = 1e-6,
    rotary: Rotary | None = None,
    key_weights: Tensor | None = None,
    rank_augmented: bool = False,
    causal: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to all keys at a cost that grows with their number alone.

    With ``t[i] = phi(q[i]) . sum_j w[j] phi(k[j])`` and ``u[i] = sum_j w[j] (R phi(q[i]) . R phi(k[j])) v[j]`` the
    normalizers give

        "sum"         u / (t + eps)
        "mean"        u / M / (t / M + eps), the same but for the place of eps (FLatten, arXiv 2308.00442)
        "none"        scale * u
        "inline"      scale * u / M + (1 - scale * t / M) * mean(v), weights that add up to one by subtraction
                      (InLine, arXiv 2412.06590)
        "magnitude"   scale * u / M * (1 + 1 / (z + eps)) - z * mean(v), z = scale * t / M (MALA, arXiv 2507.00698)

    A divisor smaller than ``eps``, which takes a feature map with negative values, counts as ``eps`` of its sign.

    Args:
        q: Queries, on a sequence or a grid, of any strides. [B, N, h, D] or [B, H, W, h, D]
        k: Keys. [B, M, h, D] or [B, H', W', h, D]
        v: Values. [B, M, h, V] or [B, H', W', h, V]
        feature_map: phi, or a pair of those of queries and keys. A function of [B, N, h, D] that may change D, or one
            of ``"identity"``, ``"relu"``, ``"relu2"`` (its square), ``"elu+1"``, ``"exp"`` (inputs above 30 count as
            30), ``"softmax"`` (over D), ``"focused"`` (relu to the third power with the norm of the token kept).
        normalizer: ``"sum"``, ``"mean"``, ``"none"``, ``"inline"`` or ``"magnitude"``.
        scale: Factor of similarities where a normalizer or ``rank_augmented`` uses it; ``None`` stands for D ** -0.5.
        eps: Added to divisors; positive.
        rotary: R, cosines and sines of the angles of every position, which rotate the adjacent pairs of features of
            queries and keys alike; N must equal M. Two tensors [N, F / 2], as ``rotary_tables`` makes them.
        key_weights: w, such as 0 for keys to leave out; counts in t and u, not in M and mean(v).
            [B, M, h] or [B, H', W', h]
        rank_augmented: Weight the keys by ``softmax_j(scale * mean_i(phi(q[i])) . phi(k[j]))`` (RALA, arXiv
            2411.07635).
        causal: Whether a query sees only the keys up to its own position; with ``"sum"`` or ``"none"``. Always plain
            PyTorch.
        residual: Added to the result, such as a depthwise convolution of the values. As the result
        gate: Factor of the sum of result and residual. As the result
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        The mixed values in the dtype of ``v``; under autocast in its dtype. [B, N, h, V] or [B, H, W, h, V]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or an argument is not one of the allowed.
        BackendError: If the backend that was asked for cannot run this call.
    """
    maps = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    if len(maps) != 2:
        raise ValueError(f"feature_map must be one or a pair of those of queries and keys, got {len(maps)}")
    query_map, key_map = maps
    if not (torch.jit.is_tracing() or exporting()):
        _check_options(query_map, key_map, normalizer, eps, key_weights, rank_augmented, causal)
        _check_tensors(q, k, v, rotary, key_weights, residual, gate, normalizer, rank_augmented, causal)
    spatial = q.shape[1:-2]
    if len(spatial) > 1:
        q, k, v, residual, gate = (None if t is None else t.flatten(1, -3) for t in (q, k, v, residual, gate))
        key_weights = None if key_weights is None else key_weights.flatten(1, -2)
    scale = operator.index(q.shape[-1]) ** -0.5 if scale is None else positive("scale", scale)
    cast = torch.autocast(q.device.type, enabled=False) if autocasting(q) else contextlib.nullcontext()
    q, k, v, residual, gate = autocast(q, k, v, residual, gate)
    if not isinstance(query_map, str):
        q, query_map = query_map(q), "identity"
    if not isinstance(key_map, str):
        k, key_map = key_map(k), "identity"
    if rotary is not None and not exporting():
        _check_turns(rotary, q.shape[-1], k.shape[-1])
    form = Form(query_map, key_map, normalizer, scale, float(eps), rank_augmented, causal)
    chosen = choose("linear_attention", q, backend, lambda: unsupported(q, k, v, form))
    with cast:
        out = _IMPLEMENTATIONS[chosen](q, k, v, form, rotary, key_weights, residual, gate)
    return out.unflatten(1, spatial) if len(spatial) > 1 else out


_IMPLEMENTATIONS = {
    "triton": linear_attention_triton,
    "torch": linear_attention_torch,
    "reference": linear_attention_reference,
}


def _check_options(query_map, key_map, normalizer, eps, key_weights, rank_augmented, causal) -> None:
    for feature_map in (query_map, key_map):
        if not callable(feature_map) and not (isinstance(feature_map, str) and feature_map in FEATURE_MAPS):
            raise ValueError(f"feature_map must be a function or one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    if not isinstance(normalizer, str) or normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    positive("eps", eps)
    check_flags(rank_augmented=rank_augmented, causal=causal)
    if rank_augmented and key_weights is not None:
        raise ValueError("key_weights must be None where rank_augmented=True computes them")
    if causal and (normalizer not in ("sum", "none") or rank_augmented):
        raise ValueError(
            "causal=True takes the normalizers sum and none, without rank_augmented: the others are sums over all "
            f"keys; got normalizer={normalizer!r}, rank_augmented={rank_augmented}"
        )


def _check_turns(rotary: Rotary, query_width: int, key_width: int) -> None:
    """Every pair of features of queries and keys has a turn."""
    for name, table in zip(("cosines", "sines"), rotary, strict=True):
        for width in (query_width, key_width):
            if 2 * table.shape[1] != width:
                raise ValueError(
                    f"rotary must be [N, features / 2] with {width} features, got {name} of shape {tuple(table.shape)}"
                )


def _check_tensors(q, k, v, rotary, key_weights, residual, gate, normalizer, rank_augmented, causal) -> None:
    check_tensors(q=q, k=k, v=v)
    check_tensors(True, key_weights=key_weights, residual=residual, gate=gate)
    if q.dim() not in (4, 5):
        raise ValueError(f"q must be [B, N, heads, D] or [B, H, W, heads, D], got shape {tuple(q.shape)}")
    check_floating(q=q)
    check_filled("q", q, head=-2, channel=-1)
    for name, tensor in (("k", k), ("v", v)):
        shape = tuple(tensor.shape)
        if tensor.dim() != q.dim() or shape[0] != q.shape[0] or shape[-2] != q.shape[-2]:
            raise ValueError(f"{name} must have the batch, axes and heads of q {tuple(q.shape)}, got shape {shape}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[1:-2] != k.shape[1:-2]:
        raise ValueError(f"v must have the positions of k, {tuple(k.shape[1:-2])}, got {tuple(v.shape[1:-2])}")
    check_filled("v", v, channel=-1)
    N, M = q.shape[1:-2].numel(), k.shape[1:-2].numel()
    if M == 0 and (normalizer not in ("sum", "none") or rank_augmented):
        raise ValueError(f"normalizer {normalizer!r} takes means over keys, of which there must be at least one")
    if N != M and (causal or rotary is not None):
        raise ValueError(f"causal and rotary need as many keys as queries, got {M} keys and {N} queries")
    if rotary is not None:
        if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
            raise ValueError("rotary must be two tensors, the cosines and the sines")
        check_tensors(**{"rotary's cosines": rotary[0], "rotary's sines": rotary[1]})
        for name, table in zip(("cosines", "sines"), rotary, strict=True):
            if table.dim() != 2 or len(table) != N or table.device != q.device:
                raise ValueError(
                    f"rotary must be [N, features / 2] with N = {N} on {q.device}, got {name} of shape "
                    f"{tuple(table.shape)} on {table.device}"
                )
    if key_weights is not None and key_weights.shape != k.shape[:-1]:
        raise ValueError(f"key_weights must be {tuple(k.shape[:-1])}, got shape {tuple(key_weights.shape)}")
    for name, tensor in (("residual", residual), ("gate", gate)):
        if tensor is not None and tensor.shape != (*q.shape[:-1], v.shape[-1]):
            raise ValueError(f"{name} must be {(*q.shape[:-1], v.shape[-1])}, got shape {tuple(tensor.shape)}")
    check_same(q, k=k, v=v, residual=residual, gate=gate)
