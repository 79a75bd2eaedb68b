"""Neighborhood attention in tiles of neighboring queries, which attend to all the keys that one of them sees, under a
mask: see ``tiles.py``. Letters: B batch, N positions, h heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from visionattn.kernels.common.attend import attend
from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.neighborhood import tiles
from visionattn.kernels.neighborhood.geometry import axis_windows

__all__ = ["finite", "neighborhood_attention_tiled"]


def neighborhood_attention_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
    eager: bool,
) -> Tensor:
    """Attention tile by tile, a few tiles at once. Arguments as in :func:`neighborhood_attention`, one value per axis.

    Args:
        eager: Whether tensors are ordinary ones with values, see ``eager`` in ``common/mode.py``.
    """
    groups, tables = tiles.cut(q, kernel_size, dilation, is_causal, kept=eager)
    masks: list[Tensor | None] = [None] * len(groups)
    if bias is not None or not tables.dense:
        masks = tiles.additive_masks(bias, groups, tables, kernel_size, q.dtype)
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    arguments = groups, tables, masks, scale, trained
    # What spreads within a tile, from keys and values that its other queries see, is never finite.
    if tables.dense:
        return _attend_tiles(q, k, v, *arguments)
    if eager and q.device.type == "cpu":  # elsewhere, to look at the result would cost a synchronisation
        out = _attend_tiles(q, k, v, *arguments)
        if finite(out):
            return out
    cleaned = (torch.where(t.isfinite(), t, 0) for t in (k, v))
    out = _attend_tiles(q, *cleaned, *arguments, contain=True)
    return _with_nan_where_seen(out, k, v, kernel_size, dilation, is_causal)


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[tiles.Group, ...],
    tables: tiles.Tables,
    masks: list[Tensor | None],
    scale: float,
    trained: bool,
    contain: bool = False,
) -> Tensor:
    B, h, D = q.shape[0], q.shape[-2], q.shape[-1]
    if len(groups) == 1 and groups[0].tiles == 1:
        rows = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
        return _attend(*rows, masks[0], scale, contain).transpose(1, 2).contiguous().view(q.shape)
    start = torch.arange(B, device=q.device)[:, None] * math.prod(q.shape[1:-2])

    def cut(x: Tensor, index: tuple[Tensor, ...]) -> Iterator[Tensor]:
        x = x.reshape(-1, h * D)
        if not trained:  # one group at a time needs less memory
            return (x.index_select(0, (start + i).flatten()) for i in index)
        every = torch.cat([(start + i).flatten() for i in index])
        return iter(x.index_select(0, every).split([B * i.numel() for i in index]))

    parts = []
    cuts = cut(q, tables.queries), cut(k, tables.keys), cut(v, tables.keys)
    for group, mask, *qkv in zip(groups, masks, *cuts, strict=True):
        sizes = (group.queries, group.keys, group.keys)
        qkv = [t.view(-1, size, h, D).transpose(1, 2) for t, size in zip(qkv, sizes, strict=True)]
        part = _attend(*qkv, mask, scale, contain).transpose(1, 2)
        parts.append(part.reshape(B, group.tiles * group.queries, h * D))
    return torch.cat(parts, 1).index_select(1, tables.inverse).view(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, contain: bool) -> Tensor:
    """Attention of tiles. q: [n, h, T, D]; k, v: [n, h, S, D]; mask: [h or 1, T, S]"""
    # SDPA is slow where the mask needs a gradient, and on a CPU cannot mask a logit that has overflowed.
    trained = mask is not None and mask.requires_grad
    if not trained and not (contain and q.device.type == "cpu"):
        return attend(q, k, v, None if mask is None else mask[None], scale)
    logits = (q * scale) @ k.transpose(-1, -2) + mask
    if contain:
        logits = logits.masked_fill(mask == -torch.inf, -torch.inf)
    return logits.softmax(-1) @ v


def _with_nan_where_seen(
    out: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> Tensor:
    """NaN for every query and head that sees a key or value with a NaN or Inf."""
    bad = ~(k.isfinite() & v.isfinite()).all(-1)
    for axis, (K, d, c) in enumerate(zip(kernel_size, dilation, is_causal, strict=True), 1):
        keys, _, _ = axis_windows(bad.shape[axis], K, d, c, v.device)
        bad = bad.index_select(axis, keys.flatten()).unflatten(axis, keys.shape).any(axis + 1)
    return out.masked_fill(bad[..., None], torch.nan)


def finite(x: Tensor) -> bool:
    """Whether all elements are finite, as far as their sum tells, which is all that it costs."""
    return math.isfinite(x.detach().sum(dtype=precise_dtype(x.dtype)).item())
