"""Softmax attention by PyTorch's fused kernels, with derivatives of any order and of either mode."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.mode import eager, forward_mode, transformed
from visionattn.kernels.common.precision import precise
from visionattn.kernels.common.twice import watch

__all__ = ["attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``softmax(scale * q k^T + mask) v``. L queries, S keys, D head dim, E width of a value; TorchScript compiles it.

    PyTorch's fused kernels have first derivatives only. These are made differentiable where somebody wants to
    differentiate them; while torch.func maps or differentiates with gradients on, and in forward mode, products
    take the kernels' place.

    Args:
        q: [..., L, D]
        k: [..., S, D]
        v: [..., S, E]
        mask: Added to the logits, or None; of the dtype of ``q``. Broadcasts to [..., L, S]
        scale: Factor of the logits; None stands for D ** -0.5.

    Returns:
        [..., L, E]
    """
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        return _differentiable(q, k, v, mask, scale)


def _differentiable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    # Whether a mapped mask needs a gradient, which the kernels refuse, cannot be seen from within a map.
    if transformed() and (torch.is_grad_enabled() or forward_mode()):
        logits = precise(q) * (q.shape[-1] ** -0.5 if scale is None else scale) @ precise(k).transpose(-1, -2)
        return (logits if mask is None else logits + mask).softmax(-1).to(v.dtype) @ v
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    if out.requires_grad and eager(q):
        watch(out)
    return out
