"""Which keys a query of neighborhood attention sees, one axis at a time. Letters: L axis length, K window side.

On an axis with dilation d, position i has residue i mod d and rank i div d. It sees K successive ranks of its residue:
those around its own, the window moved inwards where it would leave the axis. On a causal axis it sees its own rank and
the K - 1 before it, as far as there are any.

The functions of tensors can be scripted, and exported with lengths that are symbols.
"""

import torch
from torch import Tensor

__all__ = ["axis_mask", "axis_windows", "first_seen", "map_windows", "window_start"]


def window_start(rank: Tensor, length: Tensor, window: int, causal: bool) -> Tensor:
    """First key rank seen from a query rank, in a group of ``length`` positions of one residue.

    An even window reaches one further to the left than to the right.
    """
    if causal:
        return (rank - (window - 1)).clamp(min=0)
    return torch.minimum((rank - window // 2).clamp(min=0), length - window)


def first_seen(rank: int, length: int, window: int, causal: bool) -> int:
    """:func:`window_start` of one rank."""
    return max(0, rank - window + 1) if causal else max(0, min(rank - window // 2, length - window))


def _ranks(
    length: int, window: int, dilation: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every position: its rank, its residue, and the first rank that it sees. [L]"""
    position = torch.arange(length, device=device)
    rank, residue = position // dilation, position % dilation
    # Positions of this residue: they differ by one where d does not divide L.
    return rank, residue, window_start(rank, (length - residue + dilation - 1) // dilation, window, causal)


def axis_windows(
    length: int, window: int, dilation: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every position of an axis.

    Returns:
        Key positions, key rank minus query rank + K - 1 (the index into the bias), and whether the slot exists; one
        that does not shows the query itself. All [L, K]
    """
    rank, residue, start = _ranks(length, window, dilation, causal, device)
    rank = rank[:, None]
    slots = start[:, None] + torch.arange(window, device=device)
    exists = torch.ones_like(slots, dtype=torch.bool)
    if causal:
        exists = slots <= rank
        slots = torch.where(exists, slots, rank)
    return slots * dilation + residue[:, None], slots - rank + window - 1, exists


def axis_mask(length: int, window: int, dilation: int, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every position of an axis by every other: the index into the bias, and whether it sees it. [L, L]"""
    rank, residue, start = _ranks(length, window, dilation, causal, device)
    slot = rank - start[:, None]
    offset = rank - rank[:, None] + window - 1
    seen = (residue == residue[:, None]) & (slot >= 0) & (slot < window)
    if causal:
        seen = seen & (offset < window)
    return offset.clamp(0, 2 * window - 2), seen


def map_windows(
    spatial: list[int], window: list[int], dilation: list[int], causal: list[bool], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The window of every position of a map: the product of its axes' windows, row-major.

    Returns:
        Flat key positions, flat indices into the bias table, and whether the slot exists. All [N, S]
        with N the positions of the map and S those of a window.
    """
    keys = torch.zeros(1, 1, dtype=torch.long, device=device)
    offsets, exists = keys, keys == 0
    for L, K, d, past_only in zip(spatial, window, dilation, causal):  # noqa: B905 - TorchScript knows no strict
        axis_keys, axis_offsets, axis_exists = axis_windows(L, K, d, past_only, device)
        keys = (keys[:, None, :, None] * L + axis_keys[:, None]).flatten(2).flatten(0, 1)
        offsets = (offsets[:, None, :, None] * (2 * K - 1) + axis_offsets[:, None]).flatten(2).flatten(0, 1)
        exists = (exists[:, None, :, None] & axis_exists[:, None]).flatten(2).flatten(0, 1)
    return keys, offsets, exists
