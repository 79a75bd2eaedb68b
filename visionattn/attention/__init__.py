"""Attention operators as modules, one file per mechanism."""

from visionattn.attention.lka import LargeKernelAttention

__all__ = ["LargeKernelAttention"]
