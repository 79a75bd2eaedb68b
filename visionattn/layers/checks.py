"""Checks of arguments that layers and networks share: ``ValueError`` with name, value and what is allowed."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.fx import Proxy

__all__ = ["check_counts", "check_heads", "check_images", "check_map", "check_shares", "check_side", "check_tensor"]


def check_counts(least: int = 1, **counts: object) -> None:
    """Check that arguments are integers of at least ``least``."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ValueError(f"{name} must be {kind}, got {value!r}")


def check_heads(dim: object, num_heads: object) -> None:
    """Check that channels split into heads."""
    check_counts(dim=dim)
    if not isinstance(num_heads, Integral) or isinstance(num_heads, bool) or num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads!r}")


def check_shares(**shares: object) -> None:
    """Check that arguments are numbers from 0 to 1."""
    for name, value in shares.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def check_side(name: str, value: int | Sequence[int], pair: bool = False) -> None:
    """Check that an argument is two positive integers, rows and columns, or, unless it has to be a ``pair``, one."""
    sides = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value] * (1 if pair else 2)
    if len(sides) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in sides):
        kinds = "two positive integers, rows and columns" if pair else "a positive integer or two, rows and columns"
        raise ValueError(f"{name} must be {kinds}, got {value!r}")


def check_map(x: Tensor) -> None:
    """Check that the input of a layer is a map [B, H, W, C]. TorchScript compiles it, too."""
    if torch.jit.is_scripting():
        if x.dim() != 4:
            raise ValueError(f"x must be a map [B, H, W, C], got {x.dim()} axes")
    else:
        _check_axes(x, "a map [B, H, W, C]")


def check_images(x: Tensor) -> None:
    """Check that the input of a network is images [B, C, H, W] with pixels."""
    _check_axes(x, "images [B, C, H, W]")
    if type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"x must be images of at least one pixel, got shape {tuple(x.shape)}")


def check_tensor(x: object, what: str) -> None:
    """Check that an input is a tensor; ``what`` says which."""
    if not isinstance(x, (Tensor, Proxy)):  # the latter of a symbolic tracer, which knows nothing yet
        raise ValueError(f"x must be a tensor, {what}, got {type(x).__name__}")


def _check_axes(x: object, what: str) -> None:
    check_tensor(x, what)
    if isinstance(x, Tensor) and x.dim() != 4:
        raise ValueError(f"x must be {what}, got shape {tuple(x.shape)}")
