"""The mixers of DeiT, PVT, Swin and CSwin, each beside its authors' composition of it with the same weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from timm.layers import Attention
from timm.models.pvt_v2 import Attention as PlainSpatialReduction
from torch import Tensor, nn

from visionattn.attention import (
    AgentAttention,
    CrossShapedAttention,
    FocusedLinearAttention,
    InLineAttention,
    SimplifiedLinearAttention,
    SpatialReductionAttention,
)
from visionattn.attention.softmax import SoftmaxMixer
from visionattn.benchmark.plain.cswin import PlainCrossShaped
from visionattn.benchmark.plain.swin import MIXERS as PLAIN

__all__ = ["HOST_MIXERS", "Pair", "host_mixer_weights"]

AGENTS = {56: 9, 28: 16}  # of Agent-Swin and Agent-PVT by the side of the map, 49 elsewhere
RATIOS = {56: 8, 28: 4, 14: 2}  # of PVT, 1 elsewhere
SPLITS = {56: 1, 28: 2}  # of CSwin, 7 elsewhere


class Pair(NamedTuple):
    """What makes the authors' layer and ours, and whether theirs is told the rows and columns of its tokens."""

    plain: Callable[[], nn.Module]
    ours: Callable[[], nn.Module]
    sized: bool = False


def _linear(name: str, ours: Callable[..., nn.Module]) -> Callable[[int, int, int], Pair]:
    def build(dim: int, heads: int, side: int) -> Pair:
        return Pair(partial(PLAIN[name], dim, heads, side), partial(ours, dim, heads, input_size=(side, side)))

    return build


def _agent(dim: int, heads: int, side: int) -> Pair:
    agents = AGENTS.get(side, 49)
    ours = partial(AgentAttention, dim, heads, agents, input_size=(side, side))
    return Pair(partial(PLAIN["agent"], dim, heads, side, agents), ours)


def _softmax(dim: int, heads: int, side: int) -> Pair:
    return Pair(partial(Attention, dim, heads, qkv_bias=True), partial(SoftmaxMixer, dim, heads))


def _spatial_reduction(dim: int, heads: int, side: int) -> Pair:
    ratio = RATIOS.get(side, 1)
    plain = partial(PlainSpatialReduction, dim, heads, ratio, linear_attn=False)
    return Pair(plain, partial(SpatialReductionAttention, dim, heads, ratio), sized=True)


def _cross_shaped(dim: int, heads: int, side: int) -> Pair:
    split, heads = SPLITS.get(side, 7), heads + heads % 2
    if dim % heads:
        raise ValueError(f"cross-shaped attention takes an even number of heads of 32 channels, got {dim} channels")
    plain = partial(PlainCrossShaped, dim, heads, (side, side), split)
    return Pair(plain, partial(CrossShapedAttention, dim, heads, split))


# Name: what it is, and a function of channels, heads and side of the map.
HOST_MIXERS = {
    "softmax": ("softmax attention beside timm's", _softmax),
    "spatial_reduction": ("PVT's spatial-reduction attention beside timm's", _spatial_reduction),
    "cross_shaped": ("CSwin's cross-shaped attention", _cross_shaped),
    "agent": ("agent attention", _agent),
    "inline": ("InLine attention", _linear("inline", InLineAttention)),
    "flatten": ("focused linear attention", _linear("flatten", FocusedLinearAttention)),
    "slab": ("simplified linear attention", _linear("slab", SimplifiedLinearAttention)),
}


def host_mixer_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions are a map instead of a sequence, the scale of FLatten is called what it is."""
    state = {"temperature" if name == "scale" else name: value for name, value in state.items()}
    if "positional_encoding" in state:
        side = math.isqrt(state["positional_encoding"].shape[1])
        state["positional_encoding"] = state["positional_encoding"].unflatten(1, (side, side))
    return state
