"""Triton kernels of bi-level routing attention, forward and backward, without copies of the routed regions.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j]),   j in the regions routed to

Shapes: B batch, H rows, W columns, h heads, D head dim of q and k, E of v, R regions, K routes of one, T tokens of one
and S of one of keys. Every sum has a fixed order: results are the same, bit by bit, on every run. The gradients of keys
and values are sums over the queries of the regions that are routed to theirs, found by sorting the routes: no atomics.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.bilevel.regions import cut
from visionattn.kernels.bilevel.triton_kernels import _bilevel_bwd_dkv, _bilevel_bwd_dq, _bilevel_fwd
from visionattn.kernels.common import backend as _dispatch
from visionattn.kernels.common import jit as _triton
from visionattn.kernels.common.flops import flop_formula

__all__ = ["bilevel_attention_triton", "launch_config", "unsupported"]

MAX_HEAD_DIM = {2: 128, 4: 64, 8: 64}  # by the bytes of a number
FORWARD, GRAD_QUERY, GRAD_KEY = "forward", "grad_query", "grad_key"


def launch_config(kernel: str, D: int, E: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of one launch: the largest that compile without spills.

    Args:
        kernel: Which of the kernels.
        D: Head dim of queries and keys.
        E: Head dim of values.
        tokens: Tokens of the regions that are cut into blocks: of keys for their gradients, else of queries.
        dtype: Of q, k and v.
    """
    widest = max(D, E)
    block = max(16, min(_power_of_2(tokens), 64))
    if dtype.itemsize == 2:
        step = 32 if widest > 64 or kernel == GRAD_KEY else 64
        if widest > 64 and kernel != FORWARD:
            block, step = min(block, 32), 16 if kernel == GRAD_KEY else 32
        warps, stages = 4 if widest > 64 else block // 16, 2
    else:  # full-width products run on the ordinary units, which hold their operands in registers
        narrow = dtype.itemsize == 8 or (widest > 32 and kernel == GRAD_KEY)
        block, step = min(block, 16 if narrow else 32), 16
        warps, stages = 8 if narrow else 4, 1
    own, other = ("BLOCK_N", "BLOCK_M") if kernel == GRAD_KEY else ("BLOCK_M", "BLOCK_N")
    return {
        "D": D,
        "E": E,
        own: block,
        other: step,
        "BLOCK_D": max(16, _power_of_2(D)),
        "BLOCK_E": max(16, _power_of_2(E)),
        "num_warps": warps,
        "num_stages": stages,
    }


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _launch(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, K: int, region: Sequence[int], key_region: Sequence[int], scale: float
) -> tuple[tuple[int], tuple, dict]:
    """Grid, size arguments and constants."""
    B, H, W, h, D = q.shape
    down, _, across, _ = cut(H, W, *region)
    tokens = math.prod(key_region if kernel == GRAD_KEY else region)
    config = launch_config(kernel, D, v.shape[-1], tokens, q.dtype)
    config |= {"ACC": _triton.accumulator(q.dtype), "PRECISION": "ieee"}
    if kernel != GRAD_KEY:
        config["STEPS"] = -(-K * math.prod(key_region) // config["BLOCK_N"])
    blocks = -(-tokens // config["BLOCK_N" if kernel == GRAD_KEY else "BLOCK_M"])
    scale *= math.log2(math.e)  # in base 2, as float32 and what that leaves, which float64 needs
    high = ctypes.c_float(scale).value
    sizes = (h, (H, W), tuple(k.shape[1:3]), tuple(region), tuple(key_region), across, down * across, K)
    return (B * down * across * blocks * h,), (*sizes, high, scale - high), config


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, rows, columns and heads; 0 where there is one only, lest it count as another kernel."""
    return tuple(0 if size == 1 else step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))


@torch.library.custom_op("visionattn::bilevel_attention", mutates_args=())
def _bilevel(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: list[int], key_region: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the logits in base 2. The last axes of q, k, v are contiguous, so is routes."""
    out, lse = _empty_results(q, v)
    if out.numel() == 0:
        return out, lse
    grid, sizes, constants = _launch(FORWARD, q, k, v, routes.shape[-1], region, key_region, scale)
    _bilevel_fwd[grid](q, k, v, routes, out, lse, *map(_strides, (q, k, v, out)), *sizes, **constants)
    return out, lse


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty((*q.shape[:-1], v.shape[-1]), device=q.device, dtype=q.dtype)
    return out, torch.empty(q.shape[:-1], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))


@_bilevel.register_fake
def _(q, k, v, routes, region, key_region, scale):
    return _empty_results(q, v)


@torch.library.custom_op("visionattn::bilevel_attention_backward", mutates_args=())
def _bilevel_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    region: list[int],
    key_region: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = _empty_gradients(q, k, v)
    if q.numel() == 0:
        return dq, dk, dv
    K = routes.shape[-1]
    delta = torch.empty_like(lse)
    strides = tuple(map(_strides, (grad, q, k, v, out)))
    grid, sizes, constants = _launch(GRAD_QUERY, q, k, v, K, region, key_region, scale)
    _bilevel_bwd_dq[grid](
        grad, q, k, v, routes, out, lse, delta, dq, *strides, _strides(dq), *sizes, **constants
    )  # fmt: skip
    sources, starts = invert(routes)
    grid, sizes, constants = _launch(GRAD_KEY, q, k, v, K, region, key_region, scale)
    _bilevel_bwd_dkv[grid](
        grad, q, k, v, sources, starts, lse, delta, dk, dv, *strides, _strides(dk), _strides(dv), *sizes, **constants
    )  # fmt: skip
    return dq, dk, dv


def invert(routes: Tensor) -> tuple[Tensor, Tensor]:
    """Which regions are routed to each: ``sources[starts[r]:starts[r + 1]]``. [B, R * K] and [B, R + 1], int32"""
    B, R, K = routes.shape
    ordered, places = routes.flatten(1).sort(dim=1, stable=True)
    bounds = torch.arange(R + 1, device=routes.device).expand(B, -1).contiguous()
    starts = torch.searchsorted(ordered, bounds, out_int32=True)
    return (places // K).to(torch.int32), starts


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))


