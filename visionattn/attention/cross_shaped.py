"""Attention of CSwin within stripes. B batch, H rows, W columns, C channels, h heads, D head dim, T tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.mixer import Mixer, unknown_size
from visionattn.kernels import attend
from visionattn.layers.blocks import DepthwiseConv
from visionattn.layers.checks import declared
from visionattn.layers.tracing import opaque

__all__ = ["CrossShapedAttention"]


@declared
class StripeAttention(nn.Module):
    """Softmax attention and a depthwise 3x3 convolution of the values within stripes of a map.

    Args:
        dim: Channels of the branch.
        head_dim: Channels of a head.
        height: Rows of a stripe; 0 for all of the map.
        width: Columns of a stripe; 0 for all of the map.
    """

    def __init__(self, dim: int, head_dim: int, height: int = 0, width: int = 0, device=None, dtype=None) -> None:
        super().__init__()
        self.head_dim, self.height, self.width = head_dim, height, width
        self.get_v = DepthwiseConv(dim, 3, device=device, dtype=dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values of a branch. [B, H, W, C] each"""
        B, H, W, C = q.shape
        h = self.height if self.height > 0 else H
        w = self.width if self.width > 0 else W
        mask: Tensor | None = None
        if unknown_size():  # a stripe too many at times, so that whether there is a padding is no question
            rows, columns = H // h + 1, W // w + 1
            padded = True
        else:
            rows, columns = (H + h - 1) // h, (W + w - 1) // w
            padded = rows * h != H or columns * w != W
        if padded:  # zeros are what the convolution sees around a stripe; attention must not see them
            pads = [0, 0, 0, columns * w - W, 0, rows * h - H]
            q, k, v = F.pad(q, pads), F.pad(k, pads), F.pad(v, pads)
            real_row = torch.arange(rows * h, device=q.device) < H
            real_column = torch.arange(columns * w, device=q.device) < W
            real = (real_row[:, None] & real_column)[None, :, :, None].expand(B, rows * h, columns * w, 1)
            mask = self._split(real, h, w).flatten(1, 2)[:, None, None, :, 0]  # B*n 1 1 T
        q, k, v = self._split(q, h, w), self._split(k, h, w), self._split(v, h, w)
        y = attend(self._heads(q), self._heads(k), self._heads(v), mask)
        y = y.transpose(1, 2).reshape(v.shape) + self.get_v(v)
        y = y.reshape(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)
        return y[:, :H, :W] if padded else y

    def _split(self, x: Tensor, h: int, w: int) -> Tensor:
        """[B, H, W, C] -> [B * n, h, w, C]"""
        B, H, W, C = x.shape
        return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(B * (H // h) * (W // w), h, w, C)

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(2, [-1, self.head_dim]).transpose(1, 2)


@opaque  # how many stripes there are depends on the size of the map
@declared
class CrossShapedAttention(Mixer):
    """Half of the heads attend within columns, half within rows, ``split_size`` wide (CSwin, arXiv 2107.00652).

    A depthwise 3x3 convolution of the values, which does not leave its stripe, is added. A last stripe is narrower
    where the width does not divide the map.

    Args:
        split_size: Width of the stripes; None for one branch of all heads that sees the whole map.
        host: Arguments of ``Mixer``, the residual stream and prefix tokens left out.

    Raises:
        ValueError: If ``split_size`` is not positive or ``num_heads`` odd with stripes.
    """

    short_name = "cross_shaped"

    def __init__(
        self, dim: int, num_heads: int, split_size: int | None = 7, *, device=None, dtype=None, **host
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, **host, **dd)
        if split_size is not None and split_size < 1:
            raise ValueError(f"split_size must be positive, got {split_size}")
        if split_size is not None and num_heads % 2:
            raise ValueError(f"num_heads must be even for two branches of stripes, got {num_heads}")
        shapes = [(0, 0)] if split_size is None else [(0, split_size), (split_size, 0)]
        width = dim // len(shapes)
        self.branches = nn.ModuleList([StripeAttention(width, self.head_dim, h, w, **dd) for h, w in shapes])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        q, k, v = q.unflatten(1, [H, W]), k.unflatten(1, [H, W]), v.unflatten(1, [H, W])
        parts: list[Tensor] = []
        half = q.shape[3] // len(self.branches)
        for i, branch in enumerate(self.branches):
            start = i * half
            parts.append(branch(q.narrow(3, start, half), k.narrow(3, start, half), v.narrow(3, start, half)))
        return torch.cat(parts, -1).flatten(1, 2)
