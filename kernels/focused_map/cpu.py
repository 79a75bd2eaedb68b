"""The focused feature map on a CPU, in place with a gradient of its own.

Shapes: B batch, N tokens, h heads, D head dim. See ``op.py`` for what it is.
"""

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.cache import samples_in_cache
from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.focused_map.export import focused_export

__all__ = ["Focused"]


class Focused(torch.autograd.Function):
    """Focused features, a few samples after the other in place; the backward pass needs nothing but the input.

    Arguments as in :func:`focused_export`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, power: float, divisor: Tensor) -> Tensor:
        ctx.save_for_backward(x, divisor)
        ctx.power = power
        y = torch.empty(x.shape, dtype=precise_dtype(x.dtype), device=x.device)
        for source, out in zip(*_slices(x, y), strict=True):
            _, _, norm = _sharpened(source, power, divisor, out)
            out.mul_(norm)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, divisor = ctx.saved_tensors
        if twice.wanted(grad):
            dx, ddivisor = twice.gradients(lambda x, d: focused_export(x, ctx.power, d), grad, (x, divisor))
            return dx, None, ddivisor
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dfactor = torch.zeros(x.shape[2:], dtype=grad.dtype, device=x.device)
        unit = torch.empty_like(grad[: samples_in_cache(x)])
        for source, g, out in zip(*_slices(x, grad, dx), strict=True):
            u = unit[: len(source)]
            positive, y, norm = _sharpened(source, ctx.power, divisor, u)
            along = (g * u).sum((-2, -1), keepdim=True)
            # Through the norm of y, and through the direction of its power, where the maximum cancels.
            dy = torch.addcmul(g, u, along, value=-1).mul_(u).mul_(norm * ctx.power).div_(y)
            dy.addcmul_(y, along.div_(norm))
            dfactor += (dy * positive).sum((0, 1))
            out.copy_(dy.div_(divisor).mul_(source > 0))
        factor = divisor.to(grad.dtype).reciprocal()
        return dx, None, (dfactor * -factor.square()).sum_to_size(divisor.shape).to(divisor.dtype)


def _slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [t.split(samples_in_cache(tensors[0])) for t in tensors]


def _sharpened(x: Tensor, power: float, divisor: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The direction of the sharpened tokens into ``out``; relu(x) + 1e-6, what that is divided, and its norm."""
    positive = x.to(out.dtype).clamp(min=0).add_(1e-6)
    y = positive / divisor.to(out.dtype)
    torch.div(y, y.amax((-2, -1), keepdim=True), out=out).pow_(power)
    out.div_(torch.linalg.vector_norm(out, dim=(-2, -1), keepdim=True))
    return positive, y, torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
