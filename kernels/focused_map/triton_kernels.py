"""Triton kernels of the focused feature map; the docstring of ``triton.py`` says what they compute.

Shapes: B batch, N tokens, C channels of all heads. Strides are those of B and N.
"""

from __future__ import annotations

from visionattn.kernels.common.jit import jit, tl


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
def focused_fwd(
    x, factor, out, x_strides, rows, N, C,
    POWER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    inside = (n < rows)[:, None] & (c < C)[None, :]
    factors = tl.load(factor + c, c < C, other=0.0).to(ACC)
    _, _, _, unit, norm = _focused_parts(x, factors, x_strides, n, c, N, inside, POWER, ACC)
    tl.store(out + n.to(tl.int64)[:, None] * C + c[None, :], unit * norm, inside)


@jit
def focused_bwd(
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
