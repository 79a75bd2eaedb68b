"""What every pair of operators for neighborhood attention and its gradient shares: shapes, autograd and FLOPs.

    out, lse = forward(q, k, v, bias, kernel_size, dilation, is_causal, scale)
    dq, dk, dv, dbias = backward(grad, q, k, v, bias, out, lse, kernel_size, dilation, is_causal, scale, bias_grad)

lse is the log-sum-exp of the logits, [B, *spatial, h]; dbias is empty unless bias_grad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.layout import last_contiguous
from visionattn.kernels.common.precision import precise, precise_dtype
from visionattn.kernels.neighborhood.export import neighborhood_attention_export

__all__ = ["empty_gradients", "empty_results", "register"]


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """The results of the forward operator, yet to be filled."""
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    return out, torch.empty(q.shape[:-1], device=q.device, dtype=precise_dtype(q.dtype))


def empty_gradients(q: Tensor, bias: Tensor | None, bias_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of the backward operator, yet to be filled."""
    dq, dk, dv = (torch.empty(q.shape, device=q.device, dtype=q.dtype) for _ in range(3))
    return dq, dk, dv, torch.empty(bias.shape, device=q.device, dtype=bias.dtype) if bias_grad else q.new_empty(0)


def register(name: str, forward: Callable, backward: Callable) -> None:
    """Register all that operators need beside their implementation.

    Args:
        name: That of the forward operator, ``visionattn::name``; the other's is ``name_backward``.
        forward: The result of ``torch.library.custom_op``.
        backward: The same.
    """

    @forward.register_fake
    def _(q, *arguments):
        return empty_results(q)

    @backward.register_fake
    def _(grad, q, k, v, bias, *arguments):
        return empty_gradients(q, bias, arguments[-1])

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.arguments = inputs[4:]
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad, grad_lse):
        if grad is None:
            return (None,) * 8
        if twice.wanted(grad):
            tensors = ctx.saved_tensors[:4]
            return *twice.gradients(partial(_again, ctx.arguments), grad, tensors), *(None,) * 4
        bias_grad = ctx.needs_input_grad[3]
        *grads, dbias = backward(last_contiguous(grad), *ctx.saved_tensors, *ctx.arguments, bias_grad)
        return *grads, dbias if bias_grad else None, *(None,) * 4

    forward.register_autograd(differentiate, setup_context=save)
    flop_formula(name)(lambda q, k, v, bias, window, *args, **kw: _flops(q, window, products=2))
    # The logits once more, then dp, dq, dk, dv.
    flop_formula(f"{name}_backward")(
        lambda grad, q, k, v, bias, out, lse, window, *args, **kw: _flops(q, window, products=5)
    )


def _again(arguments, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    kernel_size, dilation, is_causal, scale = arguments
    tensors = (precise(t) for t in (q, k, v))
    bias = None if bias is None else precise(bias)
    return neighborhood_attention_export(*tensors, kernel_size, dilation, bias, is_causal, scale)


def _flops(shape: Sequence[int], window: Sequence[int], products: int) -> int:
    """Floating-point operations of some products of [N, S] with [S, D], S being the keys of a window."""
    return 2 * products * math.prod(shape) * math.prod(window)
