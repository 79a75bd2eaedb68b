"""The focused feature map of linear attention (FLatten, arXiv 2308.00442).

    y = (relu(x) + 1e-6) / softplus(s),   out = |y| y^p / |y^p|

Shapes: B batch, N tokens, h heads, D head dim. Norms are those of whole tokens, all heads together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import check_filled, check_floating, check_tensors, positive
from visionattn.kernels.common.mode import eager, exporting
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

    Raises:
        ValueError: If shapes or devices do not fit together, or an argument is not one of the allowed.
        BackendError: If the backend that was asked for cannot run this call.
    """
    if not torch.jit.is_scripting():
        if not exporting():
            _check(x, power, scale)
    divisor = torch.ones([], dtype=x.dtype, device=x.device)
    if scale is not None:
        divisor = F.softplus(scale).reshape(x.shape[-2], x.shape[-1])
    if torch.jit.is_scripting():
        return focused_export(x, power, divisor)
    else:
        return _fastest_focused(x, power, divisor, backend)


def _check(x: Tensor, power: float, scale: Tensor | None) -> None:
    check_tensors(x=x)
    check_tensors(True, scale=scale)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, N, heads, D], got shape {tuple(x.shape)}")
    check_floating(x=x)
    check_filled("x", x, head=2, channel=3)
    positive("power", power)
    if scale is not None:
        if scale.numel() != x.shape[2:].numel():
            shape = tuple(scale.shape)
            raise ValueError(
                f"scale must have an element for each of {x.shape[2:].numel()} channels, got shape {shape}"
            )
        if scale.device != x.device:
            raise ValueError(f"scale must be on {x.device} as x is, got {scale.device}")


def _fastest_focused(x: Tensor, power: float, divisor: Tensor, backend: str | None) -> Tensor:
    chosen = choose("focused", x, backend, lambda: unsupported(x))
    if chosen == "triton":
        return focused_triton(x, power, divisor)
    if chosen == "torch" and x.device.type == "cpu" and eager(x) and x.numel() > 0:
        return Focused.apply(x, power, divisor)
    return focused_export(x, power, divisor)
