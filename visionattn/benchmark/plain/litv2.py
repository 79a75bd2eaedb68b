"""LITv2 as its authors compose it: tokens [B, H * W, C], explicit softmax, torchvision's deformable convolution.

The baseline that the library's LITv2 is measured against, and a second opinion on its outputs. Parameter names are
those of the published checkpoints (arXiv 2205.13213), which the library's ``checkpoint_filter_fn`` reads. Sizes that
windows or patches do not divide are padded as in the authors' detectors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

__all__ = ["PlainHiLo", "PlainLITv2", "PlainMerging", "build"]

# channels of the first stage, depths, heads, alpha
VARIANTS = {
    "litv2_small": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.9),
    "litv2_medium": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.9),
    "litv2_base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.9),
    "litv2_small_alpha00": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.0),
    "litv2_small_alpha02": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "litv2_small_alpha04": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.4),
    "litv2_small_alpha05": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.5),
    "litv2_small_alpha07": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.7),
    "litv2_small_alpha10": (96, (2, 2, 6, 2), (3, 6, 12, 24), 1.0),
}
Size = tuple[int, int]


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Zeros below and to the right of a map [B, H, W, C]."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


class PlainHiLo(nn.Module):
    """HiLo attention of tokens [B, H * W, dim], every step materialised.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        window_size: Side of windows and pooling cells.
        alpha: Share of low-frequency heads.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, alpha: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        low, high = dim // num_heads * self.l_heads, dim // num_heads * self.h_heads
        if low:
            self.l_q, self.l_kv, self.l_proj = nn.Linear(dim, low), nn.Linear(dim, 2 * low), nn.Linear(low, low)
        if high:
            self.h_qkv, self.h_proj = nn.Linear(dim, 3 * high), nn.Linear(high, high)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens of a map of this size to mixed tokens."""
        x = _pad(x.unflatten(1, size), self.window_size)
        halves = [self._high(x)] if self.h_heads else []
        halves += [self._low(x)] if self.l_heads else []
        return torch.cat(halves, -1)[:, : size[0], : size[1]].flatten(1, 2)

    def _high(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        s = self.window_size
        x = x.reshape(B, H // s, s, W // s, s, C).transpose(2, 3)
        qkv = self.h_qkv(x).reshape(B, H // s * (W // s), s * s, 3, self.h_heads, -1).permute(3, 0, 1, 4, 2, 5)
        y = _attend(qkv[0], qkv[1], qkv[2])  # B windows heads tokens D
        y = y.transpose(2, 3).reshape(B, H // s, W // s, s, s, -1).transpose(2, 3).reshape(B, H, W, -1)
        return self.h_proj(y)

    def _low(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        q = self.l_q(x).reshape(B, H * W, self.l_heads, -1).permute(0, 2, 1, 3)
        if self.window_size > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        kv = self.l_kv(x.reshape(B, -1, C)).reshape(B, -1, 2, self.l_heads, q.shape[-1]).permute(2, 0, 3, 1, 4)
        return self.l_proj(_attend(q, kv[0], kv[1]).transpose(1, 2).reshape(B, H, W, -1))


class _DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x.transpose(1, 2).unflatten(2, size).contiguous()
        return self.dwconv(x).flatten(2).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = _DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x), size)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: int, alpha: float) -> None:
        super().__init__()
        self.attn = PlainHiLo(dim, num_heads, window_size, alpha) if window_size else None
        self.norm1 = nn.LayerNorm(dim) if window_size else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        if self.attn is not None:
            x = x + self.attn(self.norm1(x), size)
        return x + self.mlp(self.norm2(x), size)


class _DeformableConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_offset = nn.Conv2d(dim, 8, 2, stride=2)
        conv = nn.Conv2d(dim, 2 * dim, 2)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        operands = (x, self.conv_offset(x), self.weight, self.bias)
        if x.dtype in (torch.bfloat16, torch.float16):  # as under the authors' mixed precision
            operands = (t.float() for t in operands)
        return deform_conv2d(*operands, stride=2)


class PlainMerging(nn.Module):
    """Deformable token merging of tokens [B, H * W, dim], to half the sides and twice the channels.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dconv = _DeformableConv(dim)
        self.norm_layer = nn.BatchNorm2d(2 * dim)
        self.act_layer = nn.GELU()

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Tokens of a map of this size to merged tokens and the size of their map."""
        x = x.transpose(1, 2).unflatten(2, size).contiguous()
        y = self.dconv(x).to(x.dtype)
        return self.act_layer(self.norm_layer(y)).flatten(2).transpose(1, 2), y.shape[2:]


class _Layer(nn.Module):
    def __init__(self, blocks: list[_Block], downsample: PlainMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class _PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        x = self.proj(_pad(x.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2).contiguous())
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:]


class PlainLITv2(nn.Module):
    """The network by layers; no stochastic depth and no dropout, as the constructors of the release default to.

    Args:
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        alpha: Share of low-frequency heads.
        window_size: Window of each stage's attention, 0 for none.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        alpha: float,
        window_size: Sequence[int] = (0, 0, 2, 1),
        in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(in_chans, embed_dim)
        self.layers = nn.ModuleList()
        for i, (depth, heads, window) in enumerate(zip(depths, num_heads, window_size, strict=True)):
            dim = embed_dim * 2**i
            blocks = [_Block(dim, heads, window, alpha) for _ in range(depth)]
            self.layers.append(_Layer(blocks, PlainMerging(dim) if i < len(depths) - 1 else None))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        x, size = self.patch_embed(x)
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x, size)
            if layer.downsample is not None:
                x, size = layer.downsample(x, size)
        return self.head(self.norm(x).mean(1))


def build(name: str) -> PlainLITv2:
    """The plain network of a registered LITv2, freshly initialised."""
    if name not in VARIANTS:
        raise ValueError(f"no plain network for {name!r}; there is one for {', '.join(VARIANTS)}")
    return PlainLITv2(*VARIANTS[name])
