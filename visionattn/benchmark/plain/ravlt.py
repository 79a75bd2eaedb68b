"""RAVLT, MAViT and NaLaFormer composed of torch modules: contiguous NCHW maps, einsum attention, nothing fused.

The baseline that the library's networks are measured against, and a second opinion on their outputs. Parameter names
are the authors' (arXiv 2411.07635, 2507.00698 and 2506.21137), which ``checkpoint_filter_fn`` reads.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PlainNaLaFormer",
    "PlainRAVLT",
    "build",
    "magnitude_aware_attention",
    "norm_aware_attention",
    "rank_augmented_attention",
]

# channels, depths, heads and initial layer scales of the four stages
SIZES = {
    "t": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), (1.0, 1.0, 1.0, 1.0)),
    "s": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), (1.0, 1.0, 1.0, 1.0)),
    "b": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), (1.0, 1.0, 1e-6, 1e-6)),
    "l": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), (1e-6, 1e-6, 1e-6, 1e-6)),
}

NALA_RATIOS = {"xt": 3.5, "t": 4, "s": 3.5, "b": 4, "l": 3.5}  # of NaLaFormer's MLPs


class _Rotary(nn.Module):
    """Sines and cosines for a map; channels in adjacent pairs, half of them for rows and half for columns."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        speed = 1.0 / 10000 ** torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("angle", speed.repeat_interleave(2))

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(height).to(self.angle)[:, None] * self.angle
        columns = torch.arange(width).to(self.angle)[:, None] * self.angle
        phase = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).flatten(
            0, 1
        )  # N d
        return phase.sin(), phase.cos()


def _rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def rank_augmented_attention(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """RALA between the projections. q, k, v [B, h, N, d], tables [N, d] to [B, h, N, d]"""
    n, scale = q.shape[2], q.shape[3] ** -0.5
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.softmax(torch.einsum("bhd,bhnd->bhn", q.mean(2) * scale, k), dim=-1)
    k = k * weights[..., None] * n
    z = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.mean(2)) + 1e-6)
    q, k = _rotate(q, sin, cos), _rotate(k, sin, cos)
    state = torch.einsum("bhnd,bhne->bhde", k * n**-0.5, v * n**-0.5)
    return torch.einsum("bhnd,bhde->bhne", q, state) * z[..., None]


def magnitude_aware_attention(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """MALA between the projections. q, k, v [B, h, N, d], tables [N, d] to [B, h, N, d]"""
    n, scale = q.shape[2], q.shape[3] ** -0.5
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = scale * torch.einsum("bhnd,bhd->bhn", q, k.mean(2))[..., None]
    q, k = _rotate(q, sin, cos), _rotate(k, sin, cos)
    factor = (scale / n) ** 0.5
    state = torch.einsum("bhnd,bhne->bhde", k * factor, v * factor)
    return torch.einsum("bhnd,bhde->bhne", q, state) * (1 + 1 / (z + 1e-6)) - z * v.mean(2, keepdim=True)


def norm_aware_attention(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """NaLaFormer's between the projections. q, k, v [B, h, N, d], tables [N, d] to [B, h, N, d]"""
    n, k = q.shape[2], k**3
    norm = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norm))
    q = torch.cat([(F.relu(q) / norm) ** power, (F.relu(-q) / norm) ** power], dim=-1)
    k = torch.cat([F.relu(k), F.relu(-k)], dim=-1)
    z = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.mean(2)) + 1e-6)
    sin, cos = torch.cat([sin, sin], dim=-1), torch.cat([cos, cos], dim=-1)
    q, k = _rotate(q, sin, cos), _rotate(k, sin, cos)
    state = torch.einsum("bhnd,bhne->bhde", k * n**-0.5, v * n**-0.5)
    return torch.einsum("bhnd,bhde->bhne", q, state) * z[..., None]


def _softmax(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    q, k = _rotate(q, sin, cos), _rotate(k, sin, cos)
    weights = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k), dim=-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, operator) -> None:
        super().__init__()
        self.num_heads, self.operator = num_heads, operator
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        B, C, H, W = x.shape
        *qkv, gate = self.qkvo(x).chunk(4, dim=1)
        lepe = self.lepe(qkv[2])
        q, k, v = (t.reshape(B, self.num_heads, -1, H * W).transpose(2, 3) for t in qkv)  # B h N d
        y = self.operator(q, k, v, sin, cos).transpose(2, 3).reshape(B, C, H, W)
        return self.proj((y + lepe) * gate)


