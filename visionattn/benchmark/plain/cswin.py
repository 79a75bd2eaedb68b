"""Cross-shaped attention as its authors compose it: stripes copied out, logits stored (arXiv 2107.00652).

The baseline that the library's layer is measured against. Parameter names are those of the library.
"""

import torch
from torch import Tensor, nn

__all__ = ["PlainCrossShaped"]


class _Stripes(nn.Module):
    def __init__(self, dim: int, heads: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.shape, self.scale = heads, shape, (dim // heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def _windows(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, N, C] to stripes [B', C, h, w]"""
        B, _, C = x.shape
        (H, W), (h, w) = size, self.shape
        x = x.transpose(-2, -1).contiguous().view(B, C, H // h, h, W // w, w)
        return x.permute(0, 2, 4, 1, 3, 5).contiguous().reshape(-1, C, h, w)

    def _split(self, x: Tensor) -> Tensor:
        C = x.shape[1]
        return x.reshape(-1, self.heads, C // self.heads, x.shape[2] * x.shape[3]).transpose(-2, -1).contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = q.shape
        (H, W), (h, w) = size, self.shape
        q, k = self._split(self._windows(q, size)), self._split(self._windows(k, size))
        v = self._windows(v, size)
        lepe, v = self._split(self.get_v(v)), self._split(v)
        x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v + lepe
        x = x.transpose(1, 2).reshape(B, H // h, W // w, h, w, C)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, N, C)


class PlainCrossShaped(nn.Module):
    """Two branches of stripes ``split`` wide and their projections, on [B, H * W, dim]."""

    def __init__(self, dim: int, heads: int, size: tuple[int, int], split: int) -> None:
        super().__init__()
        self.size = size
        self.qkv = nn.Linear(dim, 3 * dim)
        shapes = (size[0], split), (split, size[1])
        self.branches = nn.ModuleList([_Stripes(dim // 2, heads // 2, shape) for shape in shapes])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3)
        parts = [b(*qkv[..., i * C // 2 : (i + 1) * C // 2], self.size) for i, b in enumerate(self.branches)]
        return self.proj(torch.cat(parts, -1))
