"""Gradients that can be differentiated again.

A fast backward pass is opaque to autograd. Whoever wants to differentiate it, too (``create_graph=True``), or runs it
within a transform (``is_grads_batched=True``, dual numbers), has the gradients computed through a form of the operator
that knows how. A pass of which nobody wants more costs :func:`wanted`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.kernels.common.mode import autocasting, transformed, within_transform

__all__ = ["Found", "Remade", "gradients", "remake", "stand_in", "wanted", "watch"]

Found = tuple[Tensor | None, ...]
Remade = tuple[Callable[..., Tensor], Sequence[Tensor | None]]


def wanted(grad: Tensor) -> bool:
    """Whether a backward pass of ``grad`` is itself differentiated, mapped, or carries tangents along."""
    return torch.is_grad_enabled() or within_transform(grad)


def gradients(form: Callable[..., Tensor], grad: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of ``form(*tensors)``, for the backward pass of an operator where they are :func:`wanted`.

    Args:
        form: Computes what the operator does, in operators that can be differentiated any number of times.
        grad: The gradient of its result.
        tensors: What it is applied to.

    Returns:
        One for each tensor, None for those that need none.
    """
    again = torch.is_grad_enabled()
    if not again and transformed():
        return _transformed_gradients(form, grad, tensors)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        # A tensor that is given for two arguments must not get the sum of their gradients twice.
        aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        needed = [t for t in aliases if t is not None and t.requires_grad]
        with _full_precision(grad):
            out = form(*aliases)
        found = torch.autograd.grad(out, needed, grad.to(out.dtype), create_graph=again, allow_unused=True)
    results = iter(found)
    return tuple(next(results) if t is not None and t.requires_grad else None for t in aliases)


def _transformed_gradients(form: Callable, grad: Tensor, tensors: Sequence[Tensor | None]) -> Found:
    """As :func:`gradients`, by a transform within the one that runs, whose tensors do not say what they require."""
    places = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]

    def of_needed(*needed: Tensor) -> Tensor:
        arguments = list(tensors)
        for i, t in zip(places, needed, strict=True):
            arguments[i] = t
        return form(*arguments)

    with _full_precision(grad):
        out, pull = torch.func.vjp(of_needed, *(tensors[i] for i in places))
    found: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(places, pull(grad.to(out.dtype)), strict=True):
        found[i] = gradient
    return tuple(found)


def _full_precision(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()


def stand_in(x: Tensor) -> Tensor:
    """Zeros shaped as ``x`` that need no memory: as a further result of an ``autograd.Function``, the way to ``x``.

    A Function that keeps what it has made of ``x``, and not ``x``, returns this and keeps it. In its backward pass
    ``x``, made again of what was kept, plus this has the value of ``x`` and gradients that go where those of ``x`` go;
    they come as the gradient of this result, to be added to that of ``x``.
    """
    return x.new_zeros(()).expand(x.shape)


def watch(out: Tensor, kind: str, again: Callable[[Found, tuple[Tensor, ...]], Found | None]) -> None:
    """Have a function called after the backward pass of one of PyTorch's own opaque operators, given by its result.

    Nearly all that this costs is what PyTorch needs to call any hook; an ``autograd.Function`` around the operator
    costs more.

    Args:
        out: The operator's result.
        kind: How the names of its nodes in autograd's graph begin.
        again: Calls :func:`remake`; a function of a module, since one made here would be a cycle with the node.
    """
    node = out.grad_fn
    for _ in range(3):  # what is cut off a result that was padded to what a kernel takes
        if node is None or node.name().startswith(kind):
            break
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None and node.name().startswith(kind):
        node.register_hook(again)


def remake(read: Callable[[Any, Tensor], Remade], found: Found, grads: tuple[Tensor, ...]) -> Found | None:
    """Replace the gradients that a watched node has found by what can be differentiated, if somebody wants to.

    Args:
        read: Of the node and the gradient of its result: a form of the operator, and the tensors it is applied to.
        found: What the backward pass has found.
        grads: What it was given.

    Returns:
        The gradients; None if ``found`` will do.
    """
    if grads[0] is None or not wanted(grads[0]):
        return None
    form, tensors = read(torch._C._current_autograd_node(), grads[0])
    again = gradients(form, grads[0], tensors)
    return tuple(None if old is None else new for old, new in zip(found, again[: len(found)], strict=True))
