"""Linear map of the last axis."""

from visionattn.kernels.dense.op import linear, linear_gelu

__all__ = ["linear", "linear_gelu"]
