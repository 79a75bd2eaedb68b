"""Bi-level routing attention: regions of a map attend to the few regions that resemble them most. Shapes: B batch,
H rows, W columns, h heads, D head dim of queries and keys, E of values, R regions, T tokens of one, K routes.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j])

where j runs over the tokens of the K regions whose mean key has the largest product with the mean query of i's region
(arXiv 2303.08810).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.bilevel.cpu import bilevel_routing_attention_torch
from visionattn.kernels.bilevel.regions import cut, find_routes, from_regions, split_map
from visionattn.kernels.bilevel.triton import bilevel_routing_attention_triton, unsupported
from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import (
    check_extent,
    check_filled,
    check_floating,
    check_integer,
    check_same,
    check_tensors,
    per_axis,
    positive,
)
from visionattn.kernels.common.mode import autocast, eager
from visionattn.kernels.common.precision import precise_dtype

__all__ = ["bilevel_routing_attention"]


def bilevel_routing_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region: tuple[int, int],
    topk: int,
    routes: Tensor | None,
    weights: Tensor | None,
    key_region: tuple[int, int],
    scale: float,
) -> Tensor:
    """Gather every region's keys and values, as the authors do. Arguments as in :func:`bilevel_routing_attention`."""
    if routes is None:
        routes = find_routes(q, k, region, topk)
    full = precise_dtype(q.dtype)
    dtype, (B, H, W, h, D), E = q.dtype, q.shape, v.shape[-1]
    q = split_map(q.to(full), region).transpose(2, 3)  # B R h T D
    k, v = (split_map(t.to(full), key_region) for t in (k, v))  # B R S h D
    R, S, K = k.shape[1], k.shape[2], routes.shape[-1]
    index = routes[:, :, :, None, None, None]
    k = k[:, None].expand(B, R, R, S, h, D).gather(2, index.expand(B, R, K, S, h, D))
    v = v[:, None].expand(B, R, R, S, h, E).gather(2, index.expand(B, R, K, S, h, E))
    if weights is not None:
        factor = weights.to(full)[:, :, :, None, None, None]
        k, v = k * factor, v * factor
    k, v = (t.flatten(2, 3).transpose(2, 3) for t in (k, v))  # B R h K*S D
    with torch.autocast(q.device.type, enabled=False):
        out = ((q * scale) @ k.transpose(-1, -2)).softmax(-1) @ v
    out = from_regions(out.transpose(2, 3).flatten(3), cut(H, W, *region), H, W)
    return out.reshape(B, H, W, h, E).to(dtype)


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region: int | Sequence[int],
    topk: int | None = None,
    routes: Tensor | None = None,
    weights: Tensor | None = None,
    key_region: int | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from every region of a map to the tokens of a few regions.

    Regions are counted row by row. Where the map is not a multiple of ``region``, zeros complete the regions at the
    bottom and on the right: they count as keys with the logit 0 and the value 0, but not for the mean of a region.

    Args:
        q: Queries, of any strides. [B, H, W, h, D]
        k: Keys: a map as that of the queries, or with ``key_region`` one of as many, smaller regions. [B, H, W, h, D]
        v: Values on the map of the keys. [B, H, W, h, E]
        region: Tokens of a region per axis.
        topk: How many regions K to attend to: those whose mean key has the largest product with the mean query, over
            all heads together. No gradient flows through this choice.
        routes: Instead of ``topk``, the regions that every region attends to, checked where that needs no waiting for
            a GPU; in the kernels the tokens of a region that there is not count as zeros do. Integers [B, R, K]
        weights: Factors of the keys and values of each of ``routes`` (soft routing), or None. [B, R, K]
        key_region: Tokens of a region of keys per axis, if they were pooled; needs ``routes``.
        scale: Factor of the logits; None stands for D ** -0.5. BiFormer takes (h * D) ** -0.5.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or None for the setting or the automatic choice.

    Returns:
        The attended values; under autocast in its dtype. [B, H, W, h, E]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, ``topk`` exceeds the number of regions, neither or
            both of ``topk`` and ``routes`` are given, or ``backend`` is unknown.
        BackendError: If the backend that was asked for cannot run this call.
    """
    region = per_axis("region", region, 2, int)
    key_region = region if key_region is None else per_axis("key_region", key_region, 2, int)
    if not torch.jit.is_tracing():  # which warns of every comparison
        _check(q, k, v, region, topk, routes, weights, key_region)
    scale = operator.index(q.shape[-1]) ** -0.5 if scale is None else positive("scale", scale)
    q, k, v = autocast(q, k, v)
    chosen = choose("bilevel_routing_attention", q, backend, lambda: unsupported(q, v, weights))
    return _IMPLEMENTATIONS[chosen](q, k, v, region, topk, routes, weights, key_region, scale)


_IMPLEMENTATIONS = {
    "triton": bilevel_routing_attention_triton,
    "torch": bilevel_routing_attention_torch,
    "reference": bilevel_routing_attention_reference,
}


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region: tuple[int, int],
    topk: int | None,
    routes: Tensor | None,
    weights: Tensor | None,
    key_region: tuple[int, int],
) -> None:
    check_tensors(q=q, k=k, v=v)
    check_tensors(True, routes=routes, weights=weights)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 5:
            raise ValueError(f"{name} must be [B, H, W, heads, head dim], got shape {tuple(tensor.shape)}")
    check_floating(q=q)
    check_filled("q", q, head=3, channel=4)
    check_filled("v", v, channel=4)
    if min(region) < 1 or min(key_region) < 1:
        raise ValueError(f"region and key_region must be at least 1, got {region} and {key_region}")
    check_extent("region", region, q.shape[1:3])
    if (topk is None) == (routes is None):
        raise ValueError(
            f"give either topk or routes, got topk={topk} and routes={'None' if routes is None else '...'}"
        )
    if topk is not None and (weights is not None or key_region != region):
        raise ValueError("weights and key_region need routes, got topk")
    B, H, W, h, D = q.shape
    down, _, across, _ = cut(H, W, *region)
    if key_region == region:
        expected = (B, H, W, h, D)
    else:
        expected = (B, down * key_region[0], across * key_region[1], h, D)
    if tuple(k.shape) != expected:
        raise ValueError(f"k must be {expected} for q of {tuple(q.shape)} in regions, got shape {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must be {(*k.shape[:-1], 'E')} on the map of k, got shape {tuple(v.shape)}")
    if topk is not None:
        check_integer("topk", topk)
    if topk is not None and not 1 <= topk <= down * across:
        raise ValueError(f"topk must be from 1 to the number of regions, {down} * {across}, got {topk}")
    if routes is not None and (
        routes.dim() != 3 or routes.shape[:2] != (B, down * across) or routes.dtype != torch.long
    ):
        raise ValueError(
            f"routes must be int64 [B, R, K] with B = {B} and R = {down * across}, got {routes.dtype} of shape "
            f"{tuple(routes.shape)}"
        )
    if routes is not None and eager(routes) and routes.device.type == "cpu" and routes.numel():
        least, largest = (int(n) for n in routes.aminmax())  # elsewhere it would cost a synchronisation
        if least < 0 or largest >= down * across:
            raise ValueError(f"routes must be from 0 to {down * across - 1}, got {least} to {largest}")
    if weights is not None and weights.shape != routes.shape:
        raise ValueError(f"weights must be {tuple(routes.shape)} as routes are, got shape {tuple(weights.shape)}")
    check_same(q, "q", k=k, v=v)
    for name, tensor in (("routes", routes), ("weights", weights)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")
