"""Attention operators as modules, one file per mechanism."""

from visionattn.attention.lka import LargeKernelAttention
from visionattn.attention.local import CircularWindowAttention, HaloAttention
from visionattn.attention.neighborhood import NeighborhoodAttention

__all__ = ["CircularWindowAttention", "HaloAttention", "LargeKernelAttention", "NeighborhoodAttention"]
