"""Triton kernels of the focused feature map: one pass over the tokens, all heads of a token together.

    y = (relu(x) + 1e-6) * factor,   u = (y / max(y)) ** p,   out = |y| u / |u|

Shapes: B batch, N tokens, h heads, D head dim, C = h * D channels. Strides are those of B and N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.common import backend as _dispatch
from visionattn.kernels.common import jit as _triton
from visionattn.kernels.common.jit import jit, tl

MAX_CHANNELS = 4096
PROGRAMS = 512  # enough for every GPU; the sum over tokens is split until there are as many
MAX_STEPS = 16


@jit
def _focused_parts(x, factor, strides, n, c, N, inside, POWER: tl.constexpr, ACC: tl.constexpr):
    """relu(x) + 1e-6, y, u / |u| and |y| of tokens."""
    at = (n // N).to(tl.int64) * strides[0] + (n % N).to(tl.int64) * strides[1]
    x = tl.load(x + at[:, None] + c[None, :], inside, other=0.0).to(ACC)
    positive = tl.where(x < 0, 0.0, x) + 1e-6
    y = tl.where(inside, positive * factor[None, :], 0.0)
    top = tl.max(y, 1)[:, None]
    share = y / tl.where(top > 0, top, 1.0)
    if POWER == 3:
        u = share * share * share
    else:
        u = tl.where(inside, tl.exp2(POWER * tl.log2(tl.where(inside, share, 1.0))), 0.0)
    norm = tl.sqrt(tl.sum(share * share, 1))[:, None] * top
    total = tl.sqrt(tl.sum(u * u, 1))[:, None]
    return x, positive, y, u / tl.where(total == 0, 1.0, total), norm


@jit
def _focused_fwd(
    x, factor, out, x_strides, rows, N, C,
    POWER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    inside = (n < rows)[:, None] & (c < C)[None, :]
    factors = tl.load(factor + c, c < C, other=0.0).to(ACC)
    _, _, _, unit, norm = _focused_parts(x, factors, x_strides, n, c, N, inside, POWER, ACC)
    tl.store(out + n.to(tl.int64)[:, None] * C + c[None, :], unit * norm, inside)


@jit
def _focused_bwd(
    grad, x, factor, dx, parts, grad_strides, x_strides, rows, N, C, STEPS: tl.constexpr,
    POWER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts are the sums of a program's tokens for the gradient of factor. [programs, C]"""
    c = tl.arange(0, BLOCK_C)
    factors = tl.load(factor + c, c < C, other=0.0).to(ACC)
    total = tl.zeros([BLOCK_C], ACC)
    for i in range(STEPS):
        n = (tl.program_id(0) * STEPS + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (n < rows)[:, None] & (c < C)[None, :]
        x_rows, positive, y, unit, norm = _focused_parts(x, factors, x_strides, n, c, N, inside, POWER, ACC)
        at = (n // N).to(tl.int64) * grad_strides[0] + (n % N).to(tl.int64) * grad_strides[1]
        grads = tl.load(grad + at[:, None] + c[None, :], inside, other=0.0).to(ACC)
        along = tl.sum(grads * unit, 1)[:, None]
        # Through the norm of y, and through the direction of u, where the maximum cancels.
        dy = along * y / tl.where(norm == 0, 1.0, norm)
        dy += norm * POWER * unit * (grads - unit * along) / tl.where(inside, y, 1.0)
        dy = tl.where(inside, dy, 0.0)
        total += tl.sum(dy * positive, 0)
        dx_rows = tl.where(x_rows > 0, dy * factors[None, :], 0.0)
        tl.store(dx + n.to(tl.int64)[:, None] * C + c[None, :], dx_rows.to(dx.dtype.element_ty), inside)
    tl.store(parts + tl.program_id(0).to(tl.int64) * C + c, total, c < C)


def launch_config(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of one launch. Few on purpose: all of them are compiled ahead of time in the tests."""
    block_c = max(64, 1 << max(C - 1, 0).bit_length())
    elements = 1024 if dtype.itemsize == 8 else 2048
    return {"BLOCK_N": max(1, elements // block_c), "BLOCK_C": block_c, "num_warps": 4 if block_c <= 1024 else 8}


def _constants(x: Tensor, power: float) -> dict:
    return {"POWER": int(power) if power == 3 else power, "ACC": _triton.accumulator(x.dtype)} | launch_config(
        x.shape[-1], x.dtype
    )


@torch.library.custom_op("visionattn::focused", mutates_args=())
def _focused(x: Tensor, factor: Tensor, power: float) -> Tensor:
    """[B, N, C], whose channels are contiguous, and [C] to [B, N, C]"""
    out = _empty_result(x)
    if out.numel() > 0:
        constants = _constants(x, power)
        rows, N, C = x.shape[0] * x.shape[1], *x.shape[1:]
        _focused_fwd[(-(-rows // constants["BLOCK_N"]),)](x, factor, out, x.stride()[:2], rows, N, C, **constants)
    return out


def _empty_result(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


@_focused.register_fake
def _(x, factor, power):
    return _empty_result(x)


@torch.library.custom_op("visionattn::focused_backward", mutates_args=())
def _focused_backward(grad: Tensor, x: Tensor, factor: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and factor."""
    dx, dfactor = _empty_gradients(x, factor)
    if x.numel() == 0:
        return dx, dfactor.zero_()
    constants = _constants(x, power)
    rows, N, C = x.shape[0] * x.shape[1], *x.shape[1:]
    blocks, steps = -(-rows // constants["BLOCK_N"]), 1
    while steps < MAX_STEPS and blocks // (2 * steps) >= PROGRAMS:
        steps *= 2
    parts = torch.empty((-(-blocks // steps), C), device=x.device, dtype=grad.dtype)
    _focused_bwd[(len(parts),)](
        grad, x, factor, dx, parts, grad.stride()[:2], x.stride()[:2], rows, N, C, STEPS=steps, **constants
    )
    return dx, dfactor.copy_(parts.sum(0))


def _empty_gradients(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype), torch.empty_like(factor)


@_focused_backward.register_fake
def _(grad, x, factor, power):
    return _empty_gradients(x, factor)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.power = inputs[2]


def _backward(ctx, grad):
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return *_focused_backward(grad, *ctx.saved_tensors, ctx.power), None


_focused.register_autograd(_backward, setup_context=_save)


def focused_triton(x: Tensor, power: float, divisor: Tensor) -> Tensor:
    """The Triton kernels, which read ``x`` in place where it is a view of one projection.

    Args:
        x: [B, N, h, D]
        power: The focusing factor.
        divisor: One for all or one of each channel. [] or [h, D]
    """
    factor = divisor.to(torch.promote_types(x.dtype, torch.float32)).reciprocal().expand(x.shape[2:])
    tokens = x.flatten(2)
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    return _focused(tokens, factor.reshape(-1).contiguous(), float(power)).unflatten(2, x.shape[2:])


def unsupported(x: Tensor) -> str | None:
    """What of a call the Triton kernels do not cover, ``None`` if they cover it."""
    if x.dim() != 4:
        return f"x must be [B, N, heads, D], got shape {tuple(x.shape)}"
    if x.dtype not in _dispatch._TRITON_DTYPES:
        return f"the dtype is {x.dtype}, the kernels cover {', '.join(map(str, _dispatch._TRITON_DTYPES))}"
    if x.shape[2:].numel() > MAX_CHANNELS:
        return f"there are {x.shape[2:].numel()} channels, the kernels cover up to {MAX_CHANNELS}"
    if x.shape[:2].numel() >= 2**31:
        return "the kernels count tokens in 32 bits, there are 2**31 or more"
    return None
