"""Neighborhood attention in tiles as one opaque operator, for compiled graphs on a CPU. B batch, h heads.

A compiler cannot improve on the tiles. It can fuse the gather of the reference, but the gradient of that adds to every
key once per query that sees it: atomically where there is more than one thread, which takes ten times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.neighborhood.autograd import empty_gradients, empty_results, register
from visionattn.kernels.neighborhood.gradient import flash_backward, flash_forward, matrix_backward
from visionattn.kernels.neighborhood.tiled import finite, neighborhood_attention_tiled

__all__ = ["neighborhood_attention_op"]


def neighborhood_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """One node of a graph. Arguments as in :func:`neighborhood_attention`, one value per axis."""
    return _tiles(q, k, v, bias, list(kernel_size), list(dilation), list(is_causal), scale)[0]


@torch.library.custom_op("visionattn::neighborhood_attention_tiles", mutates_args=(), device_types="cpu")
def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the logits, [B, *spatial, h]."""
    if q.numel() == 0:
        return empty_results(q)
    window, causal = (tuple(kernel_size), tuple(dilation)), tuple(is_causal)
    out, lse = flash_forward(q, k, v, bias, *window, causal, scale)
    if not finite(out):  # what is not finite must not reach other queries of its tile
        out = neighborhood_attention_tiled(q, k, v, *window, bias, causal, scale, eager=True)
    return out, lse


@torch.library.custom_op("visionattn::neighborhood_attention_tiles_backward", mutates_args=(), device_types="cpu")
def _tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias, the last empty if not wanted."""
    if q.numel() == 0:
        dq, dk, dv, dbias = empty_gradients(q, bias, bias_grad)
        return dq, dk, dv, dbias.zero_()
    setting = tuple(kernel_size), tuple(dilation), tuple(is_causal), scale
    with torch.autocast("cpu", enabled=False):
        if bias_grad:
            return matrix_backward(grad, q, k, v, bias, *setting)
        return *flash_backward(grad, q, k, v, bias, out, lse, *setting), q.new_empty(0)


register("neighborhood_attention_tiles", _tiles, _tiles_backward)
