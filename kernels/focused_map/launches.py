"""Sizes of the launches of the focused map's Triton kernels. Letters: C channels of all heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from visionattn.kernels.common.launch import Launch, pointer, power_of_2
from visionattn.kernels.common.precision import accumulator, precise_dtype
from visionattn.kernels.focused_map.triton_kernels import focused_bwd, focused_fwd

__all__ = ["constants", "launches"]

MAX_CHANNELS = 4096
PROGRAMS = 512  # enough for every GPU; the sum over tokens is split until there are as many
MAX_STEPS = 16


def launch_config(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of one launch. Few on purpose: all of them are compiled ahead of time in the tests."""
    block_c = max(64, power_of_2(C))
    elements = 1024 if dtype.itemsize == 8 else 2048
    return {"BLOCK_N": max(1, elements // block_c), "BLOCK_C": block_c, "num_warps": 4 if block_c <= 1024 else 8}


def constants(C: int, power: float, dtype: torch.dtype) -> dict:
    """Constants of one launch."""
    return {"POWER": int(power) if power == 3 else power, "ACC": accumulator(dtype)} | launch_config(C, dtype)


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time."""
    x, sums = pointer(dtype), pointer(precise_dtype(dtype))
    for C in (512, 64, 96, 1024, MAX_CHANNELS):
        size = {"rows": "i32", "N": "i32", "C": "i32:16"}
        config, typical = constants(C, 3.0, dtype), C == 512
        arguments = {"x": x, "factor": sums, "out": sums, "x_strides": ("i32:16",) * 2} | size
        yield Launch(focused_fwd, config, arguments, typical)
        arguments = {"grad": sums, "x": x, "factor": sums, "dx": x, "parts": sums}
        arguments |= {"grad_strides": ("i32:16",) * 2, "x_strides": ("i32:16",) * 2} | size
        yield Launch(focused_bwd, config | {"STEPS": MAX_STEPS}, arguments, typical, may_spill=dtype == torch.float64)
