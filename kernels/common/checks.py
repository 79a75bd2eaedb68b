"""Checks of arguments that operators share, and what their Triton kernels refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from visionattn.kernels.common.mode import autocasting

__all__ = [
    "check_extent",
    "check_filled",
    "check_flags",
    "check_floating",
    "check_integer",
    "check_same",
    "check_tensors",
    "per_axis",
    "positive",
    "unsupported_count",
    "unsupported_dtype",
    "unsupported_map",
]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# How far a window may reach beyond a smaller map: more than any does that is in use.
MAX_BEYOND = 64

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


def check_tensors(optional: bool = False, /, **tensors: Any) -> None:
    """Check that arguments are tensors, or None if they are ``optional``.

    Raises:
        ValueError: Naming the one that is not.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (optional and x is None):
            allowed = "a tensor or None" if optional else "a tensor"
            raise ValueError(f"{name} must be {allowed}, got {_shown(x)}")


def _shown(value: Any) -> str:
    """A value that is short, and what others are."""
    return repr(value) if isinstance(value, (int, float, complex, str, type(None))) else f"a {type(value).__name__}"


def check_floating(or_complex: bool = False, /, **tensors: Tensor) -> None:
    """Check that tensors hold real numbers, or with ``or_complex`` complex ones.

    Raises:
        ValueError: Naming the one that does not.
    """
    for name, x in tensors.items():
        if not x.is_floating_point() and not (or_complex and x.is_complex()):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_filled(name: str, x: Tensor, **axes: int) -> None:
    """Check that no axis of those named is empty: ``check_filled("q", q, head=-2, channel=-1)``.

    Raises:
        ValueError: If one is.
    """
    shape = x.shape
    for what, axis in axes.items():
        if shape[axis] == 0:  # not numel(): a compiler may know these axes, and not how many samples there are
            raise ValueError(f"{name} must have at least one {what}, got shape {tuple(shape)}")


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Check that a value is a whole number, and not less than ``least``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an int, got {_shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_flags(**flags: Any) -> None:
    """Check that arguments are True or False.

    Raises:
        ValueError: Naming the one that is not.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {_shown(flag)}")


def check_extent(name: str, extent: Sequence[int], sides: Sequence[int]) -> None:
    """Check that what is laid over a map, axis by axis, is not so much larger that memory is filled with padding.

    Raises:
        ValueError: If it is larger than the side of the map and than ``MAX_BEYOND``.
    """
    if max(extent) <= MAX_BEYOND:
        return
    for axis, (size, side) in enumerate(zip(extent, sides, strict=True)):
        if size > MAX_BEYOND and size > side:
            most = max(MAX_BEYOND, side)
            raise ValueError(
                f"{name} must be at most {most} on a map of side {side}, got {size} for spatial axis {axis}"
            )


def positive(name: str, value: Any, zero: bool = False) -> float:
    """A positive number, or with ``zero`` one that is not negative.

    Raises:
        ValueError: If it is not a finite number, or not positive.
    """
    if isinstance(value, float) and 0 < value < math.inf:
        return float(value)
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return float(value)  # of which nothing is known yet
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
        number = math.nan
    # By comparisons, which NaN fails: a compiler cannot call isfinite of a number that it keeps as a symbol.
    if not 0 <= number < math.inf or (number == 0 and not zero):
        raise ValueError(f"{name} must be {'0 or ' if zero else ''}positive, got {_shown(value)}")
    return number


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
