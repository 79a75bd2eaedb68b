"""Attention of PVT to a map reduced by a strided convolution. B batch, H rows, W columns, C channels."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import attend
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import check_heads, check_map, declared
from visionattn.layers.norms import check_foldable, fold_before, fold_into
from visionattn.layers.tracing import opaque

__all__ = ["SpatialReductionAttention"]


@opaque  # whether it pads depends on the size of the map
@declared
class SpatialReductionAttention(nn.Module):
    """Softmax attention of every position to squares of ``sr_ratio`` positions a side (PVT, arXiv 2102.12122).

    A remainder of the map that fills no square is left out; a map smaller than a square is padded with its border.

    Args:
        dim: Channels. [B, H, W, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        sr_ratio: Side of a square; 1 for attention to the map itself.
        norm: Makes a norm of a number of channels, for the reduced map.
        qkv_bias: Whether the projections to queries, keys and values have a bias.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim`` or ``sr_ratio`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else nn.Identity()
        self.norm = norm(dim, **dd) if sr_ratio > 1 else nn.Identity()
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        B, H, W, C = x.shape
        h = self.num_heads
        q = self.q(x).flatten(1, 2).unflatten(-1, [h, -1]).transpose(1, 2)
        reduced = x
        if self.sr_ratio > 1:
            maps = x.permute(0, 3, 1, 2)
            down, right = max(self.sr_ratio - H, 0), max(self.sr_ratio - W, 0)
            if down + right > 0:
                maps = F.pad(maps, [0, right, 0, down], mode="replicate")
            reduced = self.norm(self.sr(maps).permute(0, 2, 3, 1))
        k, v = self.kv(reduced.flatten(1, 2)).unflatten(-1, [2, h, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        y = attend(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(x.shape))

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        """Take over an affine map of the input, ``x * scale + shift`` per channel, and that of the inner norm."""
        source = self.kv if self.sr_ratio == 1 else self.sr
        check_foldable(self.q, source)
        fold_before(self.q, scale, shift)
        fold_before(source, scale, shift)
        self.norm = fold_into(self.norm, partial(fold_before, self.kv))
