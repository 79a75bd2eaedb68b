"""Regions of a map, and which of them attend to which. Shapes: B batch, R regions, T tokens of one, K routes of one.

A grid, [down, rows, across, columns], is ``down`` by ``across`` regions of ``rows`` by ``columns`` tokens. All of this
is written so that TorchScript compiles it too.
"""

import operator

import torch
from torch import Tensor

from visionattn.kernels.common.layout import pad_map
from visionattn.kernels.common.mode import autocasting, exporting
from visionattn.kernels.common.precision import precise_dtype

__all__ = [
    "count_regions",
    "cut",
    "find_routes",
    "from_regions",
    "region_means",
    "route_regions",
    "split_map",
    "to_regions",
]


def cut(height: int, width: int, rows: int, columns: int) -> list[int]:
    """The grid of the regions of ``rows`` by ``columns`` tokens that cover a map: down, rows, across, columns."""
    return [-(-height // rows), rows, -(-width // columns), columns]


def to_regions(x: Tensor, grid: list[int]) -> Tensor:
    """Cut a map into regions, row by row, zeros completing the last ones. [B, H, W, C] -> [B, R, T, C]"""
    down, rows, across, columns = grid
    x = pad_map(x, down * rows, across * columns)
    if not torch.jit.is_scripting():
        if exporting():  # to split an axis of unknown length, a graph would compare sizes
            region, token = (torch.arange(n, device=x.device) for n in (down * across, rows * columns))
            y = region[:, None] // across * rows + token // columns
            return x.flatten(1, 2)[:, y * (across * columns) + region[:, None] % across * columns + token % columns]
    x = x.unflatten(2, [across, columns]).unflatten(1, [down, rows])
    return x.transpose(2, 3).contiguous().flatten(3, 4).flatten(1, 2)


def from_regions(x: Tensor, grid: list[int], height: int, width: int) -> Tensor:
    """Put regions together again, without what completed the last ones. [B, R, T, C] -> [B, height, width, C]"""
    down, rows, across, columns = grid
    if not torch.jit.is_scripting():
        if exporting():
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
    full = precise_dtype(x.dtype)
    if not torch.jit.is_scripting():
        if exporting():
            return to_regions(x, grid).sum(2, dtype=full) / tokens
    x = pad_map(x, down * rows, across * columns)
    x = x.unflatten(2, [across, columns]).unflatten(1, [down, rows])
    total = x.sum(4, dtype=full).sum(2)  # in two steps: one reduction over both axes measured 5 to 25 times slower
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
        if q_means.is_cuda or autocasting(q_means):
            q_means, k_means = q_means.double(), k_means.double()
    scores, routes = (q_means @ k_means.transpose(1, 2)).topk(topk, -1)
    return scores, routes


def split_map(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Cut the heads of a map into regions. [B, H, W, h, D] -> [B, R, T, h, D]"""
    return to_regions(x.flatten(3), cut(*x.shape[1:3], *region)).unflatten(-1, x.shape[3:])


def find_routes(q: Tensor, k: Tensor, region: tuple[int, int], topk: int) -> Tensor:
    """Indices of the regions to attend to, through which no gradient flows. [B, R, K]"""
    q, k = (region_means(t.detach().flatten(3), cut(*t.shape[1:3], *region)) for t in (q, k))
    return route_regions(q, k, topk)[1]


def count_regions(x: Tensor, region: tuple[int, int]) -> int:
    """How many regions cover a map. [B, H, W, ...]"""
    down, _, across, _ = cut(*x.shape[1:3], *region)
    return operator.index(down * across)
