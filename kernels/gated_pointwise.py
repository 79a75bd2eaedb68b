"""A 1x1 convolution whose result is gated. Shapes: B batch, C input channels, D output channels, H and W rows, columns.

out[b, d, y, x] = gate[b, d, y, x] * (sum_c weight[d, c] * x[b, c, y, x] + bias[d])
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import _dispatch


def gated_pointwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The convolution and the product, one after the other. Arguments as in :func:`gated_pointwise`."""
    return F.conv2d(x, weight, bias) * gate


def gated_pointwise_torch(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The fastest form known in plain PyTorch operators. Arguments as in :func:`gated_pointwise`."""
    return gated_pointwise_reference(x, weight, bias, gate)


def gated_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, backend: str | None = None) -> Tensor:
    """Multiply the 1x1 convolution of ``x`` by ``gate``.

    Args:
        x: Input map. [B, C, H, W]
        weight: Convolution weight. [D, C, 1, 1]
        bias: Convolution bias, or ``None``. [D]
        gate: Factor of the result. [B, D, H, W]
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        The gated map. [B, D, H, W]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or ``backend`` is unknown.
        BackendError: If the backend that was asked for cannot run this call.
    """
    chosen = _dispatch.choose("gated_pointwise", x, backend, "not written")
    run = gated_pointwise_reference if chosen == "reference" else gated_pointwise_torch
    return run(x, weight, bias, gate)
