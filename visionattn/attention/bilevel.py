"""Bi-level routing attention: regions attend to the few regions that resemble them. B batch, h heads, R regions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import attend, bilevel_routing_attention, crop_map, exporting, pad_map
from visionattn.kernels.bilevel import (
    cut,
    from_regions,
    gathered_attention,
    region_means,
    route_regions,
    to_regions,
)
from visionattn.layers.blocks import DepthwiseConv, Linear
from visionattn.layers.checks import check_counts, check_heads, check_map, check_side, declared
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = ["BiLevelRoutingAttention", "LePEAttention"]

GENERATIONS = ("legacy", "nchw")
DOWNSAMPLE_MODES = ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool")
PROJECTIONS = ("qkvo", "qkv")


@opaque  # which path runs depends on the size of the map
@declared
class BiLevelRoutingAttention(nn.Module):
    """``wo(softmax(scale * q k^T) v + lepe(v))`` over the tokens of the ``topk`` regions whose mean keys have the
    largest products with a region's mean query (BiFormer, arXiv 2303.08810); ``lepe`` is a depthwise convolution.

    The authors wrote it twice. ``"legacy"`` cuts the map into exactly ``n_win`` regions a side, padded with zeros
    *before* the projection: padded positions have the projection's bias as query, key and value and take part in
    everything. ``"nchw"`` cuts regions of ``H // n_win`` by ``W // n_win``, which may be more of them, padded with
    zeros *after* the projection: keys with the logit 0 and the value 0, which neither region means nor ``lepe`` see.
    Where ``n_win`` divides the map they agree.

    Args:
        dim: Channels C of the map. [B, H, W, C] in and out
        num_heads: Attention heads; they divide ``dim`` and ``qk_dim``.
        n_win: Regions a side, for both axes or one per axis. No parameter depends on it: it may be set at any time.
        topk: Regions that a region attends to. On maps with fewer regions ("nchw" on maps smaller than ``n_win``, or
            ``region_size``), all of them.
        region_size: Tokens of a region a side instead of ``n_win``, so that the number of regions follows the map.
        qk_dim: Channels of queries and keys; None for ``dim``.
        qk_scale: Factor of the logits; None for ``qk_dim ** -0.5``, over all heads together as the authors have it.
        kv_downsample_mode: How keys and values of a region are reduced: ``"identity"``, ``"avgpool"`` and ``"maxpool"``
            by ``kv_downsample_ratio``, ``"ada_avgpool"`` and ``"ada_maxpool"`` to ``kv_per_win`` a side. Routing and
            ``lepe`` see them unreduced.
        kv_downsample_ratio: Tokens a side that a pooled one replaces; a remainder is left out.
        kv_per_win: Pooled tokens of a region a side.
        side_dwconv: Kernel side of ``lepe``, odd; 0 for none.
        soft_routing: Multiply keys and values by the softmax over the scores of their regions.
        diff_routing: Let gradients flow through these factors; needs ``soft_routing``.
        param_routing: Send region means through a linear layer, ``router``; needs ``diff_routing``.
        param_attention: ``"qkvo"``, or ``"qkv"`` for no output projection.
        auto_pad: Whether "legacy" takes maps that are no multiple of ``n_win``. "nchw" always does.
        generation: ``"legacy"`` or ``"nchw"``.

    Raises:
        ValueError: If an argument is not one of the allowed, or, in ``forward``, the map cannot be cut.
    """

    __jit_unused_properties__ = ["n_win"]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topk: int = 4,
        region_size: int | Sequence[int] | None = None,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratio: int = 1,
        kv_per_win: int = 1,
        side_dwconv: int = 5,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        param_attention: str = "qkvo",
        auto_pad: bool = False,
        generation: str = "legacy",
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.qk_dim = dim if qk_dim is None else qk_dim
        self.region_size = [0, 0] if region_size is None else _pair("region_size", region_size)
        self.topk = topk
        self.windows = _pair("n_win", n_win)
        check_counts(dim=dim, num_heads=num_heads, qk_dim=self.qk_dim)
        if dim % num_heads or self.qk_dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim} and qk_dim = {self.qk_dim}, got {num_heads}")
        if type(topk) is not int or topk < 1 or (region_size is None and topk > math.prod(self.windows)):
            raise ValueError(f"topk must be from 1 to the number of regions, {math.prod(self.windows)}, got {topk!r}")
        _one_of("kv_downsample_mode", kv_downsample_mode, DOWNSAMPLE_MODES)
        _one_of("param_attention", param_attention, PROJECTIONS)
        _one_of("generation", generation, GENERATIONS)
        if side_dwconv != 0 and side_dwconv % 2 != 1:
            raise ValueError(f"side_dwconv must be odd, or 0 for no convolution, got {side_dwconv}")
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True, got diff_routing=False")
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing=True needs soft_routing=True, got soft_routing=False")
        self.exportable = built_for_export()
        self.scale = float(qk_scale if qk_scale is not None else self.qk_dim**-0.5)
        pooled = kv_downsample_mode.startswith("ada") or (kv_downsample_mode != "identity" and kv_downsample_ratio > 1)
        self.kv_downsample_mode = kv_downsample_mode if pooled else "identity"
        self.kv_downsample_ratio = kv_downsample_ratio
        self.kv_per_win = kv_per_win
        self.soft_routing = soft_routing
        self.diff_routing = diff_routing
        self.param_routing = param_routing
        self.generation = generation
        self.auto_pad = auto_pad or generation == "nchw"
        if generation == "nchw" and (pooled or soft_routing or self.qk_dim != dim or param_attention != "qkvo"):
            raise ValueError(
                "generation='nchw' has no kv_downsample_mode, soft_routing, qk_dim or param_attention; got "
                f"{kv_downsample_mode!r}, {soft_routing}, {qk_dim} and {param_attention!r}"
            )
        self.qkv = Linear(dim, 2 * self.qk_dim + dim, **dd)
        self.router = nn.Linear(self.qk_dim, self.qk_dim, **dd) if param_routing else nn.Identity()
        self.has_lepe = side_dwconv > 0
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if self.has_lepe else nn.Identity()
        self.wo = Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()

    @property
    def n_win(self) -> int | list[int]:
        """Regions a side, as they were given."""
        return self.windows[0] if self.windows[0] == self.windows[1] else self.windows

    @n_win.setter
    def n_win(self, n_win: int | Sequence[int]) -> None:
        windows = _pair("n_win", n_win)
        if self.region_size[0] == 0 and self.topk > math.prod(windows):
            raise ValueError(f"n_win must give at least topk = {self.topk} regions, got {n_win!r}")
        self.windows = windows

    def extra_repr(self) -> str:
        regions = f"n_win={self.n_win}" if self.region_size[0] == 0 else f"region_size={self.region_size}"
        return f"num_heads={self.num_heads}, {regions}, topk={self.topk}, generation={self.generation!r}"

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        H, W = x.shape[1], x.shape[2]
        grid = self._grid(H, W)
        if self.generation == "legacy":
            x = pad_map(x, grid[0] * grid[1], grid[2] * grid[3])
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], -1)
        if torch.jit.is_scripting() or self.exportable:
            y = self._for_export(q, k, v, grid)
        else:
            y = self._fused(q, k, v, grid)
        if self.has_lepe:
            y = y + self.lepe(v)
        return self.wo(crop_map(y, H, W))

    def _grid(self, H: int, W: int) -> list[int]:
        """Regions down, tokens of one down, regions across, tokens of one across."""
        sides = self.region_size if self.region_size[0] > 0 else self.windows
        if not self.auto_pad and (H % sides[0] != 0 or W % sides[1] != 0):
            name = "region_size" if self.region_size[0] > 0 else "n_win"
            raise ValueError(f"{name} = {sides} must divide the map of {H} x {W} positions; auto_pad=True pads it")
        if self.region_size[0] > 0:
            return cut(H, W, sides[0], sides[1])
        if self.generation == "nchw":
            return cut(H, W, max(H // sides[0], 1), max(W // sides[1], 1))
        # Not -(-H // p): of that torch.export derives impossible ranges.
        return [sides[0], (H + sides[0] - 1) // sides[0], sides[1], (W + sides[1] - 1) // sides[1]]

    @torch.jit.unused
    def _fused(self, q: Tensor, k: Tensor, v: Tensor, grid: list[int]) -> Tensor:
        if exporting():
            return self._for_export(q, k, v, grid)
        down, rows, across, columns = grid
        heads = [t.unflatten(-1, [self.num_heads, -1]) for t in (q, k, v)]
        if self.kv_downsample_mode == "identity" and not self.soft_routing:
            topk = min(self.topk, down * across)
            return bilevel_routing_attention(*heads, (rows, columns), topk, scale=self.scale).flatten(-2)
        routes, weights = self._route(q, k, grid)
        size = self._pooled(rows, columns)
        small = [down, size[0], across, size[1]]
        for i in (1, 2):
            x = from_regions(self._pool(heads[i].flatten(-2), grid), small, down * size[0], across * size[1])
            heads[i] = x.unflatten(-1, [self.num_heads, -1])
        y = bilevel_routing_attention(
            *heads, (rows, columns), routes=routes, weights=weights, key_region=size, scale=self.scale
        )
        return y.flatten(-2)

    def _for_export(self, q: Tensor, k: Tensor, v: Tensor, grid: list[int]) -> Tensor:
        """PyTorch's own operators, which leave all sizes dynamic."""
        h = self.num_heads
        H, W = q.shape[1], q.shape[2]
        routes, weights = self._route(q, k, grid)
        q, k, v = to_regions(q, grid), self._pool(k, grid), self._pool(v, grid)
        y = gathered_attention(
            q.unflatten(-1, [h, -1]), k.unflatten(-1, [h, -1]), v.unflatten(-1, [h, -1]), routes, weights, self.scale
        )
        return from_regions(y.flatten(-2), grid, H, W)

    def _route(self, q: Tensor, k: Tensor, grid: list[int]) -> tuple[Tensor, Tensor | None]:
        """Regions to attend to and, for soft routing, the factors of their keys and values. [B, R, K]"""
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        given = q.dtype  # of the projection, hence of the router
        q, k = region_means(q, grid), region_means(k, grid)
        if self.param_routing:
            dtype = q.dtype
            q, k = q.to(given), k.to(given)
            q, k = self.router(q).to(dtype), self.router(k).to(dtype)
        scores, routes = route_regions(q, k, min(self.topk, grid[0] * grid[2]))
        weights: Tensor | None = None
        if self.soft_routing:
            weights = (scores * self.scale).softmax(-1)
        return routes, weights

    def _pooled(self, rows: int, columns: int) -> tuple[int, int]:
        """Tokens of a region of keys per axis."""
        if self.kv_downsample_mode == "identity":
            return rows, columns
        if self.kv_downsample_mode.startswith("ada"):
            return self.kv_per_win, self.kv_per_win
        ratio = self.kv_downsample_ratio
        if ratio > rows or ratio > columns:
            raise ValueError(f"kv_downsample_ratio must not exceed the region, {rows} x {columns}, got {ratio}")
        return rows // ratio, columns // ratio

    def _pool(self, x: Tensor, grid: list[int]) -> Tensor:
        """Cut keys or values into regions and reduce these. [B, H, W, C] -> [B, R, S, C]"""
        x = to_regions(x, grid)
        if self.kv_downsample_mode == "identity":
            return x
        rows, columns = grid[1], grid[3]
        size = self._pooled(rows, columns)
        B, R, C, ratio = x.shape[0], x.shape[1], x.shape[3], self.kv_downsample_ratio
        x = x.reshape(B * R, rows, columns, C).permute(0, 3, 1, 2)
        if self.kv_downsample_mode == "avgpool":
            x = F.avg_pool2d(x, ratio)
        elif self.kv_downsample_mode == "maxpool":
            x = F.max_pool2d(x, ratio)
        elif self.kv_downsample_mode == "ada_avgpool":
            x = F.adaptive_avg_pool2d(x, [size[0], size[1]])
        else:
            x = F.adaptive_max_pool2d(x, [size[0], size[1]])
        return x.permute(0, 2, 3, 1).reshape(B, R, size[0] * size[1], C)


