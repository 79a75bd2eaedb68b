"""Neighborhood attention without kernels of its own: which form suits a call, and the form for compilers of GPU code.
Letters: B batch, N positions, h heads, D head dim, K window side, S slots of a window.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from visionattn.kernels.common import mode
from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.neighborhood.compiled import neighborhood_attention_op
from visionattn.kernels.neighborhood.export import neighborhood_attention_export
from visionattn.kernels.neighborhood.geometry import map_windows
from visionattn.kernels.neighborhood.tiled import neighborhood_attention_tiled

__all__ = ["neighborhood_attention_torch"]


def neighborhood_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """The fastest form known in operators of PyTorch. Arguments as in :func:`neighborhood_attention`, per axis.

    Tiles of neighboring queries attend to all the keys that one of them sees, under a mask. See ``tiles.py``.
    """
    arguments = (q, k, v, kernel_size, dilation, bias, is_causal, scale)
    eager = mode.eager(q)
    if not eager and mode.exporting():  # for any size, and the same graph whether or not gradients are on
        return neighborhood_attention_export(*arguments)
    if math.prod(kernel_size) == 1:  # nothing to share
        return _gathered(*arguments)
    if not torch.compiler.is_compiling():
        return neighborhood_attention_tiled(*arguments, eager)
    if q.device.type == "cpu" and not mode.transformed():
        return neighborhood_attention_op(*arguments)
    return _gathered(*arguments)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """The reference in elementwise operators, which a compiler fuses with the gather, so that it is never stored."""
    full = precise_dtype(q.dtype)
    spatial = tuple(operator.index(side) for side in q.shape[1:-2])  # one graph for each size of the map
    keys, offsets, exists = map_windows(spatial, kernel_size, dilation, is_causal, q.device)
    rows, k, v = (t.flatten(1, -3) for t in (q, k, v))  # B N h D
    logits = (k[:, keys].to(full) * (rows.to(full) * scale)[:, :, None]).sum(-1)  # B N S h
    if bias is not None:
        logits = logits + bias.to(full).flatten(1)[:, offsets].permute(1, 2, 0)
    weights = logits.masked_fill(~exists[..., None], -torch.inf).softmax(2)
    return (weights[..., None] * v[:, keys].to(full)).sum(2).view(q.shape).to(q.dtype)
