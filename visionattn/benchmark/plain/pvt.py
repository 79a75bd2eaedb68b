"""PVT as its authors compose it: tokens [B, N, C], logits of attention stored, maps copied out for the reduction.

The baseline that the library's PVT is measured against, and a second opinion on its outputs. Parameter names are those
of the published checkpoints (arXiv 2102.12122).
"""

import torch
from torch import Tensor, nn

__all__ = ["PlainPVT", "build"]

DEPTHS = {"pvt_tiny": (2, 2, 2, 2), "pvt_small": (3, 4, 6, 3), "pvt_medium": (3, 4, 18, 3), "pvt_large": (3, 8, 27, 3)}
EPS = 1e-6  # of the norms of blocks


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.ratio, self.scale = heads, ratio, (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, side: int) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.heads, -1).permute(0, 2, 1, 3)
        if self.ratio > 1:
            reduced = self.sr(x.permute(0, 2, 1).reshape(B, C, side, side))
            reduced = self.norm(reduced.reshape(B, C, -1).permute(0, 2, 1))
        else:
            reduced = x
        k, v = self.kv(reduced).reshape(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = _Attention(dim, heads, ratio)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, mlp_ratio * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor, side: int) -> Tensor:
        x = x + self.attn(self.norm1(x), side)
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, in_chans: int, dim: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, side, stride=side)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PlainPVT(nn.Module):
    """The network for images of 224 px; no stochastic depth."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        before, self.depth = 3, len(depths)
        sizes = zip((64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1), (56, 28, 14, 7), strict=True)
        for i, (dim, heads, mlp_ratio, ratio, side) in enumerate(sizes):
            last = i == self.depth - 1
            setattr(self, f"patch_embed{i + 1}", _Patches(before, dim, 2 if i else 4))
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(0.02 * torch.randn(1, side * side + last, dim)))
            blocks = (_Block(dim, heads, mlp_ratio, ratio) for _ in range(depths[i]))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            before = dim
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, before))
        self.norm = nn.LayerNorm(before, eps=EPS)
        self.head = nn.Linear(before, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 224, 224] to logits [B, 1000]."""
        for i, side in enumerate((56, 28, 14, 7), 1):
            x = getattr(self, f"patch_embed{i}")(x)
            if i == self.depth:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            x = x + getattr(self, f"pos_embed{i}")
            for block in getattr(self, f"block{i}"):
                x = block(x, side)
            if i < self.depth:
                x = x.transpose(1, 2).reshape(x.shape[0], -1, side, side).contiguous()
        return self.head(self.norm(x)[:, 0])


def build(name: str) -> PlainPVT:
    """The plain network of a registered model, freshly initialised."""
    return PlainPVT(DEPTHS[name])
