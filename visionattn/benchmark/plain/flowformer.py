"""Flowformer as its authors compose it: tokens [B, N, C], heads split by permutation, every step on its own.

The baseline that the library's Flowformer is measured against, and a second opinion on its outputs. Parameter names are
those of the published checkpoint (arXiv 2202.06258), which the library's ``checkpoint_filter_fn`` reads.
"""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

__all__ = ["PlainFlowformer", "build", "plain_flow_attention"]

# channels and depths of the four stages
VARIANTS = {"flowformer": ((96, 192, 384, 768), (3, 3, 10, 3))}
EPS = 1e-6


def plain_flow_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Flow attention of a fused projection as the authors write it. [B, N, 3 * C] to [B, N, C]"""
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(B, N, 3, num_heads, C // num_heads).permute(2, 0, 3, 1, 4)
    q, k = torch.sigmoid(q), torch.sigmoid(k)  # B h N D
    sink_in = 1 / (torch.sum((q + EPS) * (k.sum(2, keepdim=True) + EPS), 3) + EPS)
    source_out = 1 / (torch.sum((k + EPS) * (q.sum(2, keepdim=True) + EPS), 3) + EPS)
    sink = torch.sum((q + EPS) * ((k * source_out[..., None]).sum(2, keepdim=True) + EPS), 3) + EPS
    source = torch.sum((k + EPS) * ((q * sink_in[..., None]).sum(2, keepdim=True) + EPS), 3) + EPS
    competition = torch.softmax(source.clamp(-1, 1), -1) * N
    x = q @ (k.transpose(2, 3) @ (v * competition[..., None]))
    x = x * sink_in[..., None] * torch.sigmoid(sink)[..., None]
    return x.transpose(1, 2).reshape(B, N, C)


class _FlowAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 12) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(plain_flow_attention(self.qkv(x), self.num_heads))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = _FlowAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = _Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(1e-5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.gamma * self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PlainFlowformer(nn.Module):
    """The classifier without options: RGB images, 1,000 classes."""

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        widths = (3, *dims)
        self.patch_embed = nn.ModuleList(_PatchEmbed(widths[i], widths[i + 1], 2 if i else 4) for i in range(len(dims)))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 56 * 56, dims[0]))
        self.blocks = nn.ModuleList(
            nn.ModuleList(_Block(dim) for _ in range(depth)) for dim, depth in zip(dims, depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for i, (embed, blocks) in enumerate(zip(self.patch_embed, self.blocks, strict=True)):
            x = embed(x)
            side = x.shape[2:]
            x = x.flatten(2).transpose(1, 2)
            if i == 0:
                x = x + resample_abs_pos_embed(self.pos_embed, list(side), num_prefix_tokens=0)
            for block in blocks:
                x = block(x)
            if i < len(self.blocks) - 1:
                x = x.transpose(1, 2).unflatten(2, side)
        return self.head(self.norm(x).mean(1))


def build(name: str) -> PlainFlowformer:
    """The plain network of a registered model, with freshly initialised weights."""
    return PlainFlowformer(*VARIANTS[name])
