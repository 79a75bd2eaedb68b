"""The focused feature map of linear attention."""

from visionattn.kernels.focused_map.op import focused

__all__ = ["focused"]
