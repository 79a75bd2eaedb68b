"""Tile sizes of the neighborhood attention kernels. Letters: n ranks of one residue of an axis, K window side, T tile.

A program works on a tile of up to 8 x 8 ranks, or on a run of ranks of a 1-D map, and walks over the halo: everything
that its tile sees, or for the gradients of keys and values everything that sees its tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from visionattn.kernels.common.checks import unsupported_count, unsupported_dtype
from visionattn.kernels.common.launch import Launch, pointer, power_of_2, strides
from visionattn.kernels.common.precision import accumulator, precise_dtype
from visionattn.kernels.neighborhood.geometry import first_seen
from visionattn.kernels.neighborhood.triton_kernels import (
    neighborhood_bwd_dkv,
    neighborhood_bwd_dq,
    neighborhood_fwd,
)

__all__ = ["launch", "launches", "strides_of", "unsupported"]


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


def _precision(dtype: torch.dtype) -> dict:
    return {"ACC": accumulator(dtype), "PRECISION": "ieee"}


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
    constants |= _precision(q.dtype)
    grid = q.shape[0] * shape[0] * tiles[0] * tiles[1] * steps[1] * steps[2] * q.shape[-2]
    return (grid,), (q.shape[-2], shape, steps, tiles), constants


def three_axes(values: Sequence, missing) -> tuple:
    """Values of up to three axes as those of planes, rows and columns."""
    return (missing,) * (3 - len(values)) + tuple(values)


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, planes, rows, columns and heads."""
    steps = strides(x)
    return steps[0], *three_axes(steps[1:-1], 0), steps[-1]


def unsupported(
    q: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool], bias: Tensor | None
) -> str | None:
    """What of a call the Triton kernels do not cover, ``None`` if they cover it."""
    if reason := unsupported_dtype(q):
        return reason
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head dim is {q.shape[-1]}, the kernels cover up to {MAX_HEAD_DIM}"
    if bias is not None and max(kernel_size) > MAX_BIAS_WINDOW:
        return f"the window is {max(kernel_size)} wide, with a bias the kernels cover up to {MAX_BIAS_WINDOW}"
    return unsupported_count(q.numel() // max(q.shape[-1], 1), "positions times heads")


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time."""
    x, sums = pointer(dtype), pointer(precise_dtype(dtype))
    for D, window, lengths, dilated in (  # head dim, window, ranks of the longest residue, whether there is dilation
        (32, (1, 7, 7), (1, 56, 56), False),
        (32, (1, 7, 7), (1, 14, 14), True),
        (24, (1, 7, 7), (1, 56, 56), False),
        (64, (1, 7, 7), (1, 56, 56), False),
        (128, (1, 7, 7), (1, 56, 56), False),
        (32, (1, 3, 3), (1, 28, 28), False),
        (32, (1, 13, 13), (1, 56, 56), False),
        (32, (1, 1, 31), (1, 1, 500), False),
        (32, (3, 7, 7), (8, 28, 28), True),
    ):
        five = ("i32:16" if D % 16 == 0 else "i32",) * 5
        fixed = {} if dilated else {"dilation": (1, 1, 1)}  # Triton makes a constant of every 1
        sizes = {"heads": "i32", "shape": ("i32",) * 3, "tiles": ("i32",) * 2, "scale": "fp32", "scale_low": "fp32"}
        sizes |= {"dilation": ("i32",) * 3} if dilated else {}
        first = D == 32 and window == (1, 7, 7) and not dilated
        inputs = {"q": x, "k": x, "v": x, "bias": x, "lse": sums}
        inputs |= {f"{name}_strides": five for name in ("q", "k", "v", "out")} | sizes
        backward = inputs | {"grad": x, "delta": sums, "grad_strides": five}
        for kernel, name, biases, arguments in (
            (neighborhood_fwd, FORWARD, (True, False), inputs | {"out": x}),
            (neighborhood_bwd_dq, GRAD_QUERY_BIAS, (True,), backward | {"out": x, "dq": x, "bias_parts": sums}),
            (neighborhood_bwd_dq, GRAD_QUERY, (False,), backward | {"out": x, "dq": x, "bias_parts": sums}),
            (neighborhood_bwd_dkv, GRAD_KEY, (True, False), backward | {"dk": x, "dv": x}),
        ):
            for bias in biases:
                config = launch_config(name, D, window, lengths, (False,) * 3, bias, dtype)
                constants = config | _precision(dtype) | fixed
                yield Launch(kernel, constants, arguments, first and bias, may_spill=dtype == torch.float64)
