"""Bi-level routing attention in PyTorch's own operators: which form suits a call.

Shapes: B batch, H rows, W columns, h heads, D head dim of queries and keys, E of values, R regions, K routes.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from visionattn.kernels.bilevel.chunks import chunked_attention
from visionattn.kernels.bilevel.export import dense_attention, gathered_attention
from visionattn.kernels.bilevel.regions import count_regions, cut, find_routes, from_regions, split_map
from visionattn.kernels.common.mode import eager, exporting

__all__ = ["bilevel_routing_attention_torch"]

# Up to here a mask over all pairs of tokens measured faster than copies of the routed regions.
MASKED_TOKENS = 196


def bilevel_routing_attention_torch(
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
    """The fastest form known in operators of PyTorch. Arguments as in :func:`bilevel_routing_attention`.

    Copies of keys and values are made for a few regions at a time; for second derivatives, for all regions at once.
    """
    B, H, W, h, _ = q.shape
    E = v.shape[-1]
    searched = routes is None and weights is None  # then all regions of a row of routes differ
    if searched and not exporting():
        if operator.index(topk) == count_regions(q, region):
            return dense_attention(q, k, v, region, None, scale)
        if H * W <= MASKED_TOKENS:
            out = dense_attention(q, k, v, region, find_routes(q, k, region, topk), scale)
            # A probability of 0 times a NaN or Inf of a region that is not attended to is NaN.
            if not eager(q) or q.device.type != "cpu" or out.detach().sum().isfinite():
                return out
    if routes is None:
        routes = find_routes(q, k, region, topk)
    q, k, v = split_map(q, region), split_map(k, key_region), split_map(v, key_region)
    if eager(q):
        B, R, K = routes.shape
        index = (routes + R * torch.arange(B, device=q.device)[:, None, None]).flatten(0, 1)
        factor = None if weights is None else weights.flatten(0, 1).to(k.dtype)
        out = chunked_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), index, factor, scale)
    else:
        out = gathered_attention(q, k, v, routes, weights, scale)
    grid = cut(H, W, *region)
    out = out.reshape(B, grid[0] * grid[2], grid[1] * grid[3], h * E)
    return from_regions(out, grid, H, W).reshape(B, H, W, h, E)
