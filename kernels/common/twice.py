"""Gradients that can be differentiated again.

A fast backward pass is opaque to autograd. Whoever wants to differentiate it, too (``create_graph=True``), has the
gradients computed through a form of the operator that can be.

A pass that nobody differentiates costs one look at ``torch.is_grad_enabled()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.kernels.common.mode import autocasting

__all__ = ["gradients", "stand_in", "watch"]


def gradients(form: Callable[..., Tensor], grad: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of ``form(*tensors)``, for the backward pass of an operator while gradients are enabled.

    Args:
        form: Computes what the operator does, in operators that can be differentiated any number of times.
        grad: The gradient of its result.
        tensors: What it is applied to.

    Returns:
        One for each tensor, None for those that need none.
    """
    # A tensor that is given for two arguments must not get the sum of their gradients twice.
    aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
    needed = [t for t in aliases if t is not None and t.requires_grad]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if autocasting(grad):
            with torch.autocast(grad.device.type, enabled=False):
                out = form(*aliases)
        else:
            out = form(*aliases)
        found = torch.autograd.grad(out, needed, grad.to(out.dtype), create_graph=True, allow_unused=True)
    results = iter(found)
    return tuple(next(results) if t is not None and t.requires_grad else None for t in aliases)


def stand_in(x: Tensor) -> Tensor:
    """Zeros shaped as ``x`` that need no memory: as a further result of an ``autograd.Function``, the way to ``x``.

    A Function that keeps what it has made of ``x``, and not ``x``, returns this and keeps it. In its backward pass
    ``x``, made again of what was kept, plus this has the value of ``x`` and gradients that go where those of ``x`` go;
    they come as the gradient of this result, to be added to that of ``x``.
    """
    return x.new_zeros(()).expand(x.shape)


def watch(out: Tensor) -> None:
    """Give a result of PyTorch's fused attention gradients that can be differentiated again."""
    node = out.grad_fn
    for _ in range(3):  # what is cut off a result that was padded to what a kernel takes
        if node is None or node.name().startswith("ScaledDotProduct"):
            break
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None and node.name().startswith("ScaledDotProduct"):
        node.register_hook(_differentiable)


def _differentiable(found: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...] | None:
    """Called after the backward pass of fused attention: replaces what it has found by what can be differentiated."""
    if not torch.is_grad_enabled() or grads[0] is None:
        return None
    node = torch._C._current_autograd_node()  # a reference of this function's own would be a cycle
    mask = getattr(node, "_saved_attn_mask", None)
    mask = getattr(node, "_saved_attn_bias", None) if mask is None else mask
    if node._saved_dropout_p > 0:
        raise RuntimeError("attention with dropout has no second derivatives in PyTorch's fused kernels")
    scale, causal = node._saved_scale, node._saved_is_causal

    def form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)

    again = gradients(form, grads[0], (node._saved_query, node._saved_key, node._saved_value, mask))
    return tuple(None if old is None else new for old, new in zip(found, again[: len(found)], strict=True))
