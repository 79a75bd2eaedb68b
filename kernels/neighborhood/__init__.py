"""Neighborhood attention over 1-, 2- or 3-D maps."""

from visionattn.kernels.neighborhood.export import neighborhood_attention_export
from visionattn.kernels.neighborhood.geometry import axis_mask, map_windows
from visionattn.kernels.neighborhood.op import neighborhood_attention
from visionattn.kernels.neighborhood.tiles import Axis, Group, Run, positions

__all__ = [
    "Axis",
    "Group",
    "Run",
    "axis_mask",
    "map_windows",
    "neighborhood_attention",
    "neighborhood_attention_export",
    "positions",
]
