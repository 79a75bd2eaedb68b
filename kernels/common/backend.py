"""Which implementation of an operator runs: one rule for every operator.

The first that is given decides: the ``backend=`` argument, :func:`set_backend` or :func:`use_backend`, the environment
variable ``VISIONATTN_BACKEND``, and last the automatic choice by device, dtype and shape. Only the automatic choice
looks for what can run; any other is a demand, and one that cannot be met raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from visionattn.kernels.common import jit
from visionattn.kernels.common.mode import exporting, transformed

BACKENDS = ("triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "VISIONATTN_BACKEND"
TRANSFORMED = "torch.func and forward-mode differentiation see nothing of what is within a kernel"

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
        reason = unsupported() or jit.unavailable(x.device) or (TRANSFORMED if transformed() else None)
        if reason:
            raise BackendError(f"{op}: backend 'triton' cannot run this call: {reason}; use backend=None or 'torch'")
    if name is not None:
        return name
    if not x.is_cuda or not prefer_triton or exporting() or transformed():
        return "torch"
    return "torch" if unsupported() or jit.unavailable(x.device) else "triton"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} (or None: automatic), got {name!r}")
    return name
