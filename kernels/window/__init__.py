"""Attention within (shifted) windows."""

from visionattn.kernels.window.export import MASKED, window_attention_export
from visionattn.kernels.window.op import window_attention

__all__ = ["MASKED", "window_attention", "window_attention_export"]