@_bilevel_backward.register_fake
def _(grad, q, k, v, routes, out, lse, region, key_region, scale):
    return _empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.arguments = inputs[4:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * 7
    return *_bilevel_backward(_last_contiguous(grad), *ctx.saved_tensors, *ctx.arguments), *(None,) * 4


_bilevel.register_autograd(_backward, setup_context=_save)


@flop_formula("bilevel_attention")
def _flops(q_shape, k_shape, v_shape, routes_shape, region, key_region, *args, **kwargs) -> int:
    return _pairs(q_shape, routes_shape, key_region) * 2 * (q_shape[-1] + v_shape[-1])


@flop_formula("bilevel_attention_backward")
def _flops_backward(
    grad_shape, q_shape, k_shape, v_shape, routes_shape, saved_out, saved_lse, region, key_region, *args, **kwargs
) -> int:
    # The logits once more, dq and dk of D, then dp and dv of E.
    return _pairs(q_shape, routes_shape, key_region) * 2 * (3 * q_shape[-1] + 2 * v_shape[-1])


def _pairs(q_shape: Sequence[int], routes_shape: Sequence[int], key_region: Sequence[int]) -> int:
    return math.prod(q_shape[:-1]) * routes_shape[-1] * math.prod(key_region)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def bilevel_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    region: tuple[int, int],
    key_region: tuple[int, int],
    scale: float,
) -> Tensor:
    """The Triton kernels. Arguments as in :func:`bilevel_routing_attention`.

    They read q, k and v in place if their last axis is contiguous, as it is in views of one projection.
    """
    q, k, v = map(_last_contiguous, _dispatch.autocast(q, k, v))
    return _bilevel(q, k, v, routes.contiguous(), list(region), list(key_region), scale)[0]


def unsupported(q: Tensor, v: Tensor, weights: Tensor | None) -> str | None:
    """What of a call the Triton kernels do not cover, None if they cover it."""
    if q.dtype not in _dispatch._TRITON_DTYPES:
        return f"the dtype is {q.dtype}, the kernels cover {', '.join(map(str, _dispatch._TRITON_DTYPES))}"
    widest, limit = max(q.shape[-1], v.shape[-1]), MAX_HEAD_DIM[q.dtype.itemsize]
    if widest > limit:
        return f"the head dim is {widest}, the kernels cover up to {limit} in {q.dtype}"
    if weights is not None:
        return "the kernels have no weights (soft routing)"
    if q.numel() // max(q.shape[-1], 1) >= 2**31:
        return "the kernels count positions times heads in 32 bits, there are 2**31 or more"
    return None
