"""Agent-, InLine-, FLatten-, Pola- and SLAB-Swin as their authors compose them: tokens [B, N, C], nothing fused.

The baseline that the library's models are measured against, and a second opinion on their outputs. Parameter names are
those of the published checkpoints (arXiv 2312.08874, 2412.06590, 2308.00442, 2501.15061, 2405.11582).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MIXERS", "PlainSwin", "VARIANTS", "build"]


def _heads(x: Tensor, h: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], h, -1).permute(0, 2, 1, 3)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        return self.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3)


class _Window(_Attention):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = place[:, :, None] - place[:, None] + window - 1
        self.register_buffer("relative_position_index", distance[0] * (2 * window - 1) + distance[1])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, _ = x.shape
        q, k, v = (_heads(t, self.heads) for t in self.split(x))
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            n = mask.shape[0]
            attn = (attn.view(B // n, n, self.heads, N, N) + mask[:, None]).view(-1, self.heads, N, N)
        return self.proj(_merge(attn.softmax(-1) @ v))


class _Agent(_Attention):
    def __init__(self, dim: int, heads: int, window: int, agents: int) -> None:
        super().__init__(dim, heads)
        self.window, self.side = window, int(agents**0.5)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.an_bias = nn.Parameter(torch.zeros(heads, agents, 7, 7))
        self.na_bias = nn.Parameter(torch.zeros(heads, agents, 7, 7))
        self.ah_bias = nn.Parameter(torch.zeros(1, heads, agents, window, 1))
        self.aw_bias = nn.Parameter(torch.zeros(1, heads, agents, 1, window))
        self.ha_bias = nn.Parameter(torch.zeros(1, heads, window, 1, agents))
        self.wa_bias = nn.Parameter(torch.zeros(1, heads, 1, window, agents))
        for name, table in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        h, w, size = self.heads, self.window, (self.window, self.window)
        q, k, v = self.split(x)
        agents = F.adaptive_avg_pool2d(q.reshape(B, w, w, C).permute(0, 3, 1, 2), self.side)
        agents = _heads(agents.reshape(B, C, -1).permute(0, 2, 1), h)
        q, k, v = (_heads(t, h) for t in (q, k, v))
        first = F.interpolate(self.an_bias, size=size, mode="bilinear").reshape(1, h, -1, N).repeat(B, 1, 1, 1)
        second = (self.ah_bias + self.aw_bias).reshape(1, h, -1, N).repeat(B, 1, 1, 1)
        pooled = ((agents * self.scale) @ k.transpose(-2, -1) + (first + second)).softmax(-1) @ v
        first = F.interpolate(self.na_bias, size=size, mode="bilinear").reshape(1, h, -1, N).permute(0, 1, 3, 2)
        second = (self.ha_bias + self.wa_bias).reshape(1, h, N, -1).repeat(B, 1, 1, 1)
        x = ((q * self.scale) @ agents.transpose(-2, -1) + (first.repeat(B, 1, 1, 1) + second)).softmax(-1) @ pooled
        v = _merge(v).reshape(B, w, w, C).permute(0, 3, 1, 2)
        return self.proj(_merge(x) + self.dwc(v).permute(0, 2, 3, 1).reshape(B, N, C))


class _InLine(_Attention):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads)
        self.window = window
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        w = self.window
        q, k, v = (_heads(t, self.heads) for t in self.split(x))
        filters = self.residual(x.mean(1).unsqueeze(-1)).reshape(B * C, 1, 3, 3)
        factor = (self.scale / N) ** 0.5
        state = (k.transpose(-2, -1) * factor) @ (v * factor)
        mean = v.mean(2, keepdim=True)
        x = q @ state + (1 - q @ k.mean(2, keepdim=True).transpose(-2, -1) * self.scale) * mean
        maps = v.permute(0, 1, 3, 2).reshape(1, B * C, w, w)
        local = F.conv2d(maps, filters, padding=1, groups=B * C).reshape(B, C, N).permute(0, 2, 1)
        return self.proj(_merge(x) + local)


class _Linear(_Attention):
    """Focused linear attention, or simplified without ``focused``."""

    def __init__(self, dim: int, heads: int, window: int, focused: bool) -> None:
        super().__init__(dim, heads)
        self.window, self.focused = window, focused
        d = dim // heads
        self.positional_encoding = nn.Parameter(torch.zeros(1, window**2, dim))
        self.dwc = nn.Conv2d(d, d, 5, padding=2, groups=d)
        if focused:
            self.scale = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        w = self.window
        q, k, v = self.split(x)
        k = k + self.positional_encoding
        if self.focused:
            scale = F.softplus(self.scale)
            q, k = (F.relu(q) + 1e-6) / scale, (F.relu(k) + 1e-6) / scale
            norms = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
            q, k = q**3, k**3
            q = q / q.norm(dim=-1, keepdim=True) * norms[0]
            k = k / k.norm(dim=-1, keepdim=True) * norms[1]
        else:
            q, k = F.relu(q), F.relu(k)
        q, k, v = (_heads(t, self.heads) for t in (q, k, v))
        if self.focused:
            z = 1 / (q @ k.mean(2, keepdim=True).transpose(-2, -1) + 1e-6)
            n = k.shape[2] ** -0.5
            x = q @ ((k.transpose(-2, -1) * n) @ (v * n)) * z
        else:
            z = 1 / (q @ k.sum(2, keepdim=True).transpose(-2, -1) + 1e-6)
            x = q @ (k.transpose(-2, -1) @ v) * z
        B, h, N, d = v.shape
        local = self.dwc(v.reshape(B * h, w, w, d).permute(0, 3, 1, 2)).reshape(B, h * d, N).permute(0, 2, 1)
        return self.proj(_merge(x) + local)


class _Polarity(nn.Module):
    """Polarity-aware linear attention: four powers, both signs of queries beside each other in either order."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window, d = heads, window, dim // heads
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.proj = nn.Linear(dim, dim)
        self.positional_encoding = nn.Parameter(torch.zeros(1, window**2, dim))
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.power = nn.Parameter(torch.zeros(1, heads, 1, d))
        self.dwc = nn.Conv2d(d, d, 5, padding=2, groups=d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        w = self.window
        q, k, v, g = self.qkvg(x).reshape(B, N, 4, C).unbind(2)
        k = k + self.positional_encoding
        scale = F.softplus(self.scale)
        q, k, v = (_heads(t, self.heads) for t in (q / scale, k / scale, v))
        power = 1 + 4 * torch.sigmoid(self.power)
        q_pos, q_neg, k_pos, k_neg = (F.relu(t) ** power for t in (q, -q, k, -k))
        same, opposite = torch.cat([q_pos, q_neg], -1), torch.cat([q_neg, q_pos], -1)
        key, n, parts = torch.cat([k_pos, k_neg], -1), N**-0.5, []
        for query, value in zip((same, opposite), v.chunk(2, -1), strict=True):
            z = 1 / (query @ key.mean(2, keepdim=True).transpose(-2, -1) + 1e-6)
            parts.append(query @ ((key.transpose(-2, -1) * n) @ (value * n)) * z)
        d = v.shape[-1]
        local = self.dwc(v.reshape(-1, w, w, d).permute(0, 3, 1, 2)).reshape(B, C, N).permute(0, 2, 1)
        return self.proj((_merge(torch.cat(parts, -1)) + local) * g)


class _RepBN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # The authors start at 1, which doubles the maps at every norm until there are running statistics.
        self.alpha = nn.Parameter(torch.zeros(1))
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


START = 10**12  # forward passes of a schedule so long that all that are measured are its start


class _LinearNorm(nn.Module):
    """SLAB's norm: in evaluation the batch norm alone, in training as at the start of the schedule."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name, value in (("warm", 0), ("iter", START), ("total_step", START)):
            self.register_buffer(name, torch.tensor(value))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = _RepBN(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(x) + 0.0 * self.norm2(x) if self.training else self.norm2(x)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, size: int, window: int, shift: int, attn: nn.Module, norm) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))
        mask = None
        if shift:
            region = torch.zeros(1, size, size, 1)
            parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for i, rows in enumerate(parts):
                for j, columns in enumerate(parts):
                    region[:, rows, columns] = 3 * i + j
            region = self.partition(region).squeeze(-1)
            mask = (region[:, None] != region[:, :, None]).float() * -100.0
        self.register_buffer("attn_mask", mask)

    def partition(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window
        return x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, C)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        s, w, n = self.size, self.window, self.size // self.window
        y = self.norm1(x).view(B, s, s, C)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attn(self.partition(y), self.attn_mask)
        y = y.view(B, n, n, w, w, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, s, s, C)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.view(B, N, C)
        return x + self.mlp(self.norm2(x))


class _Merging(nn.Module):
    def __init__(self, dim: int, size: int, norm) -> None:
        super().__init__()
        self.size = size
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        x = x.view(B, self.size, self.size, C)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x.view(B, -1, 4 * C)))


class _Stage(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PlainSwin(nn.Module):
    """The network for images of 224 px; no stochastic depth.

    Args:
        mixers: Of every stage, what makes the mixer of a block from channels, heads and side of the map; None for
            shifted windows of 7.
        norm: Makes a norm of a number of channels.
        dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
    """

    def __init__(
        self,
        mixers: Sequence[Callable[[int, int, int], nn.Module] | None],
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.patch_embed.norm = norm(dim)
        stages, size = [], 56
        for i, (depth, heads, mixer) in enumerate(zip(depths, num_heads, mixers, strict=True)):
            blocks = []
            for j in range(depth):
                window = size if mixer else 7
                shift = 3 if j % 2 and size > window else 0
                attn = mixer(dim, heads, size) if mixer else _Window(dim, heads, window)
                blocks.append(_Block(dim, heads, size, window, shift, attn, norm))
            stages.append(_Stage(blocks, _Merging(dim, size, norm) if i < 3 else None))
            dim, size = (2 * dim, size // 2) if i < 3 else (dim, size)
        self.layers = nn.ModuleList(stages)
        self.norm = norm(dim)
        self.head = nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 224, 224] to logits [B, 1000]."""
        x = self.patch_embed.norm(self.patch_embed.proj(x).flatten(2).transpose(1, 2))
        for stage in self.layers:
            x = stage(x)
        return self.head(self.norm(x).transpose(1, 2).mean(2))


FOCUSED, SIMPLIFIED = partial(_Linear, focused=True), partial(_Linear, focused=False)
MIXERS = {"agent": _Agent, "inline": _InLine, "flatten": FOCUSED, "pola": _Polarity, "slab": SIMPLIFIED}
VARIANTS = {
    "agent_swin_t": (tuple(partial(_Agent, agents=n) for n in (9, 16, 49)) + (None,), nn.LayerNorm),
    "inline_swin_t": ((_InLine, _InLine, _InLine, None), nn.LayerNorm),
    "flatten_swin_t": ((FOCUSED, FOCUSED, None, None), nn.LayerNorm),
    "pola_swin_t": ((_Polarity, _Polarity, None, None), nn.LayerNorm),
    "slab_swin_t": ((SIMPLIFIED, SIMPLIFIED, None, None), _LinearNorm),
}


def build(name: str) -> PlainSwin:
    """The plain network of a registered model, freshly initialised."""
    if name not in VARIANTS:
        raise ValueError(f"no plain network for {name!r}; there is one for {', '.join(VARIANTS)}")
    return PlainSwin(*VARIANTS[name])
