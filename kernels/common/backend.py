"""Which implementation of an operator runs: one rule for every operator.

The first that is given decides: the ``backend=`` argument, :func:`set_backend` or :func:`use_backend`, the environment
variable ``VISIONATTN_BACKEND``, and last the automatic choice by device, dtype and shape. Only the automatic choice
looks for what can run; any other is a demand, and one that cannot be met raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from visionattn.kernels.common import jit as _triton

BACKENDS = ("triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "VISIONATTN_BACKEND"

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_setting: str | None = None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


def set_backend(name: str | None) -> None:
    """Demand one backend for every operator of the process; ``None`` returns to the automatic choice.

    Args:
        name: ``"triton"``, ``"torch"``, ``"reference"`` or ``None``.

    Raises:
        ValueError: If ``name`` is no backend.
    """
    global _setting
    _setting = None if name is None else _checked(name, "backend")


def get_backend() -> str | None:
    """Return the backend demanded by :func:`set_backend` or the environment, ``None`` if the choice is automatic.

    Raises:
        ValueError: If the environment variable ``VISIONATTN_BACKEND`` names no backend.
    """
    if _setting is not None:
        return _setting
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name, ENVIRONMENT_VARIABLE) if name else None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Demand one backend within a ``with`` block, then restore the setting before it (process-wide, not per thread).

    Args:
        name: As in :func:`set_backend`.
    """
    global _setting
    before = _setting
    set_backend(name)
    try:
        yield
    finally:
        _setting = before


def choose(
    op: str, x: Tensor, backend: str | None, unsupported: Callable[[], str | None], prefer_triton: bool = True
) -> str:
    """Return the backend that runs one call of an operator.

    Args:
        op: Name of the operator, for messages.
        x: The input that tells device and dtype.
        backend: The caller's ``backend=`` argument.
        unsupported: Tells what of this call the Triton kernels do not cover, ``None`` if they cover it.
        prefer_triton: Whether the kernels are expected to be faster where both could run.

    Raises:
        ValueError: If a backend is asked for that does not exist.
        BackendError: If Triton is asked for and cannot run this call.
    """
    name = _checked(backend, "backend") if backend is not None else get_backend()
    if name == "triton":
        reason = unsupported() or _triton.unavailable(x.device)
        if reason:
            raise BackendError(f"{op}: backend 'triton' cannot run this call: {reason}; use backend=None or 'torch'")
    if name is not None:
        return name
    if not x.is_cuda or not prefer_triton or exporting():
        return "torch"
    return "torch" if unsupported() or _triton.unavailable(x.device) else "triton"


def exporting() -> bool:
    """Whether a graph is being recorded for another runtime, which knows PyTorch's own operators only."""
    # torch 2.11's is_exporting() says yes while torch.compile traces, too; the flag behind it does not.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    exported = torch.compiler.is_exporting() if flag is None else flag
    return exported or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether torch.func maps or differentiates, which knows nothing of a custom operator's gradient."""
    level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)
    return level() is not None


transformed._dynamo_marked_constant = True  # a compiler asks once, while it traces, and cannot look inside


def eager(x: Tensor) -> bool:
    """Whether a tensor is a plain one with values: nothing traces, compiles, maps or differentiates by torch.func."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) in (Tensor, torch.nn.Parameter) and not recorded and not transformed()


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; meta has none, and asking it raises."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, cast to the autocast dtype as a convolution does."""
    if not autocasting(x) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map lie side by side, so that a convolution returns channels_last."""
    return x.stride(1) == 1


def channels_last(x: Tensor) -> Tensor:
    """The map in channels_last, without a copy if it is already. [B, C, H, W]"""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # unlike contiguous(memory_format=), vmap knows these


def unsupported(x: Tensor) -> str | None:
    """What of a map no Triton kernel covers, ``None`` if they cover it."""
    if x.dtype not in _TRITON_DTYPES:
        return f"the dtype is {x.dtype}, the kernels cover {', '.join(map(str, _TRITON_DTYPES))}"
    if x.shape[0] * x.shape[2] * x.shape[3] >= 2**31:
        return "the kernels count positions in 32 bits, the map has 2**31 or more"
    return None


def check_same(x: Tensor, **others: Tensor | None) -> None:
    """Check that tensors are where ``x`` is and, except under autocast, of its dtype.

    Raises:
        ValueError: Naming the tensor that is not.
    """
    cast = autocasting(x)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")
        if tensor.dtype != x.dtype and not cast:
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} (or None: automatic), got {name!r}")
    return name
