"""Sizes of the launches of window attention's Triton kernels. D head dim, w window sides, S tokens of a window."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from visionattn.kernels.common.launch import Launch, pointer, power_of_2
from visionattn.kernels.common.precision import accumulator, precise_dtype
from visionattn.kernels.window.triton_kernels import (
    window_bias,
    window_bwd,
    window_bwd_dkv,
    window_bwd_dq,
    window_fwd,
)

__all__ = ["bias_constants", "constants", "in_one_program", "launches", "side"]

MAX_HEAD_DIM = 128
MAX_TOKENS = 1024  # of a window: the bias of all pairs of them is written out for every head
PROGRAMS = 1024  # below, programs take one window only; an H200 runs some hundred at a time
FORWARD, BACKWARD, GRAD_QUERY, GRAD_KEY, GRAD_BIAS = "forward", "backward", "grad_query", "grad_key", "grad_bias"


def launch_config(kernel: str, D: int, window: tuple[int, int], dtype: torch.dtype, hip: bool = False) -> dict:
    """Constants of one launch: the largest sizes that compile without spills.

    Args:
        kernel: Which of the kernels.
        D: Head dim.
        window: Sides of a window.
        dtype: Of q, k and v.
        hip: Whether the device is AMD's.
    """
    tokens = min(max(16, power_of_2(window[0] * window[1])), 64)
    if dtype.itemsize == 2:
        whole = D <= 32 or kernel == GRAD_KEY or (kernel == FORWARD and not (hip and D > 64))
        step = tokens if whole else min(tokens, 32)
        block = min(tokens, 32) if D > 64 and kernel == GRAD_BIAS else tokens
        many = D > 64 or (D > 32 and kernel == GRAD_KEY) or (tokens == 64 and kernel == BACKWARD)
        warps, stages = 8 if many and not hip else 4, 2  # a warp of AMD's has twice the threads
    else:  # full-width products run on the ordinary units, which hold their operands in registers
        wide = dtype.itemsize == 8 or D > 32
        block, step, warps, stages = min(tokens, 16 if D > 64 else 32), 16, 8 if wide else 4, 1
    if kernel == GRAD_KEY:
        block, step = step, block
    constants = {"D": D, "WINDOW": window, "BLOCK_M": block, "BLOCK_N": step, "BLOCK_D": max(16, power_of_2(D))}
    if kernel == BACKWARD:
        del constants["BLOCK_N"]
    return constants | {"SIDE": side(window), "num_warps": warps, "num_stages": stages}


def side(window: tuple[int, int]) -> int:
    """Tokens of a window, rounded up to whole blocks."""
    tokens = window[0] * window[1]
    return max(16, power_of_2(tokens)) if tokens <= 64 else -(-tokens // 64) * 64


def in_one_program(D: int, window: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a program computes all gradients of a window."""
    tokens = max(16, power_of_2(window[0] * window[1]))
    return tokens * max(16, power_of_2(D)) <= (2048 if dtype.itemsize == 2 else 512) and tokens <= 64


def constants(
    kernel: str, D: int, window: tuple[int, int], dtype: torch.dtype, hip: bool, shift, bias: bool, padding: bool
) -> dict:
    """Constants of one launch: sizes, and what form of attention it is."""
    form = {"SHIFT": tuple(shift), "HAS_BIAS": bias, "HAS_PADDING": padding}
    form |= {"ACC": accumulator(dtype), "PRECISION": "ieee"}
    return launch_config(kernel, D, window, dtype, hip) | form


def bias_constants(window: tuple[int, int]) -> dict:
    """Constants of the launch that writes out the bias."""
    block = min(side(window), 64)
    return {"WINDOW": window, "SIDE": side(window), "BLOCK_M": block, "BLOCK_N": block}


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time."""
    x, sums = pointer(dtype), pointer(precise_dtype(dtype))
    numbers = {"heads": "i32", "shape": ("i32",) * 2, "windows": ("i32",) * 2, "total": "i32"}
    numbers |= dict.fromkeys(("scale", "scale_low", "masked", "masked_low"), "fp32")
    for D, window in (
        (32, (7, 7)),
        (32, (12, 12)),
        (32, (4, 4)),
        (24, (8, 8)),
        (64, (7, 7)),
        (128, (7, 7)),
        (64, (24, 24)),
    ):
        step = "i32:16" if D % 16 == 0 else "i32"
        whole = in_one_program(D, window, dtype)
        inputs = {"qkv": x, "added": sums, "padding": x, "lse": sums, "qkv_strides": (step,) * 5} | numbers
        backward = inputs | {"grad": x, "dqkv": x, "grad_strides": (step,) * 4}
        parts = {"bias_parts": sums, "padding_parts": sums}
        rows = [(window_fwd, FORWARD, {"RUN": 4}, inputs | {"out": x})]
        if whole:
            rows.append((window_bwd, BACKWARD, {"RUN": 16, "BIAS_GRAD": True}, backward | parts))
        else:
            rows.append((window_bwd_dq, GRAD_QUERY, {}, backward | {"out": x, "delta": sums}))
            for name, form in (
                (GRAD_KEY, {"RUN": 1, "BIAS_GRAD": False}),
                (GRAD_BIAS, {"RUN": 16, "BIAS_GRAD": True}),
            ):
                rows.append((window_bwd_dkv, name, form, backward | parts | {"delta": sums}))
        # The largest window that one program takes, and one that is cut into blocks.
        first = D == 32 and window in ((7, 7) if dtype.itemsize == 2 else (4, 4), (12, 12))
        for kernel, name, form, arguments in rows:
            for bias, padding in ((True, True), (False, False)):
                if bias or not form.get("BIAS_GRAD"):
                    shift = (window[0] // 2, window[1] // 2)
                    config = constants(name, D, window, dtype, hip, shift, bias, padding) | form
                    yield Launch(kernel, config, arguments, first and bias, may_spill=dtype == torch.float64)
        arguments = {"bias": x, "added": sums, "heads": "i32"}
        yield Launch(window_bias, bias_constants(window), arguments, first, may_spill=dtype == torch.float64)
