"""Attention operators as modules, one file per mechanism."""

from visionattn.attention.bilevel import BiLevelRoutingAttention, LePEAttention
from visionattn.attention.flow import CrossFlowAttention, FlowAttention
from visionattn.attention.hedgehog import HedgehogAttention, HedgehogFeatures
from visionattn.attention.hilo import HiLoAttention, hilo_attention
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
from visionattn.attention.softplus import SoftplusAttention
from visionattn.attention.ssa import SelectiveAttention

__all__ = [
    "BiLevelRoutingAttention",
    "LePEAttention",
    "CircularWindowAttention",
    "CrossFlowAttention",
    "FlowAttention",
    "HaloAttention",
    "HedgehogAttention",
    "HedgehogFeatures",
    "HiLoAttention",
    "LargeKernelAttention",
    "LinearAttention",
    "MagnitudeAwareAttention",
    "NeighborhoodAttention",
    "RankAugmentedAttention",
    "RotaryAttention",
    "SelectiveAttention",
    "SoftmaxAttention",
    "SoftplusAttention",
    "hilo_attention",
]
