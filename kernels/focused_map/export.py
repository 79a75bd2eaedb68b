"""The focused feature map in a few operators that every runtime knows: to script, to export, to differentiate twice.

Shapes: B batch, N tokens, h heads, D head dim. See ``op.py`` for what it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.precision import precise

__all__ = ["focused_export"]


def focused_export(x: Tensor, power: float, divisor: Tensor) -> Tensor:
    """In a few operators that every runtime knows.

    Args:
        x: [B, N, h, D]
        power: The focusing factor.
        divisor: One for all or one of each channel. [] or [h, D]
    """
    y = precise(x)
    y = (F.relu(y) + 1e-6) / divisor.to(y.dtype)
    # Divided by its largest element, a power neither overflows nor vanishes; the norm below takes the factor out.
    sharp = (y / y.amax((-2, -1), keepdim=True)) ** power
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    return sharp * (norm / torch.linalg.vector_norm(sharp, dim=(-2, -1), keepdim=True))
