"""Triton kernels of the focused feature map: one pass over the tokens, all heads of a token together.

    y = (relu(x) + 1e-6) * factor,   u = (y / max(y)) ** p,   out = |y| u / |u|

Shapes: B batch, N tokens, h heads, D head dim, C = h * D channels. Strides are those of B and N.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.checks import unsupported_count, unsupported_dtype
from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.layout import last_contiguous
from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.focused_map.export import focused_export
from visionattn.kernels.focused_map.launches import MAX_CHANNELS, MAX_STEPS, PROGRAMS, constants
from visionattn.kernels.focused_map.triton_kernels import focused_bwd, focused_fwd

__all__ = ["focused_triton", "unsupported"]


@custom_op("focused", rows=("x",), whole=("factor",))
def _focused(x: Tensor, factor: Tensor, power: float) -> Tensor:
    """[B, N, C], whose channels are contiguous, and [C] to [B, N, C]"""
    out = _empty_result(x)
    if out.numel() > 0:
        config = constants(x.shape[-1], power, x.dtype)
        rows, N, C = x.shape[0] * x.shape[1], *x.shape[1:]
        focused_fwd[(-(-rows // config["BLOCK_N"]),)](x, factor, out, x.stride()[:2], rows, N, C, **config)
    return out


def _empty_result(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=precise_dtype(x.dtype))


@_focused.register_fake
def _(x, factor, power):
    return _empty_result(x)


@custom_op("focused_backward", rows=("grad", "x"), whole=("factor",))
def _focused_backward(grad: Tensor, x: Tensor, factor: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and factor."""
    dx, dfactor = _empty_gradients(x, factor)
    if x.numel() == 0:
        return dx, dfactor.zero_()
    config = constants(x.shape[-1], power, x.dtype)
    rows, N, C = x.shape[0] * x.shape[1], *x.shape[1:]
    blocks, steps = -(-rows // config["BLOCK_N"]), 1
    while steps < MAX_STEPS and blocks // (2 * steps) >= PROGRAMS:
        steps *= 2
    parts = torch.empty((-(-blocks // steps), C), device=x.device, dtype=grad.dtype)
    focused_bwd[(len(parts),)](
        grad, x, factor, dx, parts, grad.stride()[:2], x.stride()[:2], rows, N, C, STEPS=steps, **config
    )
    return dx, dfactor.copy_(parts.sum(0))


def _empty_gradients(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype), torch.empty_like(factor)


@_focused_backward.register_fake
def _(grad, x, factor, power):
    return _empty_gradients(x, factor)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.power = inputs[2]


def _backward(ctx, grad):
    if twice.wanted(grad):
        dx, dfactor = twice.gradients(partial(_again, ctx.power), grad, ctx.saved_tensors)
        return dx, dfactor, None
    return *_focused_backward(last_contiguous(grad), *ctx.saved_tensors, ctx.power), None


def _again(power: float, x: Tensor, factor: Tensor) -> Tensor:
    """As one head, of which the norms are those of whole tokens, too."""
    return focused_export(x[:, :, None], power, factor.reciprocal()).squeeze(2)


_focused.register_autograd(_backward, setup_context=_save)


def focused_triton(x: Tensor, power: float, divisor: Tensor) -> Tensor:
    """The Triton kernels, which read ``x`` in place where it is a view of one projection.

    Args:
        x: [B, N, h, D]
        power: The focusing factor.
        divisor: One for all or one of each channel. [] or [h, D]
    """
    factor = divisor.to(precise_dtype(x.dtype)).reciprocal().expand(x.shape[2:])
    tokens = last_contiguous(x.flatten(2))
    return _focused(tokens, factor.reshape(-1).contiguous(), float(power)).unflatten(2, x.shape[2:])


def unsupported(x: Tensor) -> str | None:
    """What of a call the Triton kernels do not cover, ``None`` if they cover it."""
    if x.dim() != 4:
        return f"x must be [B, N, heads, D], got shape {tuple(x.shape)}"
    if reason := unsupported_dtype(x):
        return reason
    if x.shape[2:].numel() > MAX_CHANNELS:
        return f"there are {x.shape[2:].numel()} channels, the kernels cover up to {MAX_CHANNELS}"
    return unsupported_count(x.shape[:2].numel(), "tokens")
