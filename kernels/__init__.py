"""Operators of the backbones: a plain reference, a fast PyTorch form and Triton kernels behind one function each."""

from visionattn.kernels.bilevel.op import bilevel_routing_attention
from visionattn.kernels.common.backend import (
    BackendError,
    autocast,
    autocasting,
    eager,
    exporting,
    get_backend,
    set_backend,
    use_backend,
)
from visionattn.kernels.dense import linear
from visionattn.kernels.depthwise import depthwise_conv2d
from visionattn.kernels.flow import flow_attention
from visionattn.kernels.linear_attn.forms import focused, rotary_tables
from visionattn.kernels.linear_attn.op import linear_attention
from visionattn.kernels.neighborhood.export import neighborhood_attention_plain
from visionattn.kernels.neighborhood.op import neighborhood_attention
from visionattn.kernels.pointwise import gated_pointwise
from visionattn.kernels.window.export import window_attention_plain
from visionattn.kernels.window.op import window_attention

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
