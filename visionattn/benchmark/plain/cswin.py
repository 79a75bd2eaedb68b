"""Cross-shaped attention and CSwin as their authors compose them: stripes copied out, logits stored (arXiv 2107.00652).

The baseline that the library's are measured against. Parameter names are the library's for the layer, those of the
published checkpoints for the network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["PlainCSwin", "PlainCrossShaped", "build"]

# channels, depths, heads, and the image size with the width of stripes that goes with it
TINY = (64, (1, 2, 21, 1), (2, 4, 8, 16))
SMALL = (64, (2, 4, 32, 2), (2, 4, 8, 16))
BASE = (96, (2, 4, 32, 2), (4, 8, 16, 32))
LARGE = (144, (2, 4, 32, 2), (6, 12, 24, 24))
SIZES = {224: (1, 2, 7, 7), 384: (1, 2, 12, 12)}


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


def _cross(qkv: Tensor, branches: nn.ModuleList, size: tuple[int, int]) -> Tensor:
    """Every branch on its share of the channels. [B, N, 3 * C] to [B, N, C]"""
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    qkv, share = qkv.reshape(B, N, 3, C).permute(2, 0, 1, 3), C // len(branches)
    return torch.cat([branch(*qkv[..., i * share : (i + 1) * share], size) for i, branch in enumerate(branches)], -1)


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
        return self.proj(_cross(self.qkv(x), self.branches, self.size))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, split: int) -> None:
        super().__init__()
        self.side = side
        whole = side == split
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        shapes = [(side, side)] if whole else [(side, split), (split, side)]
        self.attns = nn.ModuleList([_Stripes(dim // len(shapes), heads // len(shapes), shape) for shape in shapes])
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(_cross(self.qkv(self.norm1(x)), self.attns, (self.side, self.side)))
        return x + self.mlp(self.norm2(x))


class _Merge(nn.Module):
    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(-2, -1).contiguous().view(x.shape[0], -1, self.side, self.side)
        return self.norm(self.conv(x).flatten(2).transpose(-2, -1).contiguous())


class PlainCSwin(nn.Module):
    """The network for one size of images; no stochastic depth."""

    def __init__(self, dim: int, depths: Sequence[int], num_heads: Sequence[int], img_size: int) -> None:
        super().__init__()
        self.stage1_conv_embed = nn.ModuleDict({"0": nn.Conv2d(3, dim, 7, stride=4, padding=2), "2": nn.LayerNorm(dim)})
        side, self.stages = img_size // 4, len(depths)
        for i, (depth, heads, split) in enumerate(zip(depths, num_heads, SIZES[img_size], strict=True), 1):
            blocks = (_Block(dim, heads, side, split) for _ in range(depth))
            setattr(self, f"stage{i}", nn.Sequential(*blocks))
            if i < self.stages:
                setattr(self, f"merge{i}", _Merge(dim, side))
                dim, side = 2 * dim, side // 2
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits [B, 1000]."""
        x = self.stage1_conv_embed["0"](x).flatten(2).transpose(1, 2)
        x = self.stage1_conv_embed["2"](x)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"stage{i}")(x)
            if i < self.stages:
                x = getattr(self, f"merge{i}")(x)
        return self.head(self.norm(x).mean(1))


def build(name: str) -> PlainCSwin:
    """The plain network of a registered model, freshly initialised."""
    _, kind, size = name.split("_")
    return PlainCSwin(*{"tiny": TINY, "small": SMALL, "base": BASE, "large": LARGE}[kind], int(size))
