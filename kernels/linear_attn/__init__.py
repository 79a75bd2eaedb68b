"""Linear attention with any feature map."""

from visionattn.kernels.linear_attn.causal import causal_sums
from visionattn.kernels.linear_attn.forms import FEATURE_MAPS, NORMALIZERS, features, mix
from visionattn.kernels.linear_attn.op import linear_attention
from visionattn.kernels.linear_attn.rotation import rotary_tables, rotate_pairs

__all__ = [
    "FEATURE_MAPS",
    "NORMALIZERS",
    "causal_sums",
    "features",
    "linear_attention",
    "mix",
    "rotary_tables",
    "rotate_pairs",
]
