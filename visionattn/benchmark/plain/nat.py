"""NAT and DiNAT as one composes them without natten: torch modules one after the other, every query's keys gathered.

The baseline that the library's NAT is measured against, and a second opinion on its outputs. Parameter names are those
of the published checkpoints (arXiv 2204.07143, 2209.15001), which the library's ``checkpoint_filter_fn`` reads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainNAT", "build"]

# width, depths, MLP ratio, layer scale
SIZES = {
    "mini": (64, (3, 4, 6, 5), 3.0, False),
    "tiny": (64, (3, 4, 18, 5), 3.0, False),
    "small": (96, (3, 4, 18, 5), 2.0, True),
    "base": (128, (3, 4, 18, 5), 2.0, True),
}
DILATIONS = ((1, 8), (1, 4), (1, 2), (1, 1))
EPS = 1e-5


def _axis(length: int, window: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Keys of every query of an axis, and their index in the bias. [L, K] both"""
    keys, index = [], []
    for i in range(length):
        group = range(i % dilation, length, dilation)
        rank = i // dilation
        start = min(max(rank - window // 2, 0), len(group) - window)
        keys.append([group[start + j] for j in range(window)])
        index.append([start + j - rank + window - 1 for j in range(window)])
    return torch.tensor(keys), torch.tensor(index)


class _Attention(nn.Module):
    def __init__(self, dim: int, window: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.window, self.dilation = dim // 32, window, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(0.02 * torch.randn(self.heads, 2 * window - 1, 2 * window - 1))
        self.proj = nn.Linear(dim, dim)
        self.indices: dict[tuple, tuple[Tensor, Tensor]] = {}

    def _indices(self, H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Flat keys and flat bias indices of every query, made once for each size. [H * W, K * K] both"""
        if (H, W, device) not in self.indices:
            (rows, by_row), (columns, by_column) = (_axis(L, self.window, self.dilation) for L in (H, W))
            keys = rows[:, None, :, None] * W + columns[None, :, None, :]
            index = by_row[:, None, :, None] * (2 * self.window - 1) + by_column[None, :, None, :]
            shape = (H * W, self.window**2)
            self.indices[H, W, device] = keys.reshape(shape).to(device), index.reshape(shape).to(device)
        return self.indices[H, W, device]

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        least = self.window * self.dilation
        x = F.pad(x, (0, 0, 0, max(least - W, 0), 0, max(least - H, 0)))
        keys, index = self._indices(x.shape[1], x.shape[2], x.device)
        qkv = self.qkv(x).reshape(B, -1, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 32**-0.5, qkv[1][:, :, keys], qkv[2][:, :, keys]  # B h N D, B h N S D
        logits = (q[:, :, :, None] @ k.transpose(-2, -1)).squeeze(3) + self.rpb.flatten(1)[:, index]
        y = (logits.softmax(-1)[:, :, :, None] @ v).squeeze(3)
        y = y.permute(0, 2, 1, 3).reshape(x.shape)[:, :H, :W]
        return self.proj(y)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, ratio: float, scaled: bool, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = _Attention(dim, 7, dilation)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = _Mlp(dim, int(dim * ratio))
        self.scaled = scaled
        if scaled:
            self.gamma1 = nn.Parameter(torch.full((dim,), 1e-5))
            self.gamma2 = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attn(self.norm1(x))
        x = x + (self.gamma1 * attended if self.scaled else attended)
        mixed = self.mlp(self.norm2(x))
        return x + (self.gamma2 * mixed if self.scaled else mixed)


class _Convolutions(nn.Module):
    """Strided 3x3 convolutions of an NCHW copy of the map, back to NHWC, layer norm."""

    def __init__(self, name: str, *convolutions: nn.Module) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Sequential(*convolutions) if len(convolutions) > 1 else convolutions[0])
        self.norm = nn.LayerNorm(convolutions[-1].out_channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(getattr(self, self.name)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class _Level(nn.Module):
    def __init__(self, dim: int, depth: int, ratio: float, scaled: bool, dilations: Sequence[int], last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, ratio, scaled, dilations[i % 2]) for i in range(depth))
        self.downsample = None
        if not last:
            reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
            self.downsample = _Convolutions("reduction", reduction)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PlainNAT(nn.Module):
    """The network by levels, maps [B, H, W, C] between them; no stochastic depth and no dropout.

    Args:
        dim: Channels of the first level.
        depths: Blocks of each level.
        ratio: Hidden over outer width of the MLPs.
        scaled: Whether residual branches have a layer scale.
        dilations: Of the even and odd blocks of each level.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        ratio: float,
        scaled: bool,
        dilations: Sequence[Sequence[int]] = ((1, 1),) * 4,
        in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        stem = (nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((in_chans, dim // 2), (dim // 2, dim)))
        self.patch_embed = _Convolutions("proj", *stem)
        self.levels = nn.ModuleList(
            _Level(dim * 2**i, depth, ratio, scaled, dilations[i], i == len(depths) - 1)
            for i, depth in enumerate(depths)
        )
        width = dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        for level in self.levels:
            x = level(x)
        return self.head(self.norm(x).mean((1, 2)))


def build(name: str) -> PlainNAT:
    """The plain network of a registered NAT or DiNAT, freshly initialised."""
    family, _, size = name.partition("_")
    if family not in ("nat", "dinat") or size not in SIZES:
        raise ValueError(f"no plain network for {name!r}; there is one for nat and dinat in {', '.join(SIZES)}")
    dim, depths, ratio, scaled = SIZES[size]
    if family == "nat":
        return PlainNAT(dim, depths, ratio, scaled)
    return PlainNAT(dim, depths, ratio, scaled and size == "base", DILATIONS)
