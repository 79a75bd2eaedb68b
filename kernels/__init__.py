"""Operators of the backbones: a reference, a fast PyTorch form and Triton kernels behind one function each.

    NAME/       an operator of several files, in each operator the same:
        op.py               the public function: formula, shapes, checks, choice of backend, reference
        export.py           the form without branches, for tracing, scripting and export
        cpu.py              the fast form in PyTorch's own operators
        triton.py           custom operator, its gradient, what the kernels do not cover
        triton_kernels.py   the kernels
        launches.py         sizes of their launches, and the list of those that are compiled ahead of time
    NAME.py     an operator of one file, with the same parts in that order
    common/     what all of them share; operators import it and, but for those made of another, nothing of each other

Outside this folder, import from here or from an operator's folder or file, never from the files within a folder.
"""

from visionattn.kernels.agent import agent_attention
from visionattn.kernels.aggregated import aggregated_attention, seen_neighbors
from visionattn.kernels.bilevel import bilevel_routing_attention
from visionattn.kernels.common.attend import attend
from visionattn.kernels.common.backend import BackendError, get_backend, set_backend, use_backend
from visionattn.kernels.common.layout import channels_last, crop_map, is_channels_last, pad_map
from visionattn.kernels.common.machine import machine
from visionattn.kernels.common.memory import keep_freed_memory
from visionattn.kernels.common.mode import autocast, autocasting, eager, exporting
from visionattn.kernels.common.precision import precise
from visionattn.kernels.common.tuning import get_tuning, set_tuning, tuned, use_tuning
from visionattn.kernels.dense import linear, linear_gelu
from visionattn.kernels.depthwise import depthwise_conv2d, depthwise_conv2d_gelu
from visionattn.kernels.flow import flow_attention
from visionattn.kernels.focused_map import focused
from visionattn.kernels.gather import weighted_rows, weighted_rows_reference
from visionattn.kernels.linear_attn import linear_attention, rotary_tables
from visionattn.kernels.neighborhood import neighborhood_attention, neighborhood_attention_export
from visionattn.kernels.pointwise import gated_pointwise
from visionattn.kernels.window import window_attention, window_attention_export

__all__ = [
    "BackendError",
    "agent_attention",
    "aggregated_attention",
    "attend",
    "autocast",
    "autocasting",
    "bilevel_routing_attention",
    "channels_last",
    "crop_map",
    "depthwise_conv2d",
    "depthwise_conv2d_gelu",
    "eager",
    "exporting",
    "flow_attention",
    "focused",
    "gated_pointwise",
    "get_backend",
    "get_tuning",
    "is_channels_last",
    "keep_freed_memory",
    "linear",
    "linear_attention",
    "linear_gelu",
    "machine",
    "neighborhood_attention",
    "neighborhood_attention_export",
    "pad_map",
    "precise",
    "rotary_tables",
    "seen_neighbors",
    "set_backend",
    "set_tuning",
    "tuned",
    "use_backend",
    "use_tuning",
    "weighted_rows",
    "weighted_rows_reference",
    "window_attention",
    "window_attention_export",
]
