"""Triton kernels of window attention: forward, backward, and the gradients of the bias table and of the padding.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j] + bias[i - j] + masked * apart[i, j])

Shapes: B batch, H rows, W columns, h heads, D head dim, w window sides, S = w0 * w1 tokens of a window. Queries, keys
and values are read in place, and their gradients written as those of one projection. Every sum has a fixed order:
results are the same, bit by bit, on every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.checks import unsupported_count, unsupported_dtype
from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.launch import in_base_2, strides
from visionattn.kernels.common.layout import last_contiguous
from visionattn.kernels.common.mode import autocast
from visionattn.kernels.common.precision import precise, precise_dtype
from visionattn.kernels.window.export import window_attention_export
from visionattn.kernels.window.geometry import table_gradient
from visionattn.kernels.window.launches import (
    BACKWARD,
    FORWARD,
    GRAD_BIAS,
    GRAD_KEY,
    GRAD_QUERY,
    MAX_HEAD_DIM,
    MAX_TOKENS,
    PROGRAMS,
    bias_constants,
    constants,
    in_one_program,
)
from visionattn.kernels.window.triton_kernels import (
    window_bias,
    window_bwd,
    window_bwd_dkv,
    window_bwd_dq,
    window_fwd,
)

__all__ = ["unsupported", "window_attention_triton"]


class _Launch:
    """What the launches of a call have in common."""

    def __init__(self, qkv, window, shift, bias, padding, masked, scale) -> None:
        B, H, W, _, self.heads, self.D = qkv.shape
        self.window, self.dtype = tuple(window), qkv.dtype
        grid = (-(-H // window[0]), -(-W // window[1]))
        self.windows = B * grid[0] * grid[1]
        self.tokens = window[0] * window[1]
        added = qkv if bias is None else _bias_tiles(bias, self.window, qkv.dtype)
        self.tensors = (qkv, added, qkv if padding is None else padding.contiguous())
        self.sizes = (self.heads, (H, W), grid, self.windows, *in_base_2(scale), *in_base_2(masked))
        self.form = (shift, bias is not None, padding is not None)

    def config(self, kernel: str, **form) -> dict:
        return constants(kernel, self.D, self.window, self.dtype, bool(torch.version.hip), *self.form) | form

    def run(self, programs: int, most: int) -> int:
        """How many windows a program takes where one each makes ``programs``."""
        return most if programs >= PROGRAMS * most else 1 if programs < 4 * PROGRAMS else 4

    def blocks(self, size: int) -> int:
        return -(-self.tokens // size)


def _bias_tiles(bias: Tensor, window: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What is added to the logits, so that the kernels read tiles of it in one piece. [h, SIDE, SIDE]"""
    config, heads = bias_constants(window), bias.shape[1]
    side = config["SIDE"]
    tiles = torch.empty((heads, side, side), device=bias.device, dtype=precise_dtype(dtype))
    grid = (heads * (side // config["BLOCK_M"]) ** 2,)
    window_bias[grid](bias.contiguous(), tiles, heads, **config)
    return tiles


def _partial(lse: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=lse.device, dtype=lse.dtype)


@custom_op("window_attention", rows=("qkv",))
def _window(
    qkv: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    window_size: list[int],
    shift: list[int],
    masked: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the logits, in base 2. The last axis of qkv is contiguous."""
    out, lse = _empty_results(qkv)
    if out.numel() == 0:
        return out, lse
    launch = _Launch(qkv, window_size, shift, bias, padding, masked, scale)
    config = launch.config(FORWARD)
    programs = launch.windows * launch.blocks(config["BLOCK_M"]) * launch.heads
    run = launch.run(programs, 4)
    grid = (-(-launch.windows // run) * launch.blocks(config["BLOCK_M"]) * launch.heads,)
    window_fwd[grid](*launch.tensors, out, lse, strides(qkv), *launch.sizes, RUN=run, **config)
    return out, lse


def _empty_results(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, H, W, _, h, D = qkv.shape
    out = torch.empty((B, H, W, h, D), device=qkv.device, dtype=qkv.dtype)
    return out, torch.empty((B, H, W, h), device=qkv.device, dtype=precise_dtype(qkv.dtype))


@_window.register_fake
def _(qkv, bias, padding, window_size, shift, masked, scale):
    return _empty_results(qkv)


@custom_op("window_attention_backward", rows=("grad", "qkv"), whole=("out", "lse"))
def _window_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window_size: list[int],
    shift: list[int],
    masked: float,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, bias and padding, the last two sums of partial sums and empty if there are none."""
    dqkv, dbias, dpadding = _empty_gradients(qkv, bias, padding, bias_grad)
    if qkv.numel() == 0:
        return dqkv, dbias.zero_(), dpadding.zero_()
    launch = _Launch(qkv, window_size, shift, bias, padding, masked, scale)
    backward = _backward_whole if in_one_program(launch.D, launch.window, qkv.dtype) else _backward_in_blocks
    bias_sums, padding_sums = backward(launch, grad, out, lse, dqkv, bias_grad)
    if bias_grad:
        total = bias_sums[:, : launch.tokens, : launch.tokens]
        dbias.copy_(table_gradient(total, *window_size))
    if padding is not None:
        dpadding[0].zero_()
        dpadding[1:].copy_(padding_sums.transpose(0, 1))
    return dqkv, dbias, dpadding


def _backward_whole(launch: _Launch, grad, out, lse, dqkv, bias_grad) -> tuple[Tensor | None, Tensor | None]:
    """The sums over windows: of the bias gradient [h, S, S] or larger, of the padding's [h, 2, D]."""
    h = launch.heads
    run = launch.run(launch.windows * h, 16)
    programs = -(-launch.windows // run) * h
    config = launch.config(BACKWARD, RUN=run, BIAS_GRAD=bias_grad)
    block = config["BLOCK_M"]
    bias_parts = _partial(lse, programs, block, block) if bias_grad else lse
    padding_parts = _partial(lse, programs, 2, launch.D) if config["HAS_PADDING"] else lse
    window_bwd[(programs,)](
        grad, *launch.tensors, lse, dqkv, bias_parts, padding_parts, strides(grad), strides(launch.tensors[0]),
        *launch.sizes, **config,
    )  # fmt: skip
    return (
        bias_parts.unflatten(0, (-1, h)).sum(0) if bias_grad else None,
        padding_parts.unflatten(0, (-1, h)).sum(0) if config["HAS_PADDING"] else None,
    )


def _backward_in_blocks(launch: _Launch, grad, out, lse, dqkv, bias_grad) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`_backward_whole`, for windows of any size."""
    h = launch.heads
    delta = torch.empty_like(lse)
    steps = strides(grad), strides(launch.tensors[0])
    config = launch.config(GRAD_QUERY)
    grid = (launch.windows * launch.blocks(config["BLOCK_M"]) * h,)
    window_bwd_dq[grid](grad, *launch.tensors, out, lse, delta, dqkv, *steps, *launch.sizes, **config)
    config = launch.config(GRAD_KEY, RUN=1, BIAS_GRAD=False)
    programs = launch.windows * launch.blocks(config["BLOCK_N"]) * h
    parts = _partial(lse, programs, 2, launch.D) if config["HAS_PADDING"] else lse
    window_bwd_dkv[(programs,)](
        grad, *launch.tensors, lse, delta, dqkv, lse, parts, *steps, *launch.sizes, **config
    )  # fmt: skip
    padding_sums = parts.unflatten(0, (-1, h)).sum(0) if config["HAS_PADDING"] else None
    if not bias_grad:
        return None, padding_sums
    config = launch.config(GRAD_BIAS, BIAS_GRAD=True)
    rows, columns = launch.blocks(config["BLOCK_M"]), launch.blocks(config["BLOCK_N"])
    run = launch.run(launch.windows * rows * columns * h, 16)
    programs = -(-launch.windows // run) * rows * columns * h
    parts = _partial(lse, programs, config["BLOCK_M"], config["BLOCK_N"])
    window_bwd_dkv[(programs,)](
        grad, *launch.tensors, lse, delta, dqkv, parts, lse, *steps, *launch.sizes, RUN=run, **config
    )  # fmt: skip
    total = parts.unflatten(0, (-1, rows, columns, h)).sum(0).permute(2, 0, 3, 1, 4)  # h rows M columns N
    return total.flatten(3).flatten(1, 2), padding_sums


def _empty_gradients(
    qkv: Tensor, bias: Tensor | None, padding: Tensor | None, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none = qkv.new_empty(0)
    like = (qkv, bias if bias_grad else none, none if padding is None else padding)
    dqkv, dbias, dpadding = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in like)
    return dqkv, dbias, dpadding


@_window_backward.register_fake
def _(grad, qkv, bias, padding, out, lse, window_size, shift, masked, scale, bias_grad):
    return _empty_gradients(qkv, bias, padding, bias_grad)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.arguments = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * 7
    qkv, bias, padding, out, lse = ctx.saved_tensors
    if twice.wanted(grad):
        return *twice.gradients(partial(_again, ctx.arguments), grad, (qkv, bias, padding)), *(None,) * 4
    wanted = ctx.needs_input_grad
    grads = _window_backward(last_contiguous(grad), qkv, bias, padding, out, lse, *ctx.arguments, wanted[1])
    return grads[0], grads[1] if wanted[1] else None, None if padding is None else grads[2], *(None,) * 4


def _again(arguments, qkv: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    window, shift, masked, scale = arguments
    qkv, bias, padding = (None if t is None else precise(t) for t in (qkv, bias, padding))
    return window_attention_export(qkv, window, shift, bias, padding, masked, scale)


_window.register_autograd(_backward, setup_context=_save)


def _flop_count(qkv_shape: Sequence[int], window: Sequence[int], products: int) -> int:
    """Floating-point operations of some products of tokens, padded ones included, with the S tokens of their window."""
    B, H, W, _, h, D = qkv_shape
    tokens = B * h * (H + -H % window[0]) * (W + -W % window[1])
    return 2 * products * tokens * D * window[0] * window[1]


@flop_formula("window_attention")
def _flops(qkv_shape, bias_shape, padding_shape, window_size, *args, **kwargs) -> int:
    return _flop_count(qkv_shape, window_size, products=2)


@flop_formula("window_attention_backward")
def _flops_backward(grad_shape, qkv_shape, bias_shape, padding_shape, out, lse, window, *args, **kwargs) -> int:
    return _flop_count(qkv_shape, window, products=5)  # the logits once more, then dp, dq, dk, dv


def unsupported(qkv: Tensor, window_size: Sequence[int]) -> str | None:
    """What of a call the Triton kernels do not cover, ``None`` if they cover it."""
    if reason := unsupported_dtype(qkv):
        return reason
    if qkv.shape[-1] > MAX_HEAD_DIM:
        return f"the head dim is {qkv.shape[-1]}, the kernels cover up to {MAX_HEAD_DIM}"
    if math.prod(window_size) > MAX_TOKENS:
        return f"the window has {math.prod(window_size)} tokens, the kernels cover up to {MAX_TOKENS}"
    tokens = _flop_count(qkv.shape, window_size, 1) // (2 * qkv.shape[-1] * math.prod(window_size))
    return unsupported_count(tokens, "tokens times heads")


def window_attention_triton(
    qkv: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    padding: Tensor | None,
    masked: float,
    scale: float,
) -> Tensor:
    """The Triton kernels, which read qkv in place if its last axis is contiguous.

    Arguments as in :func:`window_attention`, one value per axis.
    """
    (qkv, padding) = autocast(qkv, padding)
    return _window(last_contiguous(qkv), bias, padding, list(window_size), list(shift), masked, scale)[0]
