"""Triton, imported at the first launch.

An operator's file holds its Triton kernels beside its PyTorch forms, yet importing it must not import Triton:
that takes a second and is not installed everywhere. So kernel files take ``jit`` and ``tl`` from here::

    from __future__ import annotations  # keeps `BLOCK: tl.constexpr` a string until Triton reads it

    from visionattn.kernels.common.jit import jit, tl

    @jit
    def _kernel(x, BLOCK: tl.constexpr): ...

    _kernel[grid](x, BLOCK=64)

The first launch puts the real ``triton.language`` into the file's globals in place of the stand-in and compiles
every ``@jit`` function of the file, helpers that other kernels call included, with ``triton.jit``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch


class _Language:
    """Stands for ``triton.language`` until the first launch."""

    def __repr__(self) -> str:
        return "<triton.language, not imported yet>"


tl = _Language()


class LazyKernel:
    """A function that becomes a Triton kernel when it is first launched."""

    def __init__(self, fn: Callable):
        self.fn = fn
        functools.update_wrapper(self, fn)

    def __getitem__(self, grid):
        scope = self.fn.__globals__
        if scope[self.fn.__name__] is self:
            load_kernels(scope)
        return scope[self.fn.__name__][grid]


jit = LazyKernel


def load_kernels(scope: dict) -> None:
    """Import Triton and turn the stand-ins in the globals of a kernel file into the real things.

    Helpers that the file imports from others are turned there, so that each becomes one Triton function.
    """
    import triton
    import triton.language

    for name, value in list(scope.items()):
        if value is tl:
            scope[name] = triton.language
        elif isinstance(value, LazyKernel):
            home = value.fn.__globals__
            if home is scope:
                scope[name] = triton.jit(value.fn)
                continue
            if home[value.fn.__name__] is value:
                load_kernels(home)
            scope[name] = home[value.fn.__name__]


TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # does not import it


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors too (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on tensors of ``device`` and what to do about it; ``None`` if it can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return (
            f"the tensors are on {device.type}, the kernels need a CUDA or ROCm device (or TRITON_INTERPRET=1 on cpu)"
        )
    return None
