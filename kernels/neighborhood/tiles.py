"""Cutting a map into tiles of queries that share their keys, for neighborhood attention in operators of PyTorch.

A tile of T successive ranks of an axis sees a span of at most T + K - 1 key ranks. The tiles of an axis form a few
runs; those of a run are alike, so that one mask serves them all: the first tile, those within, the last. On a dilated
axis this is done for the positions of one residue, of which there are two kinds where d does not divide L: d - L mod d
residues with L div d positions, and L mod d with one more. A group is a choice of residues and run for every axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.neighborhood.geometry import first_seen, window_start

# Measured on the CPU with head dim 32: a tile of n queries costs as much as n + 24 times the keys it sees, and another
# group as much as some 7000 pairs of query and key.
TILE_COST = 24
GROUP_COST = 7000
SIDES = (*range(1, 17), *range(20, 68, 4))


class Run(NamedTuple):
    """``count`` tiles side by side: the first query rank, tile side, and first key rank and key ranks of a tile."""

    first: int
    tile: int
    count: int
    first_key: int
    span: int


class Axis(NamedTuple):
    """The tiles of one kind of residue: the first residue, how many there are, and a run of tiles in each."""

    residue: int
    residues: int
    length: int
    run: Run


class Group(NamedTuple):
    """Tiles that are alike: their axes, how many they are, and how many queries and keys each has."""

    axes: tuple[Axis, ...]
    tiles: int
    queries: int
    keys: int


def _run(first: int, tile: int, count: int, length: int, window: int, causal: bool) -> Run:
    last = first + tile - 1
    first_key = first_seen(first, length, window, causal)
    end = last + 1 if causal else first_seen(last, length, window, causal) + window
    return Run(first, tile, count, first_key, end - first_key)


def _cuts(length: int, window: int, causal: bool) -> list[tuple[tuple[Run, ...], int, int]]:
    """Ways to cut an axis into runs, each with its pairs of query and key and its keys; none worse than another."""
    before, after = (window - 1, 0) if causal else (window // 2, window - 1 - window // 2)

    def cut(*tiles: tuple[int, int]) -> tuple[tuple[Run, ...], int, int]:
        runs, first = [], 0
        for tile, count in tiles:
            if tile and count:
                runs.append(_run(first, tile, count, length, window, causal))
                first += tile * count
        return tuple(runs), sum(r.tile * r.span * r.count for r in runs), sum(r.span * r.count for r in runs)

    found = [cut((length, 1)), cut(((length + 1) // 2, 1), (length // 2, 1))]
    for side in SIDES:
        # The tiles within see whole windows: their first query has `before` positions before it, their last `after`.
        for head in range(before, min(before + side, length) + 1):
            rest = length - head - after
            count = max(rest // side, 0)
            if count:
                found.append(cut((head, 1), (side, count), (length - head - side * count, 1)))
    found.sort(key=lambda c: (c[1], c[2], len(c[0])))
    best: list[tuple[tuple[Run, ...], int, int]] = []
    for candidate in found:
        if not any(b[2] <= candidate[2] and len(b[0]) <= len(candidate[0]) for b in best):
            best.append(candidate)
    return best


def plan(
    spatial: tuple[int, ...], window: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...], heads: int
) -> tuple[Group, ...]:
    """Cut a map into groups of tiles so that attention costs least."""
    return _plan(spatial, window, dilation, causal, heads)


# A compiler takes the plan as it is and does not trace the search for it. torch.compiler.assume_constant_result sets
# the same mark, but imports Dynamo for it, and Triton with that.
plan._dynamo_marked_constant = True


@lru_cache(maxsize=256)
def _plan(
    spatial: tuple[int, ...], window: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...], heads: int
) -> tuple[Group, ...]:
    kinds = []  # per axis: first residue, residues, length
    for L, d in zip(spatial, dilation, strict=True):
        longer = L % d
        kinds.append([kind for kind in ((0, longer, L // d + 1), (longer, d - longer, L // d)) if kind[1]])
    groups = []
    for kind in itertools.product(*kinds):
        phases = math.prod(residues for _, residues, _ in kind)
        cuts = [_cuts(length, K, c) for (_, _, length), K, c in zip(kind, window, causal, strict=True)]
        cost = GROUP_COST / (heads * phases)

        def price(choice: Sequence[tuple[tuple[Run, ...], int, int]], cost: float = cost) -> float:
            pairs, keys, runs = (math.prod(column) for column in zip(*((p, k, len(r)) for r, p, k in choice)))  # noqa: B905
            return pairs + TILE_COST * keys + cost * runs

        best = min(itertools.product(*cuts), key=price)
        for runs in itertools.product(*(cut[0] for cut in best)):
            axes = tuple(Axis(*k, run) for k, run in zip(kind, runs, strict=True))
            sizes = zip(*((a.residues * r.count, r.tile, r.span) for a, r in zip(axes, runs, strict=True)), strict=True)
            groups.append(Group(axes, *map(math.prod, sizes)))
    return tuple(groups)


def _flat(parts: Sequence[tuple[Tensor, Tensor, Tensor]], spatial: Sequence[int]) -> Tensor:
    """Flat map positions of per-axis residues, tiles and members, in the order residues, tiles, members of all axes."""
    total: Tensor | int = 0
    axes, stride = len(parts), 1
    for axis in reversed(range(axes)):
        for kind, values in enumerate(parts[axis]):
            shape = [1] * (3 * axes)
            shape[kind * axes + axis] = -1
            total = total + (values * stride).view(shape)
        stride *= spatial[axis]
    return total.flatten()


def positions(group: Group, spatial: Sequence[int], dilation: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
    """Flat map positions of a group's queries, [tiles * queries], and of its keys, [tiles * keys]."""
    queries, keys = [], []
    for (residue, residues, _, run), d in zip(group.axes, dilation, strict=True):
        phase = torch.arange(residue, residue + residues, device=device)
        tile = torch.arange(run.count, device=device) * (run.tile * d)
        queries.append((phase, tile, (torch.arange(run.tile, device=device) + run.first) * d))
        keys.append((phase, tile, (torch.arange(run.span, device=device) + run.first_key) * d))
    return _flat(queries, spatial), _flat(keys, spatial)


