"""Rotation of pairs as one opaque operator, for compiled graphs on a CPU: code that a compiler writes for interleaved
pairs is scalar, and several times slower. B batch, N positions, h heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.common import backend as _dispatch
from visionattn.kernels.linear_attn import cpu as _linear_eager

__all__ = ["rotate_op", "suits_compiler"]


def suits_compiler(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether a compiler is recording a call that the operator covers: on a CPU, of tables without gradients."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or cos.requires_grad or sin.requires_grad:
        return False
    return not _dispatch.exporting() and not _dispatch.transformed()


@torch.library.custom_op("visionattn::rotate_pairs", mutates_args=(), device_types="cpu")
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Arguments as of ``linear_forms.rotate_pairs``. The result has the dtype of ``cos``. [B, N, h, D]"""
    return _linear_eager.rotate_pairs(x, cos, sin).contiguous()


@rotate_op.register_fake
def _(x, cos, sin):
    return torch.empty(x.shape, device=x.device, dtype=cos.dtype)


def _save(ctx, inputs, output):
    x, cos, sin = inputs
    ctx.save_for_backward(cos, sin)
    ctx.dtype = x.dtype


def _backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    return rotate_op(grad, cos, -sin).to(ctx.dtype), None, None


rotate_op.register_autograd(_backward, setup_context=_save)
