"""Polarity-aware linear attention of PolaFormer: positive and negative parts of queries and keys meet in all four ways.

Letters: B batch, N = P + H * W tokens, C channels, h heads, D head dim.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.focused import PositionedMixer
from visionattn.kernels import autocasting, linear_attention, precise
from visionattn.layers.blocks import Linear, in_slices
from visionattn.layers.norms import check_foldable, fold_before
from visionattn.layers.tracing import opaque

__all__ = ["PolarityAwareAttention"]


@opaque  # whether positions are resized depends on the size of the map
class PolarityAwareAttention(PositionedMixer):
    """``(pola(q, k, v) + dwc(v)) * gate(x)`` (PolaFormer, arXiv 2501.15061).

    With ``x+ = relu(x)^p``, ``x- = relu(-x)^p`` and a learned power p in (1, 5) for each head and channel, the first
    half of every value is mixed by ``q+ . k+ + q- . k-``, the second by ``q- . k+ + q+ . k-``, each over its sum.

    Args: those of ``Mixer``.

    Raises:
        ValueError: If the head dim is odd.
    """

    short_name = "pola"

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, device=None, dtype=None, **host) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **host, **dd)
        if self.head_dim % 2:
            raise ValueError(f"dim / num_heads must be even, as values are mixed by halves, got {dim} / {num_heads}")
        self.gate = Linear(dim, dim, bias=qkv_bias, **dd)
        self.temperature = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.power = nn.Parameter(torch.zeros(1, num_heads, 1, self.head_dim, **dd))

    def reset_parameters(self) -> None:
        """Positions and powers start at zero, a power of 3; the temperature at softplus(0)."""
        super().reset_parameters()
        if hasattr(self, "power"):
            nn.init.zeros_(self.temperature)
            nn.init.zeros_(self.power)

    def mixed(self, tokens: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._gated(tokens, H, W)
        else:
            return self._sliced(tokens, H, W)

    def _gated(self, tokens: Tensor, H: int, W: int) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.attend(q, k, v, H, W, tokens) * self.gate(tokens)

    @torch.jit.unused
    def _sliced(self, tokens: Tensor, H: int, W: int) -> Tensor:
        if self.num_prefix_tokens > 0:
            return self._gated(tokens, H, W)
        C = tokens.shape[2]
        return in_slices(self._map_gated, tokens.unflatten(1, [H, W]), 4 * C, C).flatten(1, 2)

    @torch.jit.unused
    def _map_gated(self, x: Tensor) -> Tensor:
        return self._gated(x.flatten(1, 2), x.shape[1], x.shape[2]).unflatten(1, x.shape[1:3])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        local = self.local(v, H, W).flatten(1, 2)
        if self.num_prefix_tokens > 0:
            local = F.pad(local, [0, 0, self.num_prefix_tokens, 0])
        k = k + self.positions(H, W)
        if torch.jit.is_scripting():
            return self._polarized(q, k, v).to(v.dtype) + local
        else:
            return self._in_full(q, k, v) + local

    @torch.jit.unused
    def _in_full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        off = torch.autocast(q.device.type, enabled=False) if autocasting(q) else contextlib.nullcontext()
        with off:
            if q.is_cuda and not self.exportable:
                return self._by_operator(q, k, v).to(v.dtype)
            return self._polarized(q, k, v).to(v.dtype)

    def polarities(self, x: Tensor) -> Tensor:
        """The features of queries or keys, ``[x+ | x-]`` of every head. [B, N, C] to [B, h, N, 2 * D]"""
        x = precise(x) / F.softplus(precise(self.temperature))
        x = x.unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        x = x.abs().pow(1 + 4 * precise(self.power).sigmoid()) * x.sign()
        return torch.cat([x, -x], -1).relu()

    def _polarized(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Both halves in one product: exchanging the signs of queries is exchanging the rows of what keys sum to."""
        D, N = self.head_dim, k.shape[1]
        query, key = self.polarities(q), self.polarities(k)
        value = precise(v).unflatten(-1, [self.num_heads, D]).transpose(1, 2)
        state = key.transpose(2, 3) @ value / N  # B h 2D D
        mean = key.mean(2).unsqueeze(-1)  # B h 2D 1
        same, opposite = state[..., : D // 2], state[..., D // 2 :].roll(D, 2)
        y = query @ torch.cat([same, opposite], -1)
        total = query @ torch.cat([mean, mean.roll(D, 2)], -1)  # B h N 2
        y = y.unflatten(-1, [2, D // 2]) / (total + self.eps).unsqueeze(-1)
        return y.flatten(3).transpose(1, 2).flatten(2)

    @torch.jit.unused
    def _by_operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same by an operator that holds no sums in memory, once for each half of the values."""
        query, key = self.polarities(q).transpose(1, 2), self.polarities(k).transpose(1, 2)
        value = precise(v).unflatten(-1, [self.num_heads, self.head_dim])
        parts = zip((key, key.roll(self.head_dim, -1)), value.chunk(2, -1), strict=True)
        halves = [linear_attention(query, k_, v_, "identity", "mean", eps=self.eps) for k_, v_ in parts]
        return torch.cat(halves, -1).flatten(2)

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        check_foldable(self.qkv, self.gate)
        super().fold_input(scale, shift)
        fold_before(self.gate, scale, shift)
