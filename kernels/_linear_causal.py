"""Causal linear attention in chunks: quadratic inside a chunk, a running state between them.

Shapes: B batch, N positions, h heads, F features, V width of a value, T chunk.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels._linear_forms import coefficients, rotate_pairs

CHUNK = 64


def causal_sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``sum_{j <= i} (query_i . key_j) value_j`` for every i; memory grows with N * F * V / CHUNK.

    Args:
        query: [B, N, h, F]
        key: [B, N, h, F]
        value: [B, N, h, V]
    """
    N = query.shape[1]
    pad = -N % CHUNK
    chunks = [F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).transpose(2, 3) for t in (query, key, value)]
    query, key, value = chunks  # B n h T (F or V)
    inside = (query @ key.transpose(-1, -2)).tril() @ value
    states = key.transpose(-1, -2) @ value  # B n h F V
    before = F.pad(states.cumsum(1)[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return (inside + query @ before).transpose(2, 3).flatten(1, 2)[:, :N]


def mix_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: str,
    scale: float,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    key_weights: Tensor | None,
) -> Tensor:
    """Causal linear attention of features; arguments as in ``mix``, with the normalizers "sum" and "none"."""
    if key_weights is not None:
        key = key * key_weights[..., None]
    total = (query * key.cumsum(1)).sum(-1, keepdim=True)
    if rotary is not None:
        query, key = rotate_pairs(query, *rotary), rotate_pairs(key, *rotary)
    factor, _ = coefficients(total, value.shape[1], normalizer, scale, eps)
    return causal_sums(query, key, value) * factor
