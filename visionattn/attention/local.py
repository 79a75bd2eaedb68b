"""Relatives of neighborhood attention on the same tiles: a circle around each query, a block with a halo. B batch,
H rows, W columns, h heads, D head dim, n tiles, T queries and S keys of a tile.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import attend, autocast, eager, exporting
from visionattn.kernels.neighborhood import Axis, Group, Run, positions
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import check_heads, check_map, declared

__all__ = ["CircularWindowAttention", "HaloAttention", "circular_attention"]

TILE = 8  # queries per axis of a tile under a circle


def circular_attention(
    q: Tensor, k: Tensor, v: Tensor, radius: int, more_k: Tensor | None = None, more_v: Tensor | None = None
) -> Tensor:
    """Attend to the keys less than ``radius`` away: dy ** 2 + dx ** 2 < radius ** 2, cut at the borders of the map.

    Args:
        q: Queries. [B, H, W, h, D]
        k: Keys, shaped as ``q``.
        v: Values, shaped as ``q``.
        radius: Radius of the circle; 1 is the query alone.
        more_k: Keys that every query sees besides. [B, P, h, D]
        more_v: Their values. [B, P, h, D]

    Returns:
        The attended values, shaped as ``q``.

    Raises:
        ValueError: If ``radius`` is less than 1 or the shapes do not fit.
    """
    if radius < 1:
        raise ValueError(f"radius must be at least 1, got {radius}")
    if q.dim() != 5 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must be [B, H, W, h, D] and of one shape, got {shapes}")
    if (more_k is None) != (more_v is None) or (more_k is not None and more_k.shape != more_v.shape):
        raise ValueError("more_k and more_v must be given together and be of one shape")
    q, k, v, more_k, more_v = autocast(q, k, v, more_k, more_v)

    def tile(group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dy, dx = (_distances(axis.run, q.device) for axis in group.axes)
        seen = dy.square()[:, None, :, None] + dx.square()[None, :, None, :] < radius**2
        seen = seen.reshape(group.queries, group.keys)
        if more_k is not None:
            k, v = (
                torch.cat([t, more.transpose(1, 2).repeat_interleave(group.tiles, 0)], 2)
                for t, more in ((k, more_k), (v, more_v))
            )
            seen = F.pad(seen, (0, more_k.shape[1]), value=True)
        return attend(q, k, v, seen)

    groups = _blocks(q.shape[1:3], TILE, radius - 1)
    if eager(q) and q.device.type == "cpu":
        out = _over_tiles(q, k, v, groups, tile)
        # What spreads within a tile, from keys and values that its other queries do not see, is never finite.
        if out.detach().sum(dtype=torch.promote_types(out.dtype, torch.float32)).isfinite():
            return out
    elif exporting():
        return _over_tiles(q, k, v, groups, tile)
    sound = (k.isfinite() & v.isfinite()).all(-1)
    out = _over_tiles(q, *(torch.where(sound[..., None], t, 0) for t in (k, v)), groups, tile)
    return out.masked_fill(_seen_in_circle(~sound, radius)[..., None], torch.nan)


def _seen_in_circle(marked: Tensor, radius: int) -> Tensor:
    """Which positions see a marked one. [B, H, W, h]"""
    distance = torch.arange(1 - radius, radius, device=marked.device).square()
    circle = (distance[:, None] + distance < radius**2).float()[None, None]
    maps = marked.permute(0, 3, 1, 2)
    found = F.conv2d(maps.reshape(-1, 1, *maps.shape[2:]).float(), circle, padding=radius - 1) > 0.5
    return found.view(maps.shape).permute(0, 2, 3, 1)


def _distances(run: Run, device: torch.device) -> Tensor:
    """Key position minus query position in a tile. [tile, span]"""
    query = torch.arange(run.first, run.first + run.tile, device=device)[:, None]
    return torch.arange(run.first_key, run.first_key + run.span, device=device) - query


def _blocks(spatial: tuple[int, ...], side: int, reach: int) -> list[Group]:
    """Cut a map into tiles of a side, the last ones smaller, with the keys up to ``reach`` away that the map has."""
    axes = []
    for L in spatial:
        runs: list[Run] = []
        for first in range(0, L, side):
            tile = min(side, L - first)
            first_key = max(first - reach, 0)
            span = min(first + tile + reach, L) - first_key
            same = (tile, span, first_key - first)
            if runs and same == (runs[-1].tile, runs[-1].span, runs[-1].first_key - runs[-1].first):
                runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
            else:
                runs.append(Run(first, tile, 1, first_key, span))
        axes.append([Axis(0, 1, L, run) for run in runs])
    return [_group(choice) for choice in itertools.product(*axes)]


def _group(axes: tuple[Axis, ...]) -> Group:
    sizes = zip(*((a.run.count, a.run.tile, a.run.span) for a in axes), strict=True)
    return Group(tuple(axes), *map(math.prod, sizes))


def _over_tiles(
    q: Tensor, k: Tensor, v: Tensor, groups: list[Group], attend: Callable[[Group, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Call ``attend(group, q, k, v)`` on the tiles of every group, [n, h, T or S, D], and put the results in place.

    The map of keys and values may be larger than that of the queries.
    """

    def tiles(x: Tensor, index: Tensor, size: int) -> Tensor:
        return x.flatten(1, 2).index_select(1, index).unflatten(1, (-1, size)).flatten(0, 1).transpose(1, 2)

    parts, order = [], []
    for group in groups:
        queries, _ = positions(group, q.shape[1:3], (1, 1), q.device)
        _, keys = positions(group, k.shape[1:3], (1, 1), q.device)
        out = attend(
            group, tiles(q, queries, group.queries), tiles(k, keys, group.keys), tiles(v, keys, group.keys)
        ).transpose(1, 2)
        parts.append(out.reshape(q.shape[0], group.tiles * group.queries, *out.shape[2:]))
        order.append(queries)
    index = torch.cat(order)
    inverse = index.scatter(0, index, torch.arange(index.numel(), device=q.device))
    return torch.cat(parts, 1).index_select(1, inverse).unflatten(1, q.shape[1:3])


