"""What is done with the tensors of a call: whether anything traces, compiles, exports, transforms or autocasts them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "autocast",
    "autocasting",
    "compiling",
    "eager",
    "exporting",
    "forward_mode",
    "transformed",
    "within_transform",
]


def exporting() -> bool:
    """Whether a graph is being recorded for another runtime, which knows PyTorch's own operators only."""
    # torch 2.11's is_exporting() says yes while torch.compile traces, too; the flag behind it does not.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    exported = torch.compiler.is_exporting() if flag is None else flag
    return exported or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether torch.func maps or differentiates, or tangents are carried along.

    None of them knows anything of a custom operator's gradient; forward mode would drop the tangents.
    """
    level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)
    return level() is not None or forward_mode()


def forward_mode() -> bool:
    """Whether tangents are carried along with values: ``torch.func.jvp`` or dual numbers."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def compiling() -> bool:
    """Whether a graph for this machine is being compiled, in which operators of our own may stand."""
    return torch.compiler.is_compiling() and not exporting() and not transformed()


def within_transform(x: Tensor) -> bool:
    """Whether a tensor, such as a gradient, is mapped or carries tangents: also by ``is_grads_batched=True``."""
    return transformed() or torch._C._functorch.is_legacy_batchedtensor(x)


# A compiler asks once, while it traces, and cannot look inside.
for _question in (transformed, forward_mode, within_transform):
    _question._dynamo_marked_constant = True


def eager(x: Tensor) -> bool:
    """Whether a tensor is an ordinary one with values, which nothing traces, compiles or transforms."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) in (Tensor, torch.nn.Parameter) and not recorded and not transformed()


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; meta has none, and asking it raises."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, cast to the autocast dtype as a convolution does."""
    if not autocasting(x) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))
