"""Tile sizes of the neighborhood attention kernels. Letters: n ranks of one residue of an axis, K window side, T tile.

A program works on a tile of up to 8 x 8 ranks, or on a run of ranks of a 1-D map, and walks over the halo: everything
that its tile sees, or for the gradients of keys and values everything that sees its tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.common import backend as _dispatch
from visionattn.kernels.common import jit as _triton
from visionattn.kernels.neighborhood.geometry import first_seen

MAX_HEAD_DIM = 128
MAX_BIAS_WINDOW = 32  # a row of the halo, at most 64 wide then, is read in one step for the gradient of the bias

FORWARD, GRAD_QUERY, GRAD_QUERY_BIAS, GRAD_KEY = "forward", "grad_query", "grad_query_bias", "grad_key"


@functools.cache
def halo(length: int, tile: int, window: int, causal: bool, viewers: bool) -> int:
    """The largest halo of a tile along an axis, over all lengths that make as many tiles (few values, few kernels).

    Args:
        length: Ranks of the longest residue of the axis.
        tile: Ranks per tile.
        window: K.
        causal: Whether queries see only ranks up to their own.
        viewers: Whether the tile is one of keys and the halo the queries that see it.
    """
    inner = 2 + -(-2 * window // tile)  # with as many tiles, one is away from both borders
    tiles = min(-(-length // tile), inner)
    largest = 0
    for n in range(max((tiles - 1) * tile, window), max(tiles * tile, window) + 1):
        for first in range(0, n, tile):
            last = min(first + tile, n) - 1
            if viewers:
                seen = (first, min(last + window - 1, n - 1)) if causal else _viewers(first, last, n, window)
            else:
                end = last if causal else first_seen(last, n, window, causal) + window - 1
                seen = first_seen(first, n, window, causal), end
            largest = max(largest, seen[1] - seen[0] + 1)
    return largest


def _viewers(first: int, last: int, n: int, window: int) -> tuple[int, int]:
    left = 0 if first < window else first - (window - 1 - window // 2)
    return left, n - 1 if last >= n - window else last + window // 2


@functools.cache
def launch_config(
    kernel: str,
    head_dim: int,
    window: tuple[int, int, int],
    lengths: tuple[int, int, int],
    causal: tuple[bool, bool, bool],
    has_bias: bool,
    dtype: torch.dtype,
) -> dict:
    """Constants of one launch.

    Args:
        kernel: Which of the kernels.
        head_dim: D.
        window: K per axis: planes, rows, columns.
        lengths: Ranks of the longest residue per axis.
        causal: Whether queries see only ranks up to their own, per axis.
        has_bias: Whether there is a relative position bias.
        dtype: Of q, k and v.
    """
    shear = kernel == GRAD_QUERY_BIAS
    rows, block_n, warps, stages = _sizes(kernel, head_dim, dtype)
    tile = (1, min(8 * rows, 32 if shear else 64)) if window[1] == lengths[1] == 1 else (rows, 8)
    planes, rows, columns = (
        halo(length, side, K, past, kernel == GRAD_KEY)
        for length, side, K, past in zip(lengths, (1, *tile), window, causal, strict=True)
    )
    pitch = power_of_2(max(columns, 2 * window[2] - 1)) if shear else columns
    block_n = max(block_n, pitch) if shear else block_n
    constants = {
        "D": head_dim,
        "WINDOW": window,
        "CAUSAL": causal,
        "HAS_BIAS": has_bias,
        "TILE": tile,
        "PITCH": pitch,
        "PLANES": planes,
        "STEPS": -(-rows * pitch // block_n),
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, power_of_2(head_dim)),
        "num_warps": warps,
        "num_stages": stages,
    }
    if kernel in (GRAD_QUERY, GRAD_QUERY_BIAS):
        constants["BINS"] = max(16, power_of_2(2 * window[1] - 2 + block_n // pitch)) if shear else 0
    return constants


def _sizes(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows of a tile, positions of the halo per step, warps and stages: the largest that compile without spills.

    One spills all the same: the gradient of a bias wider than 8 of float32 heads of more than 64, which reads 32 keys a
    step and cannot have a tile of fewer than 16 queries.
    """
    if dtype.itemsize == 2:
        short = kernel == GRAD_KEY and (head_dim > 32 or head_dim % 16 > 0)
        return 8, 16 if short else 32, 4 if head_dim <= 64 else 8, 2
    # Full-width products run on the ordinary units, which hold their operands in registers.
    grad_query = kernel in (GRAD_QUERY, GRAD_QUERY_BIAS)
    if dtype.itemsize == 8 or (grad_query and head_dim > 64):
        return 2, 16, 8, 1
    return 4, 16, 8 if head_dim > (32 if grad_query else 64) else 4, 1


def launch(
    kernel: str,
    q: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    bias: Tensor | None,
) -> tuple[tuple[int], tuple, dict]:
    """Grid, size arguments and constants of a launch for queries of the shape of ``q``."""
    shape, window, steps = (three_axes(t, 1) for t in (q.shape[1:-2], kernel_size, dilation))
    lengths = tuple(-(-L // d) for L, d in zip(shape, steps, strict=True))
    causal = three_axes(is_causal, False)
    constants = dict(launch_config(kernel, q.shape[-1], window, lengths, causal, bias is not None, q.dtype))
    tile = constants["TILE"]
    tiles = (-(-lengths[1] // tile[0]), -(-lengths[2] // tile[1]))
    constants |= {"ACC": _triton.accumulator(q.dtype), "PRECISION": "ieee"}
    grid = q.shape[0] * shape[0] * tiles[0] * tiles[1] * steps[1] * steps[2] * q.shape[-2]
    return (grid,), (q.shape[-2], shape, steps, tiles), constants


def three_axes(values: Sequence, missing) -> tuple:
    """Values of up to three axes as those of planes, rows and columns."""
    return (missing,) * (3 - len(values)) + tuple(values)


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, planes, rows, columns and heads; 0 where there is one only, lest it count as another kernel."""
    steps = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return steps[0], *three_axes(steps[1:-2], 0), steps[-2]


def power_of_2(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def unsupported(
    q: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool], bias: Tensor | None
) -> str | None:
    """What of a call the Triton kernels do not cover, ``None`` if they cover it."""
    if q.dtype not in _dispatch._TRITON_DTYPES:
        return f"the dtype is {q.dtype}, the kernels cover {', '.join(map(str, _dispatch._TRITON_DTYPES))}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head dim is {q.shape[-1]}, the kernels cover up to {MAX_HEAD_DIM}"
    if bias is not None and max(kernel_size) > MAX_BIAS_WINDOW:
        return f"the window is {max(kernel_size)} wide, with a bias the kernels cover up to {MAX_BIAS_WINDOW}"
    if q.numel() // max(q.shape[-1], 1) >= 2**31:
        return "the kernels count positions times heads in 32 bits, there are 2**31 or more"
    return None