@declared
class CircularWindowAttention(nn.Module):
    """Every position of a map sees a circle around it, the prefix tokens and a pooled map (CLEAR, arXiv 2412.16112).

    Args:
        dim: Channels.
        num_heads: Attention heads; they divide ``dim``.
        radius: Radius of the circle, see :func:`circular_attention`.
        down_factor: Side f of the cells that keys and values are pooled over, by one learned weight per place in a
            cell; ``None`` for no pooled map. It divides both sides of the map.
        qkv_bias: Whether the projection to queries, keys and values has a bias.

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        radius: int = 8,
        down_factor: int | None = None,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        if radius < 1 or (down_factor is not None and down_factor < 1):
            raise ValueError(f"radius and down_factor must be at least 1, got {radius} and {down_factor}")
        self.num_heads, self.radius, self.down_factor = num_heads, radius, down_factor
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        if down_factor:
            self.spatial_weight = nn.Parameter(torch.full((down_factor, down_factor), down_factor**-2.0, **dd))

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mix a map, [B, H, W, dim], and prefix tokens, [B, P, dim], which see each other and the whole map."""
        check_map(x)
        q, k, v = self._project(x)
        pooled = [] if self.down_factor is None else [tuple(map(self._pool, (k, v)))]
        if prefix is None:
            more_k, more_v = pooled[0] if pooled else (None, None)
            return self.proj(circular_attention(q, k, v, self.radius, more_k, more_v).flatten(-2))
        prefix_q, *prefix_kv = self._project(prefix)
        more_k, more_v = (torch.cat(parts, 1) for parts in zip(prefix_kv, *pooled, strict=True))
        out = circular_attention(q, k, v, self.radius, more_k, more_v)
        every = (torch.cat([a, b.flatten(1, 2)], 1) for a, b in zip(prefix_kv, (k, v), strict=True))
        tokens = attend(*(t.transpose(1, 2) for t in (prefix_q, *every))).transpose(1, 2)
        return self.proj(out.flatten(-2)), self.proj(tokens.flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def _pool(self, x: Tensor) -> Tensor:
        """Weighted sum over cells. [B, H, W, h, D] -> [B, H * W / f ** 2, h, D]"""
        f = self.down_factor
        if x.shape[1] % f or x.shape[2] % f:
            raise ValueError(f"down_factor = {f} must divide the sides of the map, got {tuple(x.shape[1:3])}")
        cells = x.unflatten(2, (-1, f)).unflatten(1, (-1, f))  # B H/f f W/f f h D
        return torch.einsum("bifjghd,fg->bijhd", cells, self.spatial_weight.to(x.dtype)).flatten(1, 2)


@declared
class HaloAttention(nn.Module):
    """Blocks of queries attend to their block and a halo around it (HaloNet, arXiv 2103.12731), without projection.

    logit = scale * q . k + q . height[key row - query row + S - 1] + q . width[...], rows counted from the window's and
    the block's first, S = block_size + 2 * halo_size.

    Args:
        dim: Channels. [B, H, W, dim] in and out, H and W multiples of ``block_size``.
        num_heads: Attention heads; they divide ``dim``.
        block_size: Side of a block.
        halo_size: Width of the halo.
        attend_padding: Whether zeros around the map are keys and values like any other, as in timm's models.

    Raises:
        ValueError: If an argument is not one of the allowed, or the map's size is no multiple of the block's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block_size: int = 8,
        halo_size: int = 3,
        attend_padding: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"block_size must be at least 1 and halo_size 0, got {block_size} and {halo_size}")
        self.num_heads, self.block_size, self.halo_size = num_heads, block_size, halo_size
        self.attend_padding = attend_padding
        self.window = block_size + 2 * halo_size
        self.scale = (dim // num_heads) ** -0.5
        self.q = Linear(dim, dim, bias=False, **dd)
        self.kv = Linear(dim, 2 * dim, bias=False, **dd)
        self.height_rel = nn.Parameter(torch.empty(2 * self.window - 1, dim // num_heads, **dd))
        self.width_rel = nn.Parameter(torch.empty(2 * self.window - 1, dim // num_heads, **dd))
        for weight in (self.q.weight, self.kv.weight):
            trunc_normal_(weight, std=dim**-0.5)
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        b, e = self.block_size, self.halo_size
        spatial = x.shape[1:3]
        if spatial[0] % b or spatial[1] % b:
            raise ValueError(f"block_size = {b} must divide the sides of the map, got {tuple(spatial)}")
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        if self.attend_padding:
            k, v = (F.pad(t, (0, 0, 0, 0, e, e, e, e)) for t in (k, v))
            groups = [_group(tuple(Axis(0, 1, L, Run(0, b, L // b, 0, self.window)) for L in spatial))]
        else:
            groups = _blocks(spatial, b, e)
        return _over_tiles(q, k, v, groups, self._attend).flatten(-2)

    def _attend(self, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shift = 0 if self.attend_padding else self.halo_size
        rows, columns = (_distances(a.run, q.device) + shift + self.window - 1 for a in group.axes)
        (ty, sy), (tx, sx) = rows.shape, columns.shape
        rows = rows[:, None].expand(-1, tx, -1).reshape(ty * tx, sy)
        columns = columns.expand(ty, -1, -1).reshape(ty * tx, sx)
        shape = q.shape[:2]
        by_row = (q @ self.height_rel.t().to(q.dtype)).gather(-1, rows.expand(*shape, -1, -1))
        by_column = (q @ self.width_rel.t().to(q.dtype)).gather(-1, columns.expand(*shape, -1, -1))
        logits = (q * self.scale) @ k.transpose(-1, -2) + (by_row[..., None] + by_column[..., None, :]).flatten(-2)
        return logits.softmax(-1) @ v
