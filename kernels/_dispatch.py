"""Which implementation of an operator runs: one rule for every operator.

The first that is given decides: the ``backend=`` argument, :func:`set_backend` or :func:`use_backend`, the environment
variable ``VISIONATTN_BACKEND``, and last the automatic choice by device, dtype and shape. Only the automatic choice
looks for what can run; any other is a demand, and one that cannot be met raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from visionattn.kernels import _triton

BACKENDS = ("triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "VISIONATTN_BACKEND"

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


def choose(op: str, x: Tensor, backend: str | None, unsupported: str | None, prefer_triton: bool = True) -> str:
    """Return the backend that runs one call of an operator.

    Args:
        op: Name of the operator, for messages.
        x: The input that tells device and dtype.
        backend: The caller's ``backend=`` argument.
        unsupported: What of this call the Triton kernels do not cover, ``None`` if they cover it.
        prefer_triton: Whether the kernels are expected to be faster where both could run.

    Raises:
        ValueError: If a backend is asked for that does not exist.
        BackendError: If Triton is asked for and cannot run this call.
    """
    name = _checked(backend, "backend") if backend is not None else get_backend()
    if name == "triton":
        reason = unsupported or _triton.unavailable(x.device)
        if reason:
            raise BackendError(f"{op}: backend 'triton' cannot run this call: {reason}; use backend=None or 'torch'")
    if name is not None:
        return name
    automatic = prefer_triton and x.is_cuda and unsupported is None and not exporting()
    return "triton" if automatic and _triton.unavailable(x.device) is None else "torch"


def exporting() -> bool:
    """Whether a graph is being recorded for another runtime, which knows PyTorch's own operators only."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the autocast dtype of ``x``'s device as a convolution does; return everything as it is outside autocast."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} (or None: automatic), got {name!r}")
    return name
