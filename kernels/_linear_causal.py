"""Causal linear attention in chunks: quadratic inside a chunk, a running state between them.

Shapes: B batch, N positions, h heads, F features, V width of a value, T chunk.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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


def causal_numerators(query: Tensor, key: Tensor, value: Tensor, plain_query: Tensor, plain_key: Tensor):
    """The weighted sums of values up to every position, and what normalises them. [B, N, h, V] and [B, N, h, 1]

    Args:
        query: Rotated features of the queries. [B, N, h, F]
        key: Rotated and weighted features of the keys. [B, N, h, F]
        value: [B, N, h, V]
        plain_query: ``query`` before the rotation.
        plain_key: ``key`` before the rotation.
    """
    total = (plain_query * plain_key.cumsum(1)).sum(-1, keepdim=True)
    return causal_sums(query, key, value), total
