"""Linear map of the last axis, on a CPU as the 1x1 convolution of oneDNN. Shapes: N positions, C channels in, O out.

    y = x weight^T + bias

The same matrix product as ``F.linear``, which is MKL's. To a compiler the product is one opaque operator: it is nothing
that inductor would fuse with its neighbours either, and its own lowering of such a convolution is several times slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.checks import check_same, check_tensors
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.mode import exporting, transformed

__all__ = ["linear"]

ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in the fastest form known for device and dtype.

    Args:
        x: Features. [..., C]
        weight: One row per output. [O, C]
        bias: Added to the result, or ``None``. [O]

    Returns:
        The mapped features. [..., O]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _fastest(x, weight, bias)
    try:
        return _fastest(x, weight, bias)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check(x, weight, bias)  # not before: it takes half as long as a small product
        raise


def _fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if x.dim() < 3 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.compiler.is_compiling():
        return F.linear(x, weight, bias) if torch.jit.is_tracing() else _product(x, weight, bias)
    return F.linear(x, weight, bias) if exporting() or transformed() else _linear(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(x=x, weight=weight)
    check_tensors(True, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [O, C], got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., C] with C = {weight.shape[1]} as in weight, got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [O] with O = {weight.shape[0]} as in weight, got shape {tuple(bias.shape)}")
    check_same(x, weight=weight, bias=bias)


def _samples(x: Tensor) -> tuple[int, int]:
    """How many samples of maps the positions pass as, 0 where a convolution does not pay, and how many zeros follow.

    On one thread PyTorch leaves convolutions of less than 16 samples to MKL; many small ones are slow. Where no number
    of samples fits, as with 196 patches and a class token, up to 15 zeros make 16 of them: measured 1.5 to 2.1 times
    the speed of MKL from 100 positions on, no gain at 50.
    """
    positions = x.shape[:-1].numel()
    samples = next((n for n in range(16, min(64, positions // 4) + 1) if positions % n == 0), len(x))
    if positions == 0 or samples >= 16 or torch.get_num_threads() > 1:
        return (samples if positions else 0), 0
    return (16, -positions % 16) if positions >= 96 else (0, 0)


def _maps(x: Tensor, samples: int, zeros: int) -> Tensor:
    """[..., C] as channels_last maps [samples, C, positions, 1]"""
    if zeros:
        x = F.pad(x.reshape(-1, x.shape[-1]), [0, 0, 0, zeros])
    return x.reshape(samples, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _positions(maps: Tensor, like: Tensor) -> Tensor:
    """The maps' positions in the order of ``like`` [..., C], without the zeros that follow."""
    rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])[: like.shape[:-1].numel()]
    return rows.reshape(*like.shape[:-1], maps.shape[1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    samples, zeros = _samples(x)
    if not samples:
        return F.linear(x, weight, bias)
    return _positions(F.conv2d(_maps(x, samples, zeros), weight[:, :, None, None], bias), x)


@torch.library.custom_op("visionattn::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias).contiguous()


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("visionattn::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, each empty if not needed."""
    samples, zeros = _samples(x)
    if not samples:
        return _matrix_backward(grad, x, weight, needed)
    maps = _maps(grad, samples, zeros), _maps(x, samples, zeros), weight[:, :, None, None]
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, groups
    dx, dw, db = torch.ops.aten.convolution_backward(*maps, [len(weight)], *geometry, needed)
    return (
        _positions(dx, x).contiguous() if needed[0] else x.new_empty(0),
        dw.reshape(weight.shape).contiguous() if needed[1] else x.new_empty(0),
        db if needed[2] else x.new_empty(0),
    )


def _matrix_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad.reshape(-1, len(weight))
    return (
        (rows @ weight).view(x.shape) if needed[0] else x.new_empty(0),
        rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else x.new_empty(0),
        rows.sum(0) if needed[2] else x.new_empty(0),
    )


@_linear_backward.register_fake
def _(grad, x, weight, needed):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (x.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, needed, strict=True))
    return dx, dw, db


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    if torch.is_grad_enabled():  # somebody wants to differentiate this, too
        return twice.gradients(F.linear, grad, ctx.saved_tensors)
    needed = list(ctx.needs_input_grad)
    found = _linear_backward(grad, *ctx.saved_tensors[:2], needed)
    return tuple(g if wanted else None for g, wanted in zip(found, needed, strict=True))


_linear.register_autograd(_backward, setup_context=_save)


@flop_formula("linear")
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@flop_formula("linear_backward")
def _flops_backward(grad_shape, x_shape, weight_shape, needed, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0] * sum(needed[:2])
