"""Which keys a query of neighborhood attention sees, one axis at a time. Letters: L axis length, K window side.

On an axis with dilation d, position i has residue i mod d and rank i div d. It sees K successive ranks of its residue:
those around its own, the window moved inwards where it would leave the axis. On a causal axis it sees its own rank and
the K - 1 before it, as far as there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, bool)


def per_axis(name: str, value: T | Sequence[T], axes: int, kind: type) -> tuple[T, ...]:
    """One value for every axis, or the values given.

    Raises:
        ValueError: If it is neither, or not of the type ``kind``.
    """
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    kinds = (int, torch.SymInt) if kind is int else (kind,)
    wrong = any(not isinstance(v, kinds) or isinstance(v, bool) != (kind is bool) for v in values)
    if len(values) != axes or wrong:
        what = {int: "an int", bool: "a bool"}[kind]
        raise ValueError(f"{name} must be {what} or {axes} of them, one per spatial axis, got {value!r}")
    return values


def window_start(rank: Tensor, length: Tensor | int, window: int, causal: bool) -> Tensor:
    """First key rank seen from a query rank, in a group of ``length`` positions of one residue.

    An even window reaches one further to the left than to the right.
    """
    if causal:
        return (rank - (window - 1)).clamp(min=0)
    return torch.minimum((rank - window // 2).clamp(min=0), torch.as_tensor(length - window, device=rank.device))


def axis_windows(
    length: int, window: int, dilation: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every position of an axis.

    Returns:
        Key positions, key rank minus query rank + K - 1 (the index into the bias), and whether the slot exists; one
        that does not shows the query itself. All [L, K]
    """
    position = torch.arange(length, device=device)
    rank, residue = position // dilation, position % dilation
    group = (length - residue + dilation - 1) // dilation
    slots = window_start(rank, group, window, causal)[:, None] + torch.arange(window, device=device)
    exists = slots <= rank[:, None] if causal else torch.ones_like(slots, dtype=torch.bool)
    slots = torch.where(exists, slots, rank[:, None])
    return slots * dilation + residue[:, None], slots - rank[:, None] + window - 1, exists


def map_windows(
    spatial: Sequence[int],
    window: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every position of a map: the product of its axes' windows, row-major.

    Returns:
        Flat key positions, flat indices into the bias table, and whether the slot exists. All [N, S]
        with N the positions of the map and S those of a window.
    """
    keys = offsets = torch.zeros(1, 1, dtype=torch.long, device=device)
    exists = torch.ones(1, 1, dtype=torch.bool, device=device)

    def product(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        return outer[:, None, :, None], inner[None, :, None, :]

    for L, K, d, past_only in zip(spatial, window, dilation, causal, strict=True):
        axis_keys, axis_offsets, axis_exists = axis_windows(L, K, d, past_only, device)
        shape = (keys.shape[0] * L, keys.shape[1] * K)
        outer, inner = product(keys, axis_keys)
        keys = (outer * L + inner).reshape(shape)
        outer, inner = product(offsets, axis_offsets)
        offsets = (outer * (2 * K - 1) + inner).reshape(shape)
        outer, inner = product(exists, axis_exists)
        exists = (outer & inner).reshape(shape)
    return keys, offsets, exists