def offsets(axis: Axis, window: int, causal: bool, device: Any) -> tuple[Tensor, Tensor]:
    """Index into an axis of the bias for every query and key of a tile, and whether the query sees the key.

    [T, span] both
    """
    _, _, length, run = axis
    query = torch.arange(run.first, run.first + run.tile, device=device)[:, None]
    key = torch.arange(run.first_key, run.first_key + run.span, device=device)
    start = window_start(query, torch.full_like(query, length), window, causal)
    return key - query + window - 1, (key >= start) & (key < start + window) & ((key <= query) | (not causal))


def bias_index(group: Group, window: Sequence[int], causal: Sequence[bool], device: Any) -> Tensor:
    """Flat index into the bias for every query and key of a tile; its size where the query does not see the key.

    [queries * keys]
    """
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    every = index == 0
    for axis, K, c in zip(group.axes, window, causal, strict=True):
        offset, seen = offsets(axis, K, c, device)
        index = (index[:, None, :, None] * (2 * K - 1) + offset[:, None]).flatten(2).flatten(0, 1)
        every = (every[:, None, :, None] & seen[:, None]).flatten(2).flatten(0, 1)
    index = torch.where(every, index, math.prod(2 * K - 1 for K in window))
    return index.flatten().to(torch.int32)  # half the memory to keep


class Tables(NamedTuple):
    """What a plan needs as tensors.

    Attributes:
        queries: Flat map positions of the queries, group after group.
        keys: Those of the keys.
        inverse: Where the queries lie in that order. [N]
        bias: Those of their pairs in the bias, see :func:`bias_index`.
        dense: Whether all queries see all keys of their tiles, so that there is nothing to mask.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    inverse: Tensor
    bias: tuple[Tensor, ...]
    dense: bool


def tables(
    groups: Sequence[Group],
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    device: Any,
) -> Tables:
    """Make the index tensors of a plan."""
    index = [positions(group, spatial, dilation, device) for group in groups]
    queries, keys = zip(*index, strict=True)
    order = torch.cat(queries)
    inverse = order.scatter(0, order, torch.arange(order.numel(), device=device))
    bias = tuple(bias_index(group, window, causal, device) for group in groups)
    dense = all(
        axis.run.tile == 1 or (axis.run.span == K and not c)
        for group in groups
        for axis, K, c in zip(group.axes, window, causal, strict=True)
    )
    return Tables(queries, keys, inverse, bias, dense)


def cut(
    x: Tensor, window: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...], kept: bool
) -> tuple[tuple[Group, ...], Tables]:
    """The plan for a tensor [B, *spatial, heads, D] and its tables on the tensor's device.

    Args:
        kept: Whether they are kept for the next call of the same shape; only where tensors outlive the call.
    """
    shape = tuple(x.shape)
    return (_kept if kept else _made)(shape[1:-2], window, dilation, causal, shape[-2], x.device)


def _made(spatial, window, dilation, causal, heads, device) -> tuple[tuple[Group, ...], Tables]:
    groups = plan(spatial, window, dilation, causal, heads)
    return groups, tables(groups, spatial, window, dilation, causal, device)


@lru_cache(maxsize=64)
def _kept(*arguments: Any) -> tuple[tuple[Group, ...], Tables]:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used for training later
        return _made(*arguments)


def additive_masks(
    bias: Tensor | None, groups: Sequence[Group], tables: Tables, window: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """What is added to the logits of each group: the bias, and -inf where a query does not see a key.

    Returns:
        One per group. [h or 1, queries, keys]
    """
    if bias is None:
        bias = torch.zeros(1, math.prod(2 * K - 1 for K in window), dtype=dtype, device=tables.inverse.device)
    elif bias.dtype in (torch.float16, torch.bfloat16):
        bias = bias.float()  # its gradient is a sum over many pairs
    bias = bias.flatten(1)
    if not tables.dense:
        bias = F.pad(bias, (0, 1), value=-torch.inf)  # what the index of unseen pairs points to
    return [
        bias.index_select(1, i).view(-1, group.queries, group.keys).to(dtype)
        for group, i in zip(groups, tables.bias, strict=True)
    ]
