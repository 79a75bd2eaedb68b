"""The focused feature map of linear attention (FLatten, arXiv 2308.00442).

    y = (relu(x) + 1e-6) / softplus(s),   out = |y| y^p / |y^p|

Shapes: B batch, N tokens, h heads, D head dim. Norms are those of whole tokens, all heads together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.mode import eager
from visionattn.kernels.focused_map.cpu import Focused
from visionattn.kernels.focused_map.export import focused_export
from visionattn.kernels.focused_map.triton import focused_triton, unsupported

__all__ = ["focused"]


def focused(x: Tensor, power: float = 3.0, scale: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Sharpen ``y = (relu(x) + 1e-6) / softplus(scale)`` to ``y ** power`` and give it back the norm of ``y``.

    The norms are those of whole tokens, all heads together (FLatten, arXiv 2308.00442).

    Args:
        x: Queries or keys; the result is at least in float32. [B, N, h, D]
        power: The focusing factor.
        scale: Learned, one of each channel; None for no division. Any shape of h * D elements.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.
    """
    divisor = torch.ones([], dtype=x.dtype, device=x.device)
    if scale is not None:
        divisor = F.softplus(scale).reshape(x.shape[-2], x.shape[-1])
    if torch.jit.is_scripting():
        return focused_export(x, power, divisor)
    else:
        return _fastest_focused(x, power, divisor, backend)


def _fastest_focused(x: Tensor, power: float, divisor: Tensor, backend: str | None) -> Tensor:
    chosen = choose("focused", x, backend, lambda: unsupported(x))
    if chosen == "triton":
        return focused_triton(x, power, divisor)
    if chosen == "torch" and x.device.type == "cpu" and x.numel() > 0 and eager(x):
        return Focused.apply(x, power, divisor)
    return focused_export(x, power, divisor)
