"""Linear map of the last axis, on a CPU by the faster of two libraries. Shapes: C channels in, D channels out.

    y = x weight^T + bias

``F.linear`` is the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.checks import check_same, check_tensors
from visionattn.kernels.common.mode import compiling, eager
from visionattn.kernels.dense.compiled import linear_gelu_op, linear_op
from visionattn.kernels.dense.cpu import covers, product, product_gelu, trained

__all__ = ["linear", "linear_gelu"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in the fastest form known for device and dtype.

    Args:
        x: Features. [..., C]
        weight: One row per output. [D, C]
        bias: Added to the result, or ``None``. [D]

    Returns:
        The mapped features. [..., D]

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
    if not covers(x, weight, bias):
        return F.linear(x, weight, bias)
    if eager(x):
        return product(x, weight, bias)
    return linear_op(x, weight, bias) if compiling() else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias))``, in inference on a CPU without another pass over the result.

    Args:
        x: Features. [..., C]
        weight: One row per output. [D, C]
        bias: Added before GELU, or ``None``. [D]

    Returns:
        The activated features. [..., D]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    fits = isinstance(x, Tensor) and isinstance(weight, Tensor)
    if fits and not trained(x, weight) and covers(x, weight, bias):
        if eager(x):
            return product_gelu(x, weight, bias)
        if compiling():
            return linear_gelu_op(x, weight, bias)
    return F.gelu(linear(x, weight, bias))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(x=x, weight=weight)
    check_tensors(True, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [D, C], got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., C] with C = {weight.shape[1]} as in weight, got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [D] with D = {weight.shape[0]} as in weight, got shape {tuple(bias.shape)}")
    check_same(x, weight=weight, bias=bias)
