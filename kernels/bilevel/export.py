"""Attention of regions in a few operators that every runtime knows: to script, to compile, to export for any size.

Shapes: B batch, H rows, W columns, h heads, D head dim of queries and keys, E of values, R regions, T tokens of one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.bilevel.regions import cut
from visionattn.kernels.common.attend import attend

__all__ = ["dense_attention", "gathered_attention"]


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
    out = attend(q, k, v, None, scale)
    return out.transpose(1, 2).reshape(B, R, q.shape[2], h, E)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, region: tuple[int, int], routes: Tensor | None, scale: float
) -> Tensor:
    """Attention to all tokens, or to those of the routed regions by a mask."""
    B, H, W, h, _ = q.shape
    down, rows, across, columns = cut(H, W, *region)
    pad = (0, 0, 0, 0, 0, across * columns - W, 0, down * rows - H)  # zeros take part, as keys and values
    if any(pad):
        k, v = F.pad(k, pad), F.pad(v, pad)
    mask = None
    if routes is not None:
        chosen = torch.zeros(B, down * across, down * across, dtype=q.dtype, device=q.device)
        chosen = torch.full_like(chosen, -torch.inf).scatter(2, routes, chosen)
        of_row = torch.arange(down * rows, device=q.device) // rows * across
        of_token = of_row[:, None] + torch.arange(across * columns, device=q.device) // columns
        mask = chosen.index_select(1, of_token[:H, :W].flatten()).index_select(2, of_token.flatten())[:, None]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    out = attend(q, k, v, mask, scale)
    return out.transpose(1, 2).reshape(B, H, W, h, v.shape[-1])
