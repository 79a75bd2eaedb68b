"""BiFormer as its authors compose it: regions of keys and values are gathered into copies, einops-style rearrangements
between modules, full attention with explicit weights.

The baseline that the library's BiFormer is measured against, and a second opinion on its outputs. Parameter names are
those of the published checkpoints (arXiv 2303.08810), which the library's ``checkpoint_filter_fn`` reads. Sizes must be
such that every routed stage's map is a multiple of the number of regions.
"""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["PlainBiFormer", "build"]

# channels, depths, MLP ratio, Swin's layout, second generation
VARIANTS = {
    "biformer_tiny": ((64, 128, 256, 512), (2, 2, 8, 2), 3, False, False),
    "biformer_small": ((64, 128, 256, 512), (4, 4, 18, 4), 3, False, False),
    "biformer_base": ((96, 192, 384, 768), (4, 4, 18, 4), 3, False, False),
    "biformer_stl": ((96, 192, 384, 768), (2, 2, 6, 2), 4, True, False),
    "biformer_stl_nchw": ((96, 192, 384, 768), (2, 2, 6, 2), 4, True, True),
}
TOPKS = (1, 4, 16)
N_WIN = 7


class _QKV(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)


class _Routed(nn.Module):
    def __init__(self, dim: int, topk: int, nchw: bool) -> None:
        super().__init__()
        self.heads, self.topk, self.scale, self.nchw = dim // 32, topk, dim**-0.5, nchw
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        if nchw:
            self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
            self.output_linear = nn.Conv2d(dim, dim, 1)
        else:
            self.qkv = _QKV(dim)
            self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C], or [B, C, H, W] in the second generation."""
        if self.nchw:
            x = self.qkv_linear(x).permute(0, 2, 3, 1)
        else:
            x = self.qkv.qkv(x)
        B, H, W, C = x.shape
        C, p, m = C // 3, N_WIN, self.heads
        h, w = H // p, W // p
        x = x.reshape(B, p, h, p, w, 3 * C).transpose(2, 3).reshape(B, p * p, h * w, 3 * C)
        q, kv = x.split([C, 2 * C], -1)
        scores = (q.mean(2).detach() * self.scale) @ kv[..., :C].mean(2).detach().transpose(1, 2)
        index = scores.topk(self.topk, -1).indices[..., None, None]
        shape = (B, p * p, self.topk, h * w, 2 * C)
        kv_sel = kv[:, None].expand(B, p * p, p * p, h * w, 2 * C).gather(2, index.expand(shape))
        k, v = kv_sel.split(C, -1)
        n = B * p * p
        k = k.reshape(n, self.topk * h * w, m, C // m).permute(0, 2, 3, 1)
        v = v.reshape(n, self.topk * h * w, m, C // m).permute(0, 2, 1, 3)
        q = q.reshape(n, h * w, m, C // m).permute(0, 2, 1, 3)
        out = ((q * self.scale) @ k).softmax(-1) @ v
        out = out.reshape(B, p, p, m, h, w, C // m).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C)
        v_map = kv[..., C:].reshape(B, p, p, h, w, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        if self.nchw:
            return self.output_linear(out.permute(0, 3, 1, 2) + self.lepe(v_map))
        return self.wo(out + self.lepe(v_map.contiguous()).permute(0, 2, 3, 1))


class _Full(nn.Module):
    def __init__(self, dim: int, nchw: bool) -> None:
        super().__init__()
        self.heads, self.nchw = 8, nchw
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False) if nchw else nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Conv2d(dim, dim, 1) if nchw else nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C], or [B, C, H, W] in the second generation."""
        qkv = self.qkv(x)
        if self.nchw:
            lepe = self.lepe(qkv.chunk(3, 1)[2]).permute(0, 2, 3, 1)
            qkv = qkv.permute(0, 2, 3, 1)
        else:
            lepe = self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        B, H, W, C = lepe.shape
        q, k, v = qkv.reshape(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5).softmax(-1)
        x = (weights @ v).transpose(1, 2).reshape(B, H, W, C) + lepe
        return self.proj(x.permute(0, 3, 1, 2)) if self.nchw else self.proj(x)


class _Block(nn.Module):
    def __init__(self, dim: int, ratio: int, topk: int, swin: bool, nchw: bool) -> None:
        super().__init__()
        self.swin, self.nchw = swin, nchw
        if not swin:
            self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Routed(dim, topk, nchw) if topk > 0 else _Full(dim, nchw)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        parts = (nn.Identity(),) if not swin else ()
        linear = (lambda i, o: nn.Conv2d(i, o, 1)) if nchw else nn.Linear
        self.mlp = nn.Sequential(linear(dim, ratio * dim), *parts, nn.GELU(), linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.nchw:
            norm = [lambda y, n=n: n(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for n in (self.norm1, self.norm2)]
            x = x + self.attn(norm[0](x))
            return x + self.mlp(norm[1](x))
        if not self.swin:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class _Stage(nn.Module):
    """Blocks under the name that the Swin layout has for them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PlainBiFormer(nn.Module):
    """The network by stages; no stochastic depth and no dropout.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        ratio: Hidden over outer width of the MLPs.
        swin: Whether patches lie side by side and blocks have no convolution before the attention.
        nchw: Whether projections are 1x1 convolutions and the last stage convolves its values.
    """

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], ratio: int, swin: bool = False, nchw: bool = False
    ) -> None:
        super().__init__()
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i == 0 and swin:
                parts = [nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim)]
            elif i == 0:
                parts = [nn.Conv2d(3, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2), nn.GELU()]
                parts += [nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim)]
            elif swin:
                parts = [nn.BatchNorm2d(dims[i - 1]), nn.Conv2d(dims[i - 1], dim, 2, 2)]
            else:
                parts = [nn.Conv2d(dims[i - 1], dim, 3, 2, 1), nn.BatchNorm2d(dim)]
            self.downsample_layers.append(nn.Sequential(*parts))
            topk = TOPKS[i] if i < len(TOPKS) else 0
            blocks = [_Block(dim, ratio, topk, swin, nchw) for _ in range(depth)]
            self.stages.append(_Stage(blocks) if swin else nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, 1000]."""
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x).flatten(2).mean(-1))


def build(name: str) -> PlainBiFormer:
    """The plain network of a registered BiFormer, freshly initialised."""
    if name not in VARIANTS:
        raise ValueError(f"no plain network for {name!r}; there is one for {', '.join(VARIANTS)}")
    return PlainBiFormer(*VARIANTS[name])
