"""Causal linear attention in chunks: quadratic inside a chunk, a running state between them.

Shapes: B batch, N positions, h heads, F features, V width of a value, T chunk.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.linear_attn.forms import coefficients
from visionattn.kernels.linear_attn.rotation import rotate_pairs

CHUNK = 64


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, N, h, F] to [B, n, h, chunk, F], with zeros after the end."""
    pad = -x.shape[1] % chunk
    return F.pad(x, [0, 0, 0, 0, 0, pad]).unflatten(1, [-1, chunk]).transpose(2, 3)


def causal_sums(query: Tensor, key: Tensor, value: Tensor, chunk: int = CHUNK) -> Tensor:
    """``sum_{j <= i} (query_i . key_j) value_j`` for every i; memory grows with N * F * V / chunk.

    Args:
        query: [B, N, h, F]
        key: [B, N, h, F]
        value: [B, N, h, V]
        chunk: Positions that see each other directly.
    """
    N = query.shape[1]
    query, key, value = _chunks(query, chunk), _chunks(key, chunk), _chunks(value, chunk)
    inside = (query @ key.transpose(-1, -2)).tril() @ value
    states = key.transpose(-1, -2) @ value  # B n h F V
    before = F.pad(states.cumsum(1)[:, :-1], [0, 0, 0, 0, 0, 0, 1, 0])
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
