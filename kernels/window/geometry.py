"""Distances and masks of the tokens of a window. B batch, h heads, w window sides, S tokens of a window.

The functions can be scripted, and exported with sides of the map that are symbols.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dense_bias", "relative_index", "shift_mask", "table_gradient"]


def relative_index(w0: int, w1: int, device: torch.device) -> Tensor:
    """Row of the bias table of every query and key of a window. [S * S]"""
    rows, columns = torch.arange(w0, device=device), torch.arange(w1, device=device)
    dy, dx = rows[:, None] - rows + w0 - 1, columns[:, None] - columns + w1 - 1
    return (dy[:, None, :, None] * (2 * w1 - 1) + dx[None, :, None, :]).reshape(-1)


def dense_bias(bias: Tensor, w0: int, w1: int) -> Tensor:
    """The bias of every query and key of a window, from the table. [h, S, S]"""
    S = w0 * w1
    return bias[relative_index(w0, w1, bias.device)].reshape(S, S, -1).permute(2, 0, 1)


def _apart(w: int, shift: int, windows: int, device: torch.device) -> Tensor:
    """Whether two places along an axis of a window are from the two ends of the map. [windows, w, w]"""
    late = torch.arange(w, device=device) >= w - shift
    last = torch.arange(windows, device=device) == windows - 1
    return last[:, None, None] & (late[:, None] != late)


def shift_mask(window: list[int], shift: list[int], rows: int, columns: int, device: torch.device) -> Tensor:
    """Which tokens of shifted windows are from two ends of the map. [rows * columns, S, S]"""
    w0, w1 = window[0], window[1]
    by_row = _apart(w0, shift[0], rows, device)[:, None, :, None, :, None]
    by_column = _apart(w1, shift[1], columns, device)[None, :, None, :, None, :]
    mask = (by_row | by_column).expand(rows, columns, w0, w1, w0, w1)
    return mask.reshape(rows * columns, w0 * w1, w0 * w1)


def table_gradient(total: Tensor, w0: int, w1: int) -> Tensor:
    """Sum what is given for every query and key of a window over those of the same distance.

    [h, S, S] -> [(2 * w0 - 1) * (2 * w1 - 1), h]
    """
    x = total.reshape(-1, w0, w1, w0, w1).permute(0, 1, 3, 2, 4)  # h, rows of query and key, columns of both
    x = _diagonals(_diagonals(x.flatten(1, 2).unflatten(1, (w0, w0)), 1), 2)
    return x.flatten(1).t()


def _diagonals(x: Tensor, axis: int) -> Tensor:
    """Sums over pairs of equal difference, of the axes ``axis`` and ``axis + 1`` of one length. [..., 2 w - 1, ...]"""
    w = x.shape[axis]
    x = x.flip(axis + 1).movedim((axis, axis + 1), (-2, -1))
    x = F.pad(x, (0, w)).flatten(-2)[..., : w * (2 * w - 1)].unflatten(-1, (w, 2 * w - 1)).sum(-2)
    return x.movedim(-1, axis)
