"""VAN as its authors compose it: torch modules one after the other, contiguous NCHW maps, nothing fused.

The baseline that the library's VAN is measured against, and a second opinion on its outputs. Parameter names are those
of the published checkpoints (arXiv 2202.09741), which the library's ``checkpoint_filter_fn`` reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["PlainVAN", "build"]

# channels, depths, MLP ratios of the four stages
VARIANTS = {
    "van_b0": ((32, 64, 160, 256), (3, 3, 5, 2), (8, 8, 4, 4)),
    "van_b1": ((64, 128, 320, 512), (2, 2, 4, 2), (8, 8, 4, 4)),
    "van_b2": ((64, 128, 320, 512), (3, 3, 12, 3), (8, 8, 4, 4)),
    "van_b3": ((64, 128, 320, 512), (3, 5, 27, 3), (8, 8, 4, 4)),
    "van_b4": ((64, 128, 320, 512), (3, 6, 40, 3), (8, 8, 4, 4)),
    "van_b5": ((96, 192, 480, 768), (3, 3, 24, 3), (8, 8, 4, 4)),
    "van_b6": ((96, 192, 384, 768), (6, 6, 90, 6), (8, 8, 4, 4)),
}


class _LKA(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, u: Tensor) -> Tensor:
        return u * self.conv1(self.conv_spatial(self.conv0(u)))


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = _LKA(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x)))) + x


class _DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = _DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class _Block(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = _Attention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class PlainVAN(nn.Module):
    """The network by stages; no stochastic depth and no dropout, as the constructors of the release default to.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratios: Hidden over outer width of each stage's MLPs.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.num_stages = len(depths)
        for i, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True), start=1):
            source, kernel, stride = (in_chans, 7, 4) if i == 1 else (embed_dims[i - 2], 3, 2)
            setattr(self, f"patch_embed{i}", _PatchEmbed(source, dim, kernel, stride))
            setattr(self, f"block{i}", nn.ModuleList(_Block(dim, ratio) for _ in range(depth)))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(embed_dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x)
            B, C, H, W = x.shape
            x = x.flatten(2).transpose(1, 2)  # B HW C
            x = getattr(self, f"norm{i}")(x)
            if i < self.num_stages:
                x = x.reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()
        return self.head(x.mean(dim=1))


def build(name: str) -> PlainVAN:
    """The plain network of a registered VAN, freshly initialised."""
    if name not in VARIANTS:
        raise ValueError(f"no plain network for {name!r}; there is one for {', '.join(VARIANTS)}")
    return PlainVAN(*VARIANTS[name])