@declared
class LePEAttention(nn.Module):
    """``proj(softmax(D ** -0.5 * q k^T) v + lepe)`` over all positions, ``lepe`` a depthwise convolution of the input
    or of the values; BiFormer's last stage (arXiv 2303.08810).

    Args:
        dim: Channels of the map. [B, H, W, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        side_dwconv: Kernel side of ``lepe``, odd.
        lepe: What is convolved, ``"input"`` or ``"value"``; ``"none"`` for attention alone.

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        side_dwconv: int = 5,
        lepe: str = "input",
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        _one_of("lepe", lepe, ("input", "value", "none"))
        if side_dwconv % 2 != 1:
            raise ValueError(f"side_dwconv must be odd, got {side_dwconv}")
        self.num_heads = num_heads
        self.lepe_of = lepe
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = nn.Identity() if lepe == "none" else DepthwiseConv(dim, side_dwconv, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).split(C, -1)
        heads = [B, H * W, self.num_heads, C // self.num_heads]
        y = attend(q.reshape(heads).transpose(1, 2), k.reshape(heads).transpose(1, 2), v.reshape(heads).transpose(1, 2))
        y = y.transpose(1, 2).reshape(B, H, W, C)
        if self.lepe_of == "input":
            y = y + self.lepe(x)
        elif self.lepe_of == "value":
            y = y + self.lepe(v)
        return self.proj(y)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    check_side(name, value)
    return list(value) if isinstance(value, (tuple, list)) else [value, value]
