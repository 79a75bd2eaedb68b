"""Neighborhood attention in a few operators that every runtime knows: to script, to export for any size of map, to drop
attention weights. B batch, M lines, R of them in a window, L length of a line, h heads, D head dim, K window side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.neighborhood.geometry import axis_mask, map_windows

__all__ = ["neighborhood_attention_export"]


def neighborhood_attention_export(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    bias: Tensor | None,
    is_causal: list[bool],
    scale: float,
    drop: float = 0.0,
) -> Tensor:
    """Attend line by line. Arguments as in :func:`neighborhood_attention`, one value per axis; nothing is checked.

    A line is a row of the map's last axis. Every line gathers the lines its windows lie in, then attends to them under
    a mask: much faster than one gather per position, and without logits between all positions. All sizes may be
    symbols.

    Args:
        drop: Probability of dropping an attention weight.
    """
    spatial = q.shape[1:-2]
    heads = q.shape[-2]
    lines, offsets, seen = map_windows(
        spatial[:-1], kernel_size[:-1], dilation[:-1], is_causal[:-1], q.device
    )  # M R, all three
    L, K = spatial[-1], kernel_size[-1]
    offset, inside = axis_mask(L, K, dilation[-1], is_causal[-1], q.device)  # L L
    mask = (seen[:, None, :, None] & inside[None, :, None, :]).flatten(-2)  # M L R*L
    if len(spatial) == 1:
        q, k, v = q[:, None], k[:, None], v[:, None]
    if len(spatial) == 3:
        q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)  # B M L h D
    # The logit of a value with NaN or Inf is NaN, under the mask; then it need not be multiplied by a weight of 0.
    spoiled = (v - v).sum(-1)[:, lines].flatten(2, 3).permute(0, 3, 1, 2)  # B h M R*L
    v = torch.where(torch.isfinite(v), v, torch.zeros_like(v))
    # An export with symbols for sizes can fold the batch axes of a product in this order only.
    k, v = k[:, lines].flatten(2, 3).permute(0, 3, 1, 2, 4), v[:, lines].flatten(2, 3).permute(0, 3, 1, 2, 4)
    logits = (q * scale).permute(0, 3, 1, 2, 4) @ k.transpose(3, 4) + spoiled[:, :, :, None]  # B h M L R*L
    if bias is not None:
        table = bias.reshape(heads, -1, 2 * K - 1)[:, offsets][:, :, :, offset]  # h M R L L
        logits = logits + table.transpose(2, 3).flatten(-2)
    weights = logits.masked_fill(~mask, -float("inf")).softmax(-1)
    if drop > 0.0:
        weights = F.dropout(weights, drop)
    out = (weights.to(v.dtype) @ v).permute(0, 2, 3, 1, 4)  # B M L h D
    if len(spatial) == 1:
        out = out[:, 0]
    if len(spatial) == 3:
        out = out.unflatten(1, spatial[:2])
    return out
