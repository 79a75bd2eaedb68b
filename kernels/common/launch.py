"""What launches of Triton kernels share, and how an operator lists its own for the ahead-of-time compiler.

An operator with kernels has a function ``launches(dtype, hip)`` beside them, which yields a :class:`Launch` for every
configuration that is worth compiling without a GPU at hand.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.common.jit import LazyKernel

__all__ = ["Launch", "halves", "in_base_2", "pointer", "power_of_2", "strides"]

NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One configuration in which a kernel is launched.

    Attributes:
        kernel: The ``@jit`` function.
        constants: Values of its ``tl.constexpr`` parameters, and the options ``num_warps`` and ``num_stages``.
        arguments: Types of its other parameters as Triton writes them, such as ``"*bf16:16"``, where ``:16`` says that
            16 divides the address or number; a tuple of types for a tuple of numbers.
        typical: Whether it is one of the few that every run of the tests compiles.
        may_spill: Whether it is exempt from the limit on spills, as float64 is where it serves tests only.
    """

    kernel: LazyKernel
    constants: Mapping[str, Any]
    arguments: Mapping[str, str | tuple[str, ...]]
    typical: bool = False
    may_spill: bool = False


def pointer(dtype: torch.dtype) -> str:
    """The type of a tensor of ``dtype``, whose memory PyTorch aligns to 16 bytes at least."""
    return f"*{NAMES[dtype]}:16"


def power_of_2(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all axes but the last; 0 where there is one only, lest it count as another kernel."""
    return tuple(0 if size == 1 else step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def halves(number: float) -> tuple[float, float]:
    """A number as float32 and what that leaves, which float64 needs."""
    high = ctypes.c_float(number).value
    return high, number - high if math.isfinite(high) else 0.0


def in_base_2(scale: float) -> tuple[float, float]:
    """The :func:`halves` of the scale of logits in base 2."""
    return halves(scale * math.log2(math.e))
