"""Helpers of Triton kernels that read and write rows of D contiguous numbers, such as one head of a token."""

from __future__ import annotations

from visionattn.kernels.common.jit import jit, tl

__all__ = ["load_rows", "store_rows"]


@jit
def load_rows(rows, exist, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows at some addresses, zeros where none exist. [n, BLOCK_D]"""
    d = tl.arange(0, BLOCK_D)
    return tl.load(rows[:, None] + d[None, :], exist[:, None] & (d < D)[None, :], other=0.0)


@jit
def store_rows(rows, x, exist, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [n, BLOCK_D] to the rows at some addresses, in their dtype, where they exist."""
    d = tl.arange(0, BLOCK_D)
    tl.store(rows[:, None] + d[None, :], x.to(rows.dtype.element_ty), exist[:, None] & (d < D)[None, :])
