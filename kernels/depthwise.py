"""Depthwise convolution of a map, dilated or not. Shapes: B batch, C channels, H rows, W columns, K kernel side.

    out[b, c, y, x] = bias[c] + sum_ij weight[c, 0, i, j] * x[b, c, y + (i - K//2) * dilation, x + (j - K//2) * dilation]

with zeros outside the map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import _dispatch


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """PyTorch's own convolution. Arguments as in :func:`depthwise_conv2d`."""
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def depthwise_conv2d_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """The fastest form known in plain PyTorch operators. Arguments as in :func:`depthwise_conv2d`."""
    if dilation == 1 or x.device.type != "cpu" or _dispatch.exporting():
        return depthwise_conv2d_reference(x, weight, bias, dilation)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    B, C, H, W = x.shape
    d, rows, cols = dilation, -(-H // dilation), -(-W // dilation)
    x = F.pad(x, (0, cols * d - W, 0, rows * d - H)).permute(0, 2, 3, 1)
    x = x.reshape(B, rows, d, cols, d, C).permute(0, 2, 4, 1, 3, 5).reshape(B * d * d, rows, cols, C)
    x = depthwise_conv2d_reference(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    x = x.reshape(B, d, d, rows, cols, C).permute(0, 3, 1, 4, 2, 5).reshape(B, rows * d, cols * d, C)
    x = x[:, :H, :W].permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str | None = None
) -> Tensor:
    """Convolve every channel with its own odd, square kernel; stride 1, zero padding that keeps the size.

    Args:
        x: Input map; channels_last is the fast memory format. [B, C, H, W]
        weight: One kernel per channel, ``K`` odd. [C, 1, K, K]
        bias: Added to every position, or ``None``. [C]
        dilation: Distance between neighbouring taps.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        A map of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or ``backend`` is unknown.
        BackendError: If the backend that was asked for cannot run this call.
    """
    chosen = _dispatch.choose("depthwise_conv2d", x, backend, "not written")
    run = depthwise_conv2d_reference if chosen == "reference" else depthwise_conv2d_torch
    return run(x, weight, bias, dilation)
