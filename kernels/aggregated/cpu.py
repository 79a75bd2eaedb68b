"""Aggregated attention in a few operators that every runtime knows, from nine views of one padded map.

Letters: B batch, H W rows and columns, h heads, D head dim, P pooled positions. See ``op.py`` for what it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.precision import precise

__all__ = ["aggregated_attention_torch", "neighbors_exist"]


def neighbors_exist(height: int, width: int, device: torch.device) -> Tensor:
    """Which of the 3x3 neighbors of a position lie in the map, row by row. [H, W, 9]"""
    step = torch.arange(3, device=device) - 1
    y = torch.arange(height, device=device)[:, None] + step
    x = torch.arange(width, device=device)[:, None] + step
    rows, columns = (y >= 0) & (y < height), (x >= 0) & (x < width)
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)


def aggregated_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, bias: Tensor, pooled_bias: Tensor, add: Tensor
) -> Tensor:
    """The nine neighbors are shifted views, so that none of their keys and values is copied.

    Arguments as of ``aggregated_attention``.
    """
    height, width = q.shape[1], q.shape[2]
    full = precise(q)
    keys = F.pad(precise(k), [0, 0, 0, 0, 1, 1, 1, 1])
    values = F.pad(precise(v), [0, 0, 0, 0, 1, 1, 1, 1])
    near = []
    for s in range(9):
        y, x = s // 3, s % 3
        near.append((full * keys[:, y : y + height, x : x + width]).sum(-1))
    logits = torch.stack(near, -1) + bias  # B H W h 9
    exists = neighbors_exist(height, width, q.device)
    logits = logits.masked_fill(~exists[:, :, None], float("-inf"))
    rows = full.flatten(1, 2).transpose(1, 2)  # B h N D
    far = rows @ precise(pooled_k).permute(0, 2, 3, 1) + pooled_bias
    far = far.transpose(1, 2).unflatten(1, [height, width])  # B H W h P
    weights = torch.cat([logits, far], -1).softmax(-1)
    local = weights[..., :9] + add
    out = weights[..., 9:].flatten(1, 2).transpose(1, 2) @ precise(pooled_v).transpose(1, 2)
    out = out.transpose(1, 2).unflatten(1, [height, width])
    for s in range(9):
        y, x = s // 3, s % 3
        out = torch.addcmul(out, local[..., s : s + 1], values[:, y : y + height, x : x + width])
    return out.to(q.dtype)
