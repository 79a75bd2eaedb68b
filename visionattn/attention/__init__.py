"""Attention operators as modules, one file per mechanism."""

from visionattn.attention.agent import AgentAttention
from visionattn.attention.aggregated import AggregatedAttention, LengthScaledAttention
from visionattn.attention.bilevel import BiLevelRoutingAttention, LePEAttention
from visionattn.attention.cross_shaped import CrossShapedAttention
from visionattn.attention.flow import CrossFlowAttention, FlowAttention
from visionattn.attention.focused import FocusedLinearAttention, SimplifiedLinearAttention
from visionattn.attention.hedgehog import HedgehogAttention, HedgehogFeatures
from visionattn.attention.hilo import HiLoAttention, hilo_attention
from visionattn.attention.inline import InLineAttention
from visionattn.attention.linear import (
    LinearAttention,
    MagnitudeAwareAttention,
    NormAwareAttention,
    RankAugmentedAttention,
    RotaryAttention,
)
from visionattn.attention.lka import LargeKernelAttention
from visionattn.attention.local import CircularWindowAttention, HaloAttention
from visionattn.attention.mixer import Mixer
from visionattn.attention.neighborhood import NeighborhoodAttention
from visionattn.attention.polarity import PolarityAwareAttention
from visionattn.attention.softmax import SoftmaxAttention, SoftmaxMixer
from visionattn.attention.softplus import SoftplusAttention
from visionattn.attention.spatial_reduction import SpatialReductionAttention
from visionattn.attention.ssa import SelectiveAttention
from visionattn.attention.window import WindowAttention

__all__ = [
    "AgentAttention",
    "AggregatedAttention",
    "BiLevelRoutingAttention",
    "CircularWindowAttention",
    "CrossFlowAttention",
    "CrossShapedAttention",
    "FlowAttention",
    "FocusedLinearAttention",
    "HaloAttention",
    "HedgehogAttention",
    "HedgehogFeatures",
    "HiLoAttention",
    "InLineAttention",
    "LargeKernelAttention",
    "LePEAttention",
    "LengthScaledAttention",
    "LinearAttention",
    "MagnitudeAwareAttention",
    "Mixer",
    "NeighborhoodAttention",
    "NormAwareAttention",
    "PolarityAwareAttention",
    "RankAugmentedAttention",
    "RotaryAttention",
    "SelectiveAttention",
    "SimplifiedLinearAttention",
    "SoftmaxAttention",
    "SoftmaxMixer",
    "SoftplusAttention",
    "SpatialReductionAttention",
    "WindowAttention",
    "hilo_attention",
]
