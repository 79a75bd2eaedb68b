"""The linear map as one operator of a compiled graph.

It is nothing that inductor would fuse with its neighbours either, and its own lowering of a convolution is several
times slower. Which form runs is looked up when the graph does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.dense.cpu import gradients, product, product_gelu

__all__ = ["linear_gelu_op", "linear_op"]


@torch.library.custom_op("visionattn::linear", mutates_args=())
def linear_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments as in :func:`linear`."""
    return product(x, weight, bias).contiguous()


@linear_op.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("visionattn::linear_gelu", mutates_args=())
def linear_gelu_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments as in :func:`linear_gelu`; without a gradient."""
    return product_gelu(x, weight, bias).contiguous()


@linear_gelu_op.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("visionattn::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, each empty if not needed."""
    found = gradients(grad, x, weight, needed)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in found)


@_linear_backward.register_fake
def _(grad, x, weight, needed):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (x.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, needed, strict=True))
    return dx, dw, db


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    if twice.wanted(grad):
        return twice.gradients(F.linear, grad, ctx.saved_tensors)
    needed = list(ctx.needs_input_grad)
    found = _linear_backward(grad, *ctx.saved_tensors[:2], needed)
    return tuple(g if wanted else None for g, wanted in zip(found, needed, strict=True))


linear_op.register_autograd(_backward, setup_context=_save)


@flop_formula("linear")
@flop_formula("linear_gelu")
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@flop_formula("linear_backward")
def _flops_backward(grad_shape, x_shape, weight_shape, needed, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0] * sum(needed[:2])
