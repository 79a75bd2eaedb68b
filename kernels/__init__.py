"""Operators of the backbones: a plain reference, a fast PyTorch form and Triton kernels behind one function each."""

from visionattn.kernels._dispatch import (
    BackendError,
    autocast,
    autocasting,
    eager,
    exporting,
    get_backend,
    set_backend,
    use_backend,
)
from visionattn.kernels.bilevel import bilevel_routing_attention
from visionattn.kernels.depthwise import depthwise_conv2d
from visionattn.kernels.flow_attention import flow_attention
from visionattn.kernels.gated_pointwise import gated_pointwise
from visionattn.kernels.linear import linear
from visionattn.kernels.linear_attention import linear_attention
from visionattn.kernels.linear_forms import focused, rotary_tables
from visionattn.kernels.neighborhood import neighborhood_attention
from visionattn.kernels.neighborhood_plain import neighborhood_attention_plain
from visionattn.kernels.window_attention import window_attention
from visionattn.kernels.window_plain import window_attention_plain

__all__ = [
    "BackendError",
    "autocast",
    "autocasting",
    "bilevel_routing_attention",
    "depthwise_conv2d",
    "eager",
    "exporting",
    "flow_attention",
    "focused",
    "gated_pointwise",
    "get_backend",
    "linear",
    "linear_attention",
    "neighborhood_attention",
    "neighborhood_attention_plain",
    "rotary_tables",
    "set_backend",
    "use_backend",
    "window_attention",
    "window_attention_plain",
]
