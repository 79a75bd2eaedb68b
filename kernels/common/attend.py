"""Softmax attention by PyTorch's fused kernels, with derivatives of any order and of either mode."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.mode import eager, forward_mode, transformed
from visionattn.kernels.common.precision import precise
from visionattn.kernels.common.twice import Found, Remade, remake, watch

__all__ = ["attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``softmax(scale * q k^T + mask) v``. L queries, S keys, D head dim, E width of a value; TorchScript compiles it.

    PyTorch's fused kernels have first derivatives only. These are made differentiable where somebody wants to
    differentiate them; while torch.func maps or differentiates with gradients on, and in forward mode, products
    take the kernels' place. ``torch.fx`` records one call.

    Args:
        q: [..., L, D]
        k: [..., S, D]
        v: [..., S, E]
        mask: Added to the logits, of the dtype of ``q``, or booleans, False where a query sees nothing of a key; None
            for neither. Broadcasts to [..., L, S]
        scale: Factor of the logits; None stands for D ** -0.5.

    Returns:
        [..., L, E]
    """
    return _recorded(q, k, v, mask, scale)


@torch.fx.wrap  # a tracer finds it where it is called: in this file
def _recorded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        return _differentiable(q, k, v, mask, scale)


def _differentiable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    # Whether a mapped mask needs a gradient, which the kernels refuse, cannot be seen from within a map.
    if transformed() and (torch.is_grad_enabled() or forward_mode()):
        return _by_products(q, k, v, mask, scale)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    if out.requires_grad and eager(q):
        watch(out, "ScaledDotProduct", _again)
    return out


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    logits = precise(q) * (q.shape[-1] ** -0.5 if scale is None else scale) @ precise(k).transpose(-1, -2)
    if mask is None:
        weights = logits.softmax(-1)
    elif mask.dtype == torch.bool:  # a query that sees no key gets zeros, as from the kernels
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(~mask, 0)
    else:
        weights = (logits + mask).softmax(-1)
    return weights.to(v.dtype) @ v


def _again(found: Found, grads: tuple[Tensor, ...]) -> Found | None:
    return remake(_read, found, grads)


def _read(node: Any, grad: Tensor) -> Remade:
    mask = getattr(node, "_saved_attn_mask", None)
    mask = getattr(node, "_saved_attn_bias", None) if mask is None else mask
    if node._saved_dropout_p > 0:
        raise RuntimeError("attention with dropout has no second derivatives in PyTorch's fused kernels")
    scale, causal = node._saved_scale, node._saved_is_causal

    def form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)

    return form, (node._saved_query, node._saved_key, node._saved_value, mask)
