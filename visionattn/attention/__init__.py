"""Attention operators as modules, one file per mechanism."""

from visionattn.attention.bilevel import BiLevelRoutingAttention, LePEAttention
from visionattn.attention.flow import CrossFlowAttention, FlowAttention
from visionattn.attention.linear import (
    LinearAttention,
    MagnitudeAwareAttention,
    RankAugmentedAttention,
    RotaryAttention,
)
from visionattn.attention.lka import LargeKernelAttention
from visionattn.attention.local import CircularWindowAttention, HaloAttention
from visionattn.attention.neighborhood import NeighborhoodAttention
from visionattn.attention.softmax import SoftmaxAttention

__all__ = [
    "BiLevelRoutingAttention",
    "LePEAttention",
    "CircularWindowAttention",
    "CrossFlowAttention",
    "FlowAttention",
    "HaloAttention",
    "LargeKernelAttention",
    "LinearAttention",
    "MagnitudeAwareAttention",
    "NeighborhoodAttention",
    "RankAugmentedAttention",
    "RotaryAttention",
    "SoftmaxAttention",
]
