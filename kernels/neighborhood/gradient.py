"""Gradients of neighborhood attention in tiles, written out. Letters: B batch, N positions of the map, h heads, D head
dim, n tiles, T queries and S keys of a tile.

Attention weights are made again from queries and keys. NaN or Inf in an input or an incoming gradient may spread to all
gradients of the tiles around it, and to that of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.neighborhood import tiles

__all__ = ["flash_backward", "flash_forward", "matrix_backward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Piece(NamedTuple):
    """The tiles of a group.

    Attributes:
        queries: T.
        keys: S.
        query_rows: Where the queries of the tiles lie in the map, None if it is one tile as it is. [n * T]
        key_rows: Where their keys lie. [n * S]
        pairs: Index into the bias. [T * S]
        mask: Added to the logits, or None. [h or 1, T, S]
    """

    queries: int
    keys: int
    query_rows: Tensor | None
    key_rows: Tensor | None
    pairs: Tensor
    mask: Tensor | None


def _pieces(
    q: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    maps: int,
) -> tuple[list[_Piece], Tensor | None]:
    """The groups of ``maps`` maps that lie one after the other, and where their queries lie in that order. [N]"""
    groups, tables = tiles.cut(q, kernel_size, dilation, is_causal, kept=True)
    masks: Sequence[Tensor | None] = [None] * len(groups)
    if bias is not None or not tables.dense:
        masks = tiles.additive_masks(bias, groups, tables, kernel_size, q.dtype)
    sizes = [(group.queries, group.keys) for group in groups]
    if len(groups) == 1 and groups[0].tiles == 1:
        return [_Piece(*sizes[0], None, None, tables.bias[0], masks[0])], None
    start = torch.arange(maps)[:, None] * q.shape[1:-2].numel()
    rows = [[(start + index).flatten() for index in kind] for kind in (tables.queries, tables.keys)]
    parts = zip(sizes, *rows, tables.bias, masks, strict=True)
    return [_Piece(*size, *rest) for size, *rest in parts], tables.inverse


def _take(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _add(total: Tensor, index: Tensor | None, rows: Tensor) -> None:
    """Add to the rows that ``_take`` has taken."""
    if index is None:
        total.add_(rows)
    else:
        total.index_add_(0, index, rows)


def _in_order(parts: list[Tensor], maps: int, inverse: Tensor | None) -> Tensor:
    """The rows of all queries in the order of the map, contiguous. [maps, N, width]"""
    parts = [part.view(maps, -1, part.shape[-1]) for part in parts]
    return parts[0].contiguous() if inverse is None else torch.cat(parts, 1).index_select(1, inverse)


def _split(rows: Tensor, index: Tensor | None, size: int, heads: int) -> Tensor:
    """Rows of all heads as tiles. [n, h, size, D]"""
    return _take(rows, index).view(-1, size, heads, rows.shape[-1] // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """Tiles as rows of all heads. [n, h, T, D] to [n * T, h * D]"""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the logits, [B, *spatial, h], by flash attention. No input may be empty."""
    B, h, D = q.shape[0], *q.shape[-2:]
    pieces, inverse = _pieces(q, bias, kernel_size, dilation, is_causal, B)
    rows = [x.reshape(-1, h * D) for x in (q, k, v)]
    outs, sums = [], []
    for piece in pieces:
        places = (piece.query_rows, piece.queries), *[(piece.key_rows, piece.keys)] * 2
        qkv = [_split(x, *place, h) for x, place in zip(rows, places, strict=True)]
        out, lse = _flash(*qkv, attn_mask=None if piece.mask is None else piece.mask[None], scale=scale)
        outs.append(_joined(out))
        sums.append(lse.transpose(1, 2).reshape(-1, h))
    return _in_order(outs, B, inverse).view(q.shape), _in_order(sums, B, inverse).view(q.shape[:-1])


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, after ``flash_forward``."""
    B, h, D = q.shape[0], *q.shape[-2:]
    pieces, inverse = _pieces(q, bias, kernel_size, dilation, is_causal, B)
    grad, q_rows, k, v, out = (x.reshape(-1, h * D) for x in (grad, q, k, v, out))
    lse = lse.view(-1, h)
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for piece in pieces:
        own, seen = (piece.query_rows, piece.queries, h), (piece.key_rows, piece.keys, h)
        sums = _split(lse, *own)[..., 0]
        mask = None if piece.mask is None else piece.mask[None]
        tensors = _split(grad, *own), _split(q_rows, *own), _split(k, *seen), _split(v, *seen), _split(out, *own), sums
        parts = _flash_backward(*tensors, 0.0, False, attn_mask=mask, scale=scale)  # no dropout, not causal
        dq.append(_joined(parts[0]))
        _add(dk, piece.key_rows, _joined(parts[1]))
        _add(dv, piece.key_rows, _joined(parts[2]))
    return _in_order(dq, B, inverse).view(q.shape), dk.view(q.shape), dv.view(q.shape)


def matrix_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias, by matrix products: flash attention has none of a mask."""
    B, h, D = q.shape[0], *q.shape[-2:]
    pieces, inverse = _pieces(q, bias, kernel_size, dilation, is_causal, h * B)
    # Rows of one head, so that the tile of a head is a matrix in memory. [h * B * N, D]
    grad, q_rows, k, v = (x.flatten(1, -3).permute(2, 0, 1, 3).reshape(-1, D) for x in (grad, q * scale, k, v))
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    table = torch.zeros(h, bias[0].numel() + 1, dtype=precise_dtype(q.dtype))  # one for no pair
    for piece in pieces:
        T, S = piece.queries, piece.keys
        g, queries = (_take(x, piece.query_rows).view(-1, T, D) for x in (grad, q_rows))
        keys, values = (_take(x, piece.key_rows).view(-1, S, D) for x in (k, v))
        logits = queries @ keys.mT
        weights = logits.view(h, -1, T, S).add_(piece.mask[:, None]).softmax(-1).view_as(logits)
        _add(dv, piece.key_rows, (weights.mT @ g).view(-1, D))
        d_logits = torch._softmax_backward_data(g @ values.mT, weights, -1, weights.dtype)
        table.index_add_(1, piece.pairs.long(), d_logits.view(h, -1, T * S).sum(1, dtype=table.dtype))
        _add(dk, piece.key_rows, (d_logits.mT @ queries).view(-1, D))
        dq.append((d_logits @ keys).view(-1, D))
    dq = _in_order(dq, h * B, inverse).mul_(scale)
    # [h * B * N, D] to [B, *spatial, h, D]
    dq, dk, dv = (x.view(h, B, -1, D).permute(1, 2, 0, 3).contiguous().view(q.shape) for x in (dq, dk, dv))
    return dq, dk, dv, table[:, :-1].contiguous().view(bias.shape).to(bias.dtype)
