"""Checks of arguments that operators share, and what their Triton kernels refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from visionattn.kernels.common.mode import autocasting

__all__ = ["check_same", "per_axis", "unsupported_count", "unsupported_dtype", "unsupported_map"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

T = TypeVar("T", int, bool)


def per_axis(name: str, value: T | Sequence[T], axes: int, kind: type) -> tuple[T, ...]:
    """One value for every axis, or the values given.

    Raises:
        ValueError: If it is neither, or not of the type ``kind``.
    """
    if type(value) is kind:
        return (value,) * axes
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    kinds = (int, torch.SymInt) if kind is int else (kind,)
    wrong = any(not isinstance(v, kinds) or isinstance(v, bool) != (kind is bool) for v in values)
    if len(values) != axes or wrong:
        what = {int: "an int", bool: "a bool"}[kind]
        raise ValueError(f"{name} must be {what} or {axes} of them, one per spatial axis, got {value!r}")
    return values


def check_same(x: Tensor, name: str = "x", **others: Tensor | None) -> None:
    """Check that tensors are where ``x`` is and, except under autocast, of its dtype.

    Raises:
        ValueError: Naming the tensor that is not; ``name`` is what ``x`` is called.
    """
    cast = autocasting(x)
    for other, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{other} must be on {x.device} as {name} is, got {tensor.device}")
        if tensor.dtype != x.dtype and not cast:
            raise ValueError(f"{other} must be {x.dtype} as {name} is, got {tensor.dtype}")


def unsupported_dtype(*tensors: Tensor) -> str | None:
    """That no Triton kernel covers the dtype of one of the tensors, ``None`` if they cover all."""
    for x in tensors:
        if x.dtype not in TRITON_DTYPES:
            return f"the dtype is {x.dtype}, the kernels cover {', '.join(map(str, TRITON_DTYPES))}"
    return None


def unsupported_count(count: int, what: str) -> str | None:
    """That there is more of something than the Triton kernels can count, ``None`` if they can."""
    return f"the kernels count {what} in 32 bits, there are 2**31 or more" if count >= 2**31 else None


def unsupported_map(x: Tensor) -> str | None:
    """What of a map [B, C, H, W] no Triton kernel covers, ``None`` if they cover it."""
    return unsupported_dtype(x) or unsupported_count(x.shape[0] * x.shape[2] * x.shape[3], "positions")
