"""Large kernel attention: a 19x19 depthwise receptive field, mixed across channels, gates its own input."""

import torch
from torch import Tensor, nn

from visionattn.kernels import depthwise_conv2d, gated_pointwise
from visionattn.layers.intact import intact, same_size_depthwise
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = ["LargeKernelAttention"]


@opaque  # which operators run depends on the tensor
class LargeKernelAttention(nn.Module):
    """``u * conv1(conv_spatial(conv0(u)))``: depthwise 5x5, depthwise 7x7 with dilation 3, 1x1 (VAN, arXiv 2202.09741).

    The second convolution pads the *result* of the first with zeros, so near borders the pair differs from one
    23x23 convolution.

    Args:
        dim: Channels of the map. [B, dim, H, W] in and out.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.exportable = built_for_export()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim, **dd)
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, u: Tensor) -> Tensor:
        if torch.jit.is_scripting() or self.exportable:
            return u * self.conv1(self.conv_spatial(self.conv0(u)))
        else:
            return self._fused(u)

    @torch.jit.unused
    def _fused(self, u: Tensor) -> Tensor:
        a = _convolved(_convolved(u, self.conv0), self.conv_spatial)
        conv = self.conv1
        if intact(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.groups == 1:
            return gated_pointwise(a, conv.weight, conv.bias, u)
        return u * conv(a)


def _convolved(x: Tensor, conv: nn.Module) -> Tensor:
    if same_size_depthwise(conv):
        return depthwise_conv2d(x, conv.weight, conv.bias, dilation=conv.dilation[0])
    return conv(x)
