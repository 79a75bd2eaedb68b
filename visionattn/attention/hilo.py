"""HiLo attention: some heads look inside small windows, the others at an average-pooled map.

Shapes: B batch, H W rows and columns, s window side, h high-frequency and l low-frequency heads, D head dim.
"""

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from visionattn.kernels import attend
from visionattn.layers.blocks import Linear, crop, pad_to_multiple
from visionattn.layers.checks import check_heads, check_map, declared
from visionattn.layers.tracing import opaque

__all__ = ["HiLoAttention", "hilo_attention"]


def hilo_attention(
    high: Tensor | None, low_q: Tensor | None, low_kv: Tensor | None, window_size: int, scale: float | None = None
) -> Tensor:
    """HiLo attention of projected tokens (arXiv 2205.13213): both halves beside each other on the axis of the heads.

    Args:
        high: Queries, keys and values of the heads that attend inside windows, row by row from the first; None for no
            such heads. [B, H, W, 3, h, D]
        low_q: Queries of the heads that attend to the pooled map; None for no such heads. [B, H, W, l, D]
        low_kv: Keys and values of its M positions. [B, M, 2, l, D]
        window_size: Side of the windows; it divides H and W.
        scale: Factor of the logits; None stands for D ** -0.5.

    Returns:
        The high-frequency heads, then the low-frequency ones. [B, H, W, h + l, D]

    Raises:
        ValueError: If both halves are missing, or shapes and window do not fit together.
    """
    _check(high, low_q, low_kv, window_size)
    some = low_q if high is None else high
    scale = some.shape[-1] ** -0.5 if scale is None else scale
    parts = [] if high is None else [_in_windows(high, window_size, scale, True)]
    if low_q is not None and low_kv is not None:
        parts.append(_to_pooled(low_q, low_kv, scale, True))
    return torch.cat(parts, 3)


def _check(high: Tensor | None, low_q: Tensor | None, low_kv: Tensor | None, window_size: int) -> None:
    if high is None and low_q is None:
        raise ValueError("high or low_q must be given, got None for both")
    if (low_q is None) != (low_kv is None):
        raise ValueError("low_q and low_kv belong together, got one of them")
    if high is not None:
        if high.dim() != 6 or high.shape[3] != 3:
            raise ValueError(f"high must be [B, H, W, 3, h, D], got shape {tuple(high.shape)}")
        B, H, W, _, _, D = high.shape
        if window_size < 1 or H % window_size or W % window_size:
            raise ValueError(
                f"window_size must be at least 1 and divide H and W of high, {H} and {W}, got {window_size}"
            )
    if low_q is not None:
        if low_q.dim() != 5:
            raise ValueError(f"low_q must be [B, H, W, l, D], got shape {tuple(low_q.shape)}")
        if high is not None and (*low_q.shape[:3], low_q.shape[4]) != (B, H, W, D):
            raise ValueError(f"low_q must have B, H, W and D of high, {(B, H, W, D)}, got shape {tuple(low_q.shape)}")
        B, H, W, heads, D = low_q.shape
        if low_kv.dim() != 5 or (low_kv.shape[0], *low_kv.shape[2:]) != (B, 2, heads, D):
            expected = f"[{B}, M, 2, {heads}, {D}]"
            raise ValueError(f"low_kv must be {expected} to go with low_q, got shape {tuple(low_kv.shape)}")


def _in_windows(qkv: Tensor, s: int, scale: float, fused: bool) -> Tensor:
    """[B, H, W, 3, h, D] -> [B, H, W, h, D]"""
    B, H, W, _, h, D = qkv.shape
    rows, columns = H // s, W // s
    # One copy brings each window's tokens together. The windows join the heads, not the batch: GPU kernels of attention
    # launch at most 65535 samples, fewer than a batch of large images has windows.
    qkv = qkv.reshape(B, rows, s, columns, s, 3, h, D).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = qkv.reshape(3, B, rows * columns * h, s * s, D).unbind(0)
    out = _attend(q, k, v, scale, fused).reshape(B, rows, columns, h, s, s, D)
    # In two steps, since exporters cannot tell that rows and s may be merged into H for any H.
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 4).reshape(B, H, W, h, D)


def _to_pooled(q: Tensor, kv: Tensor, scale: float, fused: bool) -> Tensor:
    """[B, H, W, l, D], [B, M, 2, l, D] -> [B, H, W, l, D]; every operand is a view."""
    k, v = kv.unbind(2)
    out = _attend(q.flatten(1, 2).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, fused)
    return out.transpose(1, 2).reshape(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> Tensor:
    if fused:
        return attend(q, k, v, None, scale)
    return ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v


@opaque  # whether the map is padded depends on its size
@declared
class HiLoAttention(nn.Module):
    """Attention with ``int(num_heads * alpha)`` heads on a pooled map and the others in windows (arXiv 2205.13213).

    Queries of the low-frequency heads come from every position, their keys and values from the map averaged over
    ``window_size`` x ``window_size`` cells. Each half has its own output projection; nothing mixes the two.

    Args:
        dim: Channels of the map. [B, H, W, dim] in and out, any size: a map that is no multiple of the window is padded
            with zeros at the bottom and right, which are attended to like any position.
        num_heads: Attention heads; they divide ``dim``.
        window_size: Side of windows and pooling cells. With 1 all heads attend to all positions, whatever ``alpha``.
        alpha: Share of low-frequency heads, 0 to 1.
        qkv_bias: Whether the projections to queries, keys and values have a bias.

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 2,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        self.fused_attn = use_fused_attn()
        self.window_size = window_size
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        self.l_q = self.l_kv = self.l_proj = self.h_qkv = self.h_proj = None
        if low:
            self.l_q = Linear(dim, low, bias=qkv_bias, **dd)
            self.l_kv = Linear(dim, 2 * low, bias=qkv_bias, **dd)
            self.l_proj = Linear(low, low, **dd)
        if high:
            self.h_qkv = Linear(dim, 3 * high, bias=qkv_bias, **dd)
            self.h_proj = Linear(high, high, **dd)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, high_heads={self.high_heads}, low_heads={self.low_heads}"

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        H, W = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.window_size)
        if self.h_qkv is None:
            y = self._low(x)
        elif self.l_q is None:
            y = self._high(x)
        else:
            y = torch.cat([self._high(x), self._low(x)], 3)
        return crop(y, H, W)

    def _high(self, x: Tensor) -> Tensor:
        qkv = self.h_qkv(x).unflatten(-1, [3, self.high_heads, self.head_dim])
        return self.h_proj(_in_windows(qkv, self.window_size, self.scale, self.fused_attn).flatten(-2))

    def _low(self, x: Tensor) -> Tensor:
        q = self.l_q(x).unflatten(-1, [self.low_heads, self.head_dim])
        if self.window_size > 1:  # pooling in channels_last is a view away
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        kv = self.l_kv(x).unflatten(-1, [2, self.low_heads, self.head_dim]).flatten(1, 2)
        return self.l_proj(_to_pooled(q, kv, self.scale, self.fused_attn).flatten(-2))
