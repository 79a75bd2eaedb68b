"""TransNeXt as its authors compose it without their extension: nine copies of keys and values unfolded.

The baseline that the library's TransNeXt is measured against, and a second opinion on its outputs. Parameter names are
those of the published checkpoints (arXiv 2311.17132).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainTransNeXt", "build"]

# channels and depths
VARIANTS = {
    "transnext_micro": ((48, 96, 192, 384), (2, 2, 15, 2)),
    "transnext_tiny": ((72, 144, 288, 576), (2, 2, 15, 2)),
    "transnext_small": ((72, 144, 288, 576), (5, 5, 22, 5)),
    "transnext_base": ((96, 192, 384, 768), (5, 5, 23, 5)),
}
EPS = 1e-6
WIDTH = 24  # of a head


def _positions(side: int, pooled: int) -> tuple[Tensor, Tensor]:
    """The different distances [U, 2] and which of them each pair of query and key has [N * P]."""
    line = torch.arange(side).float()
    keys = F.adaptive_avg_pool1d(line[None, None], pooled).flatten()
    places = [torch.stack(torch.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2) for t in (line, keys)]
    delta = (places[0][:, None] - places[1]) / (side - 1) * 8
    delta = delta.sign() * torch.log2(delta.abs() + 1) / math.log2(8)
    return torch.unique(delta.reshape(-1, 2), dim=0, return_inverse=True)


class _Cosine(nn.Module):
    def __init__(self, dim: int, side: int, pooled: int) -> None:
        super().__init__()
        self.heads, self.side, self.pooled = dim // WIDTH, side, pooled
        self.temperature = nn.Parameter(torch.full((self.heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(0.02 * torch.randn(self.heads, 1, WIDTH))
        self.proj = nn.Linear(dim, dim)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, self.heads)
        table, index = _positions(side, pooled)
        self.register_buffer("relative_coords_table", table, persistent=False)
        self.register_buffer("relative_pos_index", index, persistent=False)

    def bias(self) -> Tensor:
        table = self.cpb_fc2(F.relu(self.cpb_fc1(self.relative_coords_table))).transpose(0, 1)
        return table[:, self.relative_pos_index].view(self.heads, self.side**2, self.pooled**2)


class _Attention(_Cosine):
    def __init__(self, dim: int, side: int) -> None:
        super().__init__(dim, side, side)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3 * self.heads, WIDTH).permute(0, 2, 1, 3).chunk(3, 1)
        q = (F.normalize(q, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * math.log(N)
        attn = (q @ F.normalize(k, dim=-1).transpose(-2, -1) + self.bias()).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class _Aggregated(_Cosine):
    def __init__(self, dim: int, side: int, ratio: int) -> None:
        super().__init__(dim, side, side // ratio)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(0.0004 * torch.randn(self.heads, 9))
        self.learnable_tokens = nn.Parameter(0.02 * torch.randn(self.heads, WIDTH, 9))
        self.learnable_bias = nn.Parameter(torch.zeros(self.heads, 1, 9))
        outside = F.unfold(torch.ones(1, 1, side, side), 3, padding=1)[0].t() == 0  # N 9
        self.register_buffer("padding_mask", outside, persistent=False)
        scale = torch.log((~outside).sum(-1, keepdim=True) + float(self.pooled**2))
        self.register_buffer("seq_length_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        h, s = self.heads, self.side
        q = F.normalize(self.q(x).reshape(B, N, h, WIDTH).permute(0, 2, 1, 3), dim=-1)
        scaled = (q + self.query_embedding) * F.softplus(self.temperature) * self.seq_length_scale
        k, v = self.kv(x).chunk(2, -1)
        k = F.normalize(k.reshape(B, N, h, WIDTH), dim=-1).reshape(B, N, -1)
        kv = torch.cat([k, v], -1).permute(0, 2, 1).reshape(B, -1, s, s)
        k, v = F.unfold(kv, 3, padding=1).reshape(B, 2 * h, WIDTH, 9, N).permute(0, 1, 4, 2, 3).chunk(2, 1)
        near = (scaled.unsqueeze(-2) @ k).squeeze(-2) + self.relative_pos_bias_local.unsqueeze(1)
        near = near.masked_fill(self.padding_mask, float("-inf"))  # B h N 9
        pooled = self.sr(x.permute(0, 2, 1).reshape(B, -1, s, s))
        pooled = F.adaptive_avg_pool2d(F.gelu(pooled), self.pooled).reshape(B, C, -1).permute(0, 2, 1)
        kv = self.kv(self.norm(pooled)).reshape(B, -1, 2 * h, WIDTH).permute(0, 2, 1, 3)
        pooled_k, pooled_v = kv.chunk(2, 1)
        far = scaled @ F.normalize(pooled_k, dim=-1).transpose(-2, -1) + self.bias()
        near, far = torch.cat([near, far], -1).softmax(-1).split([9, self.pooled**2], -1)
        local = q @ self.learnable_tokens + self.learnable_bias + near
        x = (local.unsqueeze(-2) @ v.transpose(-2, -1)).squeeze(-2) + far @ pooled_v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class _Depthwise(nn.Module):
    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        x = self.dwconv(x.transpose(1, 2).view(B, C, self.side, self.side).contiguous())
        return x.flatten(2).transpose(1, 2)


class _ConvGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, side: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = _Depthwise(hidden, side)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(self.dwconv(x)) * gate)


class _Block(nn.Module):
    def __init__(self, dim: int, side: int, ratio: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = _Aggregated(dim, side, ratio) if ratio > 1 else _Attention(dim, side)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = _ConvGLU(dim, hidden, side)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, in_chans: int, dim: int, side: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, side, stride=stride, padding=side // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PlainTransNeXt(nn.Module):
    """The network for images of 224 px; no stochastic depth."""

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        before, self.sides = 3, (56, 28, 14, 7)
        for i, (dim, depth, ratio, mlp) in enumerate(zip(dims, depths, (8, 4, 2, 1), (8, 8, 4, 4), strict=True), 1):
            hidden = int(2 * (mlp * dim) / 3)
            embed = _Patches(before, dim, 7, 4) if i == 1 else _Patches(before, dim, 3, 2)
            setattr(self, f"patch_embed{i}", embed)
            blocks = (_Block(dim, self.sides[i - 1], ratio, hidden) for _ in range(depth))
            setattr(self, f"block{i}", nn.ModuleList(blocks))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=EPS))
            before = dim
        self.head = nn.Linear(before, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 224, 224] to logits [B, 1000]."""
        for i, side in enumerate(self.sides, 1):
            x = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x)
            x = getattr(self, f"norm{i}")(x)
            if i < len(self.sides):
                x = x.reshape(x.shape[0], side, side, -1).permute(0, 3, 1, 2).contiguous()
        return self.head(x.mean(1))


def build(name: str) -> PlainTransNeXt:
    """The plain network of a registered model for 224 px, freshly initialised."""
    if name not in VARIANTS:
        raise ValueError(f"no plain network for {name!r}; there is one for {', '.join(VARIANTS)}")
    return PlainTransNeXt(*VARIANTS[name])
