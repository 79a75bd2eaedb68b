"""Regions of a map, and which of them attend to which. Shapes: B batch, R regions, T tokens of one, K routes of one.

A grid, [down, rows, across, columns], is ``down`` by ``across`` regions of ``rows`` by ``columns`` tokens. All of this
is written so that TorchScript compiles it too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import backend as _dispatch


def pad_map(x: Tensor, height: int, width: int) -> Tensor:
    """Zeros at the bottom and on the right up to a size. [B, H, W, C]"""
    below, right = height - x.shape[1], width - x.shape[2]
    if torch.jit.is_scripting():
        return F.pad(x, (0, 0, 0, right, 0, below))
    else:
        if not _dispatch.exporting() and below == 0 and right == 0:  # an exported graph fixes no size by comparing it
            return x
        return F.pad(x, (0, 0, 0, right, 0, below))


def crop_map(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left part of a map. [B, H, W, C]"""
    if not torch.jit.is_scripting():
        if _dispatch.exporting():  # a slice would compare the sizes
            rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
            return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width]


def cut(height: int, width: int, rows: int, columns: int) -> list[int]:
    """The grid of the regions of ``rows`` by ``columns`` tokens that cover a map: down, rows, across, columns."""
    return [-(-height // rows), rows, -(-width // columns), columns]


def to_regions(x: Tensor, grid: list[int]) -> Tensor:
    """Cut a map into regions, row by row, zeros completing the last ones. [B, H, W, C] -> [B, R, T, C]"""
    down, rows, across, columns = grid
    x = pad_map(x, down * rows, across * columns)
    if not torch.jit.is_scripting():
        if _dispatch.exporting():  # to split an axis of unknown length, a graph would compare sizes
            region, token = (torch.arange(n, device=x.device) for n in (down * across, rows * columns))
            y = region[:, None] // across * rows + token // columns
            return x.flatten(1, 2)[:, y * (across * columns) + region[:, None] % across * columns + token % columns]
    x = x.unflatten(2, [across, columns]).unflatten(1, [down, rows])
    return x.transpose(2, 3).contiguous().flatten(3, 4).flatten(1, 2)


def from_regions(x: Tensor, grid: list[int], height: int, width: int) -> Tensor:
    """Put regions together again, without what completed the last ones. [B, R, T, C] -> [B, height, width, C]"""
    down, rows, across, columns = grid
    if not torch.jit.is_scripting():
        if _dispatch.exporting():
            y, z = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
            region = y // rows * across + z // columns
            return x.flatten(1, 2)[:, region * (rows * columns) + y % rows * columns + z % columns]
    x = x.unflatten(2, [rows, columns]).unflatten(1, [down, across])
    return x.transpose(2, 3).contiguous().flatten(3, 4).flatten(1, 2)[:, :height, :width]


def region_means(x: Tensor, grid: list[int]) -> Tensor:
    """Mean of every region's tokens on the map, at least in float32. [B, H, W, C] -> [B, R, C]"""
    down, rows, across, columns = grid
    tall = (x.shape[1] - rows * torch.arange(down, device=x.device)).clamp(max=rows)
    wide = (x.shape[2] - columns * torch.arange(across, device=x.device)).clamp(max=columns)
    tokens = (tall[:, None] * wide).flatten()[:, None]
    precise = torch.promote_types(x.dtype, torch.float32)
    if not torch.jit.is_scripting():
        if _dispatch.exporting():
            return to_regions(x, grid).sum(2, dtype=precise) / tokens
    x = pad_map(x, down * rows, across * columns)
    x = x.unflatten(2, [across, columns]).unflatten(1, [down, rows])
    total = x.sum(4, dtype=precise).sum(2)  # in two steps: one reduction over both axes measured 5 to 25 times slower
    return total.flatten(1, 2) / tokens


def route_regions(q_means: Tensor, k_means: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The regions whose mean key has the largest product with a region's mean query: products and indices, best first.

    The choice is discontinuous, so it is made in full precision whatever autocast and TF32 allow.

    Args:
        q_means: [B, R, C]
        k_means: [B, R, C]
        topk: K.

    Returns:
        Scores and indices. [B, R, K]
    """
    if not torch.jit.is_scripting():
        if q_means.is_cuda or _dispatch.autocasting(q_means):
            q_means, k_means = q_means.double(), k_means.double()
    scores, routes = (q_means @ k_means.transpose(1, 2)).topk(topk, -1)
    return scores, routes


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """Attention of regions to copies of those that they are routed to. S tokens of one of keys, h heads, D head dim.

    Args:
        q: [B, R, T, h, D]
        k: [B, R, S, h, D]
        v: [B, R, S, h, E]
        routes: [B, R, K]
        weights: Factor of the routed keys and values, or None. [B, R, K]
        scale: Factor of the logits.

    Returns:
        [B, R, T, h, E]
    """
    B, R, K = routes.shape
    S, h, D, E = k.shape[2], k.shape[3], k.shape[4], v.shape[4]
    rows = (routes + R * torch.arange(B, device=routes.device)[:, None, None]).flatten()
    k = k.flatten(0, 1).index_select(0, rows).reshape(B * R, K, S, h, D)
    v = v.flatten(0, 1).index_select(0, rows).reshape(B * R, K, S, h, E)
    if weights is not None:
        factor = weights.to(k.dtype).reshape(B * R, K, 1, 1, 1)
        k, v = k * factor, v * factor
    q, k, v = q.flatten(0, 1).transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(B, R, q.shape[2], h, E)
