"""Bi-level routing attention."""

from visionattn.kernels.bilevel.export import gathered_attention
from visionattn.kernels.bilevel.op import bilevel_routing_attention
from visionattn.kernels.bilevel.regions import cut, from_regions, region_means, route_regions, to_regions

__all__ = [
    "bilevel_routing_attention",
    "cut",
    "from_regions",
    "gathered_attention",
    "region_means",
    "route_regions",
    "to_regions",
]
