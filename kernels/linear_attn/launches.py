"""Sizes of the launches of linear attention's Triton kernels. Letters: D head dim, V width of a value."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from visionattn.kernels.common.launch import Launch, pointer, power_of_2
from visionattn.kernels.common.precision import accumulator, precise_dtype, tf32_allowed
from visionattn.kernels.linear_attn.triton_kernels import (
    linear_keys,
    linear_keys_bwd,
    linear_queries,
    linear_queries_bwd,
)

__all__ = ["constants", "launches", "steps"]

# Wider heads would need more registers than there are, in full-width products sooner than in others.
MAX_WIDTH = {2: 96, 4: 64, 8: 64}
KEYS, QUERIES, QUERIES_BWD, KEYS_BWD = "keys", "queries", "queries_bwd", "keys_bwd"
PROGRAMS = 512  # enough for every GPU; a sum over tokens is split until there are as many
MAX_STEPS = 16


def launch_config(kernel: str, D: int, V: int, dtype: torch.dtype, hip: bool) -> dict[str, int]:
    """Sizes of one launch. Few on purpose: all of them are compiled ahead of time in the tests."""
    backward = kernel in (QUERIES_BWD, KEYS_BWD)
    block_d, block_v = max(16, power_of_2(D // 2)), max(16, power_of_2(V))
    wide = block_d * block_v > 2048
    block_n = {KEYS: 64 if dtype.itemsize <= 2 else 32, QUERIES: 64, QUERIES_BWD: 16, KEYS_BWD: 32}[kernel]
    many = wide or kernel == QUERIES_BWD or (dtype.itemsize > 2 and kernel != QUERIES)
    return {
        "BLOCK_N": 16 if dtype.itemsize == 8 else max(16, block_n // 2) if wide else block_n,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "num_warps": 8 if many and not (hip and backward) else 4,  # AMD's have twice the registers if they are few
        "num_stages": 1 if backward else 2,
    }


def steps(length: int, heads: int, block: int) -> int:
    """How many blocks of tokens one program adds up: a power of two, so that few kernels are compiled."""
    blocks = -(-length // block)
    steps = 1
    while steps < MAX_STEPS and heads * -(-blocks // (2 * steps)) >= PROGRAMS:
        steps *= 2
    return steps


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How products are formed: TF32 for 16-bit inputs, whose rounding it does not add to, and where the user allows."""
    tf32 = not hip and (dtype.itemsize == 2 or (dtype == torch.float32 and tf32_allowed()))
    return "tf32" if tf32 else "ieee"


def constants(kernel: str, D: int, V: int, dtype: torch.dtype, hip: bool, **form) -> dict:
    """Constants of one launch: sizes, precision, and what ``form`` of attention it is."""
    config = launch_config(kernel, D, V, dtype, hip) | {"PRECISION": precision(dtype, hip)}
    return {"D": D, "V": V, "ACC": accumulator(dtype), **config, **form}


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time: the form with every part, at several widths, also of features in float32."""
    sums = pointer(precise_dtype(dtype))
    tables = {"cos": sums, "sin": sums}
    key_form = {"MAP": "elu+1", "ROTARY": True, "WEIGHTED": True}
    query_form = {"MAP": "elu+1", "ROTARY": True, "NORMALIZER": "magnitude", "RESIDUAL": True, "GATE": True}
    numbers = {"heads": "i32", "N": "i32", "M": "i32"}
    numbers |= dict.fromkeys(("scale", "scale_low", "eps", "eps_low"), "fp32")
    widths = ((64, 64), (96, 96), (32, 32), (24, 24))
    for features, (D, V) in itertools.product({dtype: None, precise_dtype(dtype): None}, widths):
        if max(D, V) > MAX_WIDTH[features.itemsize]:
            continue
        f, x = pointer(features), pointer(dtype)
        three = ("i32:16" if D % 16 == 0 else "i32",) * 3
        keys = {"k": f, "v": x, "weights": sums, **tables}
        key_sizes = {"k_strides": three, "v_strides": three, "w_strides": ("i32",) * 3, "heads": "i32", "M": "i32"}
        queries = {"q": f, **tables, "state": sums, "key_sum": sums, "value_mean": sums, "residual": x, "gate": x}
        query_sizes = {f"{name}_strides": three for name in "qrg"} | numbers
        gradients = {"dstate": sums, "dkey_sum": sums}
        rows = (
            (linear_keys, KEYS, key_form, keys | {"state": sums, "key_sum": sums, "value_sum": sums} | key_sizes),
            (linear_queries, QUERIES, query_form, queries | {"out": x} | query_sizes),
            (
                linear_queries_bwd,
                QUERIES_BWD,
                query_form,
                {"grad": x, **queries, "dq": f, "dgate": x, **gradients, "dvalue_sum": sums, "o_strides": three}
                | query_sizes,
            ),
            (
                linear_keys_bwd,
                KEYS_BWD,
                key_form,
                keys | gradients | {"dvalue_mean": sums, "dk": f, "dv": x, "dweights": sums} | key_sizes,
            ),
        )
        for kernel, name, form, arguments in rows:
            split = {"STEPS": MAX_STEPS} if name in (KEYS, QUERIES_BWD) else {}
            config = constants(name, D, V, dtype, hip, **form, **split)
            # Triton 3.9 gets by without it; 3.8 spills about 1300 bytes a thread of the widest heads.
            may_spill = dtype == torch.float64 or (name == QUERIES_BWD and D > 64)
            yield Launch(kernel, config, arguments, (D, V) == (64, 64) and features == dtype, may_spill)
