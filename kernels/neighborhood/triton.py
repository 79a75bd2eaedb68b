"""Triton kernels of neighborhood attention: forward, backward and the gradient of the relative position bias.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j] + bias[j - i]),   j in the window of i

Shapes: B batch, Z planes, Y rows, X columns, h heads, D head dim, K window side. A 1-D map is one row, a 2-D map one
plane. Every sum has a fixed order: results are the same, bit by bit, on every run.

NaN and Inf in q, k and v reach the outputs of those queries only whose window holds them, as in the reference: a tile
whose result holds any is computed again, slowly, one query at a time. Gradients have no such promise: NaN or Inf in
an input or an incoming gradient may spread to all gradients of the tiles around it, and to that of the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.launch import in_base_2
from visionattn.kernels.common.layout import last_contiguous
from visionattn.kernels.common.mode import autocast
from visionattn.kernels.neighborhood.autograd import empty_gradients, empty_results, register
from visionattn.kernels.neighborhood.launches import (
    FORWARD,
    GRAD_KEY,
    GRAD_QUERY,
    GRAD_QUERY_BIAS,
    launch,
    strides_of,
    unsupported,
)
from visionattn.kernels.neighborhood.triton_kernels import (
    neighborhood_bwd_dkv,
    neighborhood_bwd_dq,
    neighborhood_fwd,
)

__all__ = ["neighborhood_attention_triton", "unsupported"]


@custom_op("neighborhood_attention", rows=("q", "k", "v"), whole=("bias",))
def _neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the logits, in base 2. The last axis of q, k, v is contiguous, so is bias."""
    out, lse = empty_results(q)
    if out.numel() == 0:
        return out, lse
    grid, sizes, constants = launch(FORWARD, q, kernel_size, dilation, is_causal, bias)
    neighborhood_fwd[grid](
        q, k, v, q if bias is None else bias, out, lse, *map(strides_of, (q, k, v, out)),
        *sizes, *in_base_2(scale), **constants,
    )  # fmt: skip
    return out, lse


@custom_op("neighborhood_attention_backward", rows=("grad", "q", "k", "v"), whole=("bias", "out", "lse"))
def _neighborhood_backward(
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
    """The gradients of q, k, v and bias, the last (a sum of partial sums: no atomics) empty if not wanted."""
    dq, dk, dv, dbias = empty_gradients(q, bias, bias_grad)
    if q.numel() == 0:
        return dq, dk, dv, dbias.zero_()
    delta = torch.empty_like(lse)
    grad_strides, q_strides, k_strides, v_strides, out_strides = map(strides_of, (grad, q, k, v, out))
    table = q if bias is None else bias
    kernel = GRAD_QUERY_BIAS if bias_grad else GRAD_QUERY
    grid, sizes, constants = launch(kernel, q, kernel_size, dilation, is_causal, bias)
    parts = lse
    window = constants["WINDOW"]
    if bias_grad:
        make = torch.zeros if window[0] > 1 else torch.empty  # a program writes the planes that it sees
        shape = (grid[0], 2 * window[0] - 1, constants["BINS"], constants["BLOCK_N"])
        parts = make(shape, device=q.device, dtype=lse.dtype)
    neighborhood_bwd_dq[grid](
        grad, q, k, v, table, out, lse, delta, dq, parts, grad_strides, q_strides, k_strides, v_strides, out_strides,
        *sizes, *in_base_2(scale), **constants,
    )  # fmt: skip
    if bias_grad:
        rows = constants["BLOCK_N"] // constants["PITCH"]
        parts = parts.unflatten(0, (-1, q.shape[-2])).sum(0).unflatten(-1, (rows, -1))  # h 2KZ-1 BINS rows PITCH
        K_y, K_x = 2 * window[1] - 1, 2 * window[2] - 1
        total = sum(parts[:, :, rows - 1 - r : rows - 1 - r + K_y, r, :K_x] for r in range(rows))
        dbias.copy_(total.reshape(bias.shape))
    grid, sizes, constants = launch(GRAD_KEY, q, kernel_size, dilation, is_causal, bias)
    neighborhood_bwd_dkv[grid](
        grad, q, k, v, table, lse, delta, dk, dv, grad_strides, q_strides, k_strides, v_strides, out_strides,
        *sizes, *in_base_2(scale), **constants,
    )  # fmt: skip
    return dq, dk, dv, dbias


register("neighborhood_attention", _neighborhood, _neighborhood_backward)


def neighborhood_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """The Triton kernels. Arguments as in :func:`neighborhood_attention`, one value per axis.

    They read q, k and v in place if their last axis is contiguous, as it is in views of one projection.
    """
    q, k, v = map(last_contiguous, autocast(q, k, v))
    bias = None if bias is None else bias.contiguous()
    return _neighborhood(q, k, v, bias, list(kernel_size), list(dilation), list(is_causal), scale)[0]