class _LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class _NormedAttention(nn.Module):
    """NaLaFormer's frame: linear layers, and a layer norm before a gate with SiLU."""

    def __init__(self, dim: int, num_heads: int, operator) -> None:
        super().__init__()
        self.num_heads, self.operator = num_heads, operator
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)
        self.ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v, gate = self.qkvg(x.flatten(2).transpose(1, 2)).chunk(4, dim=-1)
        lepe = self.lepe(v.transpose(1, 2).reshape(B, C, H, W)).flatten(2).transpose(1, 2)
        q, k, v = (t.reshape(B, H * W, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        y = self.operator(q, k, v, sin, cos).transpose(1, 2).reshape(B, H * W, C)
        return self.out_proj(self.ln(y + lepe) * F.silu(gate)).transpose(1, 2).reshape(B, C, H, W)


class _LinearFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.fc2((x + self.dwconv(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, operator, layer_scale: float) -> None:
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = _LayerNorm(dim)
        self.attn = _Attention(dim, num_heads, operator)
        self.norm2 = _LayerNorm(dim)
        self.ffn = _FeedForward(dim, int(3.5 * dim))
        self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale))

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.gamma_1 * self.attn(self.norm1(x), sin, cos)
        return x + self.gamma_2 * self.ffn(self.norm2(x))


class _NormAwareBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, operator, layer_scale: float, mlp_ratio: float) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = _LayerNorm(dim)
        self.attn = _NormedAttention(dim, num_heads, operator)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = _LayerNorm(dim)
        self.ffn = _LinearFeedForward(dim, int(mlp_ratio * dim))
        self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale))

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = x + self.gamma_1 * self.attn(self.norm1(x), sin, cos)
        x = x + self.cpe2(x)
        return x + self.gamma_2 * self.ffn(self.norm2(x))


class _Downsample(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class _Stage(nn.Module):
    def __init__(
        self, dim: int, depth: int, num_heads: int, operator, layer_scale: float, out: int | None, block=_Block
    ) -> None:
        super().__init__()
        self.RoPE = _Rotary(dim // num_heads)
        self.blocks = nn.ModuleList(block(dim, num_heads, operator, layer_scale) for _ in range(depth))
        self.downsample = nn.Identity() if out is None else _Downsample(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        sin, cos = self.RoPE(*x.shape[2:])
        for block in self.blocks:
            x = block(x, sin, cos)
        return self.downsample(x)


class _Stem(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for channels, out, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PlainRAVLT(nn.Module):
    """The network by stages, without stochastic depth.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        layer_scales: Initial layer scale of each stage.
        magnitude_aware: Whether the first two stages have MALA instead of RALA.
        head_width: Channels before the pooling.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        layer_scales: Sequence[float],
        magnitude_aware: bool = False,
        head_width: int = 1024,
        in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        linear = magnitude_aware_attention if magnitude_aware else rank_augmented_attention
        self.patch_embed = _Stem(in_chans, embed_dims[0])
        self.layers = nn.ModuleList(
            _Stage(dim, depth, heads, linear if i < 2 else _softmax, layer_scales[i], out)
            for i, (dim, depth, heads, out) in enumerate(
                zip(embed_dims, depths, num_heads, (*embed_dims[1:], None), strict=True)
            )
        )
        self.proj = nn.Conv2d(embed_dims[-1], head_width, 1)
        self.norm = nn.BatchNorm2d(head_width)
        self.head = nn.Conv2d(head_width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        x = F.silu(self.norm(self.proj(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class PlainNaLaFormer(PlainRAVLT):
    """The same stages with NaLaFormer's blocks, and a linear layer before the pooling.

    Args:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        layer_scales: Initial layer scale of each stage.
        mlp_ratio: Hidden over outer width of the MLPs.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        layer_scales: Sequence[float],
        mlp_ratio: float,
    ) -> None:
        super().__init__(embed_dims, (0, 0, 0, 0), num_heads, layer_scales)
        block = partial(_NormAwareBlock, mlp_ratio=mlp_ratio)
        rows = zip(embed_dims, depths, num_heads, layer_scales, (*embed_dims[1:], None), strict=True)
        self.layers = nn.ModuleList(
            _Stage(dim, depth, heads, norm_aware_attention if i < 2 else _softmax, layer_scale, out, block)
            for i, (dim, depth, heads, layer_scale, out) in enumerate(rows)
        )
        self.proj = nn.Linear(embed_dims[-1], 1024)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        x = self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(F.silu(self.norm(x)), 1)).flatten(1)


def build(name: str) -> PlainRAVLT:
    """The plain network of a registered RAVLT, MAViT or NaLaFormer, freshly initialised."""
    family, _, size = name.partition("_")
    if family == "nalaformer" and size in NALA_RATIOS:
        sizes = SIZES.get(size, ((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), (1.0, 1.0, 1.0, 1.0)))
        return PlainNaLaFormer(*sizes, NALA_RATIOS[size])
    if family not in ("ravlt", "mavit") or size not in SIZES:
        allowed = ", ".join(f"{family}_{size}" for family in ("ravlt", "mavit") for size in SIZES)
        raise ValueError(f"no plain network for {name!r}; there is one for {allowed}")
    width = 1024 if family == "ravlt" else 2560 if size == "l" else 2048
    return PlainRAVLT(*SIZES[size], magnitude_aware=family == "mavit", head_width=width)
