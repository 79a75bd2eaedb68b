"""Sizes of the launches of bi-level routing attention's Triton kernels. D head dim of queries and keys, E of values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from visionattn.kernels.bilevel.regions import cut
from visionattn.kernels.bilevel.triton_kernels import bilevel_bwd_dkv, bilevel_bwd_dq, bilevel_fwd
from visionattn.kernels.common.launch import Launch, in_base_2, pointer, power_of_2
from visionattn.kernels.common.precision import accumulator, precise_dtype

__all__ = ["launch", "launches"]

MAX_HEAD_DIM = {2: 128, 4: 64, 8: 64}  # by the bytes of a number
FORWARD, GRAD_QUERY, GRAD_KEY = "forward", "grad_query", "grad_key"


def launch_config(kernel: str, D: int, E: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of one launch: the largest that compile without spills.

    Args:
        kernel: Which of the kernels.
        D: Head dim of queries and keys.
        E: Head dim of values.
        tokens: Tokens of the regions that are cut into blocks: of keys for their gradients, else of queries.
        dtype: Of q, k and v.
    """
    widest = max(D, E)
    block = max(16, min(power_of_2(tokens), 64))
    if dtype.itemsize == 2:
        step = 32 if widest > 64 or kernel == GRAD_KEY else 64
        if widest > 64 and kernel != FORWARD:
            block, step = min(block, 32), 16 if kernel == GRAD_KEY else 32
        warps, stages = 4 if widest > 64 else block // 16, 2
    else:  # full-width products run on the ordinary units, which hold their operands in registers
        narrow = dtype.itemsize == 8 or (widest > 32 and kernel == GRAD_KEY)
        block, step = min(block, 16 if narrow else 32), 16
        warps, stages = 8 if narrow else 4, 1
    own, other = ("BLOCK_N", "BLOCK_M") if kernel == GRAD_KEY else ("BLOCK_M", "BLOCK_N")
    return {
        "D": D,
        "E": E,
        own: block,
        other: step,
        "BLOCK_D": max(16, power_of_2(D)),
        "BLOCK_E": max(16, power_of_2(E)),
        "num_warps": warps,
        "num_stages": stages,
    }


def _precision(dtype: torch.dtype) -> dict:
    return {"ACC": accumulator(dtype), "PRECISION": "ieee"}


def launch(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, K: int, region: Sequence[int], key_region: Sequence[int], scale: float
) -> tuple[tuple[int], tuple, dict]:
    """Grid, size arguments and constants."""
    B, H, W, h, D = q.shape
    down, _, across, _ = cut(H, W, *region)
    tokens = math.prod(key_region if kernel == GRAD_KEY else region)
    config = launch_config(kernel, D, v.shape[-1], tokens, q.dtype)
    config |= _precision(q.dtype)
    if kernel != GRAD_KEY:
        config["STEPS"] = -(-K * math.prod(key_region) // config["BLOCK_N"])
    blocks = -(-tokens // config["BLOCK_N" if kernel == GRAD_KEY else "BLOCK_M"])
    sizes = (h, (H, W), tuple(k.shape[1:3]), tuple(region), tuple(key_region), across, down * across, K)
    return (B * down * across * blocks * h,), (*sizes, *in_base_2(scale)), config


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time."""
    x, sums = pointer(dtype), pointer(precise_dtype(dtype))
    two = ("i32",) * 2
    sizes = {"heads": "i32", "shape": two, "key_shape": two, "region": two, "key_region": two}
    sizes |= {"across": "i32", "regions": "i32", "K": "i32", "scale": "fp32", "scale_low": "fp32"}
    for D, E, tokens in (  # of a region
        (32, 32, 64),
        (32, 32, 16),
        (32, 32, 4),
        (24, 24, 64),
        (64, 64, 64),
        (128, 128, 64),
        (32, 64, 30),
    ):
        if max(D, E) > MAX_HEAD_DIM[dtype.itemsize]:
            continue
        four = ("i32:16" if D % 16 == 0 else "i32",) * 4
        inputs = {"q": x, "k": x, "v": x, "lse": sums} | {f"{name}_strides": four for name in ("q", "k", "v", "out")}
        inputs |= sizes
        backward = inputs | {"grad": x, "delta": sums, "grad_strides": four}
        routes = {"routes": pointer(torch.int64)}
        sorted_routes = {"sources": pointer(torch.int32), "starts": pointer(torch.int32)}
        for kernel, name, steps, arguments in (
            (bilevel_fwd, FORWARD, {"STEPS": 4}, inputs | routes | {"out": x}),
            (bilevel_bwd_dq, GRAD_QUERY, {"STEPS": 4}, backward | routes | {"out": x, "dq": x, "dq_strides": four}),
            (
                bilevel_bwd_dkv,
                GRAD_KEY,
                {},
                backward | sorted_routes | {"dk": x, "dv": x, "dk_strides": four, "dv_strides": four},
            ),
        ):
            config = launch_config(name, D, E, tokens, dtype) | _precision(dtype) | steps
            typical = (D, E, tokens) == (32, 32, 64)
            yield Launch(kernel, config, arguments, typical, may_spill=dtype == torch.float64)
