"""Triton kernels of bi-level routing attention, forward and backward, without copies of the routed regions.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j]),   j in the regions routed to

Shapes: B batch, H rows, W columns, h heads, D head dim of q and k, E of v, R regions, K routes of one, T tokens of one
and S of one of keys. Every sum has a fixed order: results are the same, bit by bit, on every run. The gradients of keys
and values are sums over the queries of the regions that are routed to theirs, found by sorting the routes: no atomics.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from visionattn.kernels.bilevel.export import dense_attention, gathered_attention
from visionattn.kernels.bilevel.launches import FORWARD, GRAD_KEY, GRAD_QUERY, MAX_HEAD_DIM, launch
from visionattn.kernels.bilevel.regions import count_regions, cut, find_routes, from_regions, split_map
from visionattn.kernels.bilevel.triton_kernels import bilevel_bwd_dkv, bilevel_bwd_dq, bilevel_fwd
from visionattn.kernels.common import twice
from visionattn.kernels.common.checks import unsupported_count, unsupported_dtype
from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.launch import strides
from visionattn.kernels.common.layout import last_contiguous
from visionattn.kernels.common.mode import autocast
from visionattn.kernels.common.precision import precise, precise_dtype

__all__ = ["bilevel_attention_triton", "bilevel_routing_attention_triton", "unsupported"]


@custom_op("bilevel_attention", rows=("q", "k", "v"), whole=("routes",))
def _bilevel(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: list[int], key_region: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the logits in base 2. The last axes of q, k, v are contiguous, so is routes."""
    out, lse = _empty_results(q, v)
    if out.numel() == 0:
        return out, lse
    grid, sizes, constants = launch(FORWARD, q, k, v, routes.shape[-1], region, key_region, scale)
    bilevel_fwd[grid](q, k, v, routes, out, lse, *map(strides, (q, k, v, out)), *sizes, **constants)
    return out, lse


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty((*q.shape[:-1], v.shape[-1]), device=q.device, dtype=q.dtype)
    return out, torch.empty(q.shape[:-1], device=q.device, dtype=precise_dtype(q.dtype))


@_bilevel.register_fake
def _(q, k, v, routes, region, key_region, scale):
    return _empty_results(q, v)


@custom_op("bilevel_attention_backward", rows=("grad", "q", "k", "v"), whole=("routes", "out", "lse"))
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
    steps = tuple(map(strides, (grad, q, k, v, out)))
    grid, sizes, constants = launch(GRAD_QUERY, q, k, v, K, region, key_region, scale)
    bilevel_bwd_dq[grid](
        grad, q, k, v, routes, out, lse, delta, dq, *steps, strides(dq), *sizes, **constants
    )  # fmt: skip
    sources, starts = invert(routes)
    grid, sizes, constants = launch(GRAD_KEY, q, k, v, K, region, key_region, scale)
    bilevel_bwd_dkv[grid](
        grad, q, k, v, sources, starts, lse, delta, dk, dv, *steps, strides(dk), strides(dv), *sizes, **constants
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
    if twice.wanted(grad):
        q, k, v, routes = ctx.saved_tensors[:4]
        return *twice.gradients(partial(_again, routes, ctx.arguments), grad, (q, k, v)), *(None,) * 4
    return *_bilevel_backward(last_contiguous(grad), *ctx.saved_tensors, *ctx.arguments), *(None,) * 4


def _again(routes: Tensor, arguments, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    region, key_region, scale = arguments
    (H, W), grid = q.shape[1:3], cut(*q.shape[1:3], *region)
    q, k, v = split_map(precise(q), region), split_map(precise(k), key_region), split_map(precise(v), key_region)
    out = gathered_attention(q, k, v, routes, None, scale)
    return from_regions(out.flatten(3), grid, H, W).unflatten(-1, out.shape[3:])


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
    q, k, v = map(last_contiguous, autocast(q, k, v))
    return _bilevel(q, k, v, routes.contiguous(), list(region), list(key_region), scale)[0]


def bilevel_routing_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region: tuple[int, int],
    topk: int,
    routes: Tensor | None,
    weights: Tensor | None,
    key_region: tuple[int, int],
    scale: float,
) -> Tensor:
    """Triton kernels, or PyTorch's attention if it is to all regions. As :func:`bilevel_routing_attention`."""
    if routes is None and operator.index(topk) == count_regions(q, region):
        return dense_attention(q, k, v, region, None, scale)
    if routes is None:
        routes = find_routes(q, k, region, topk)
    return bilevel_attention_triton(q, k, v, routes, region, key_region, scale)


def unsupported(q: Tensor, v: Tensor, weights: Tensor | None) -> str | None:
    """What of a call the Triton kernels do not cover, None if they cover it."""
    if reason := unsupported_dtype(q):
        return reason
    widest, limit = max(q.shape[-1], v.shape[-1]), MAX_HEAD_DIM[q.dtype.itemsize]
    if widest > limit:
        return f"the head dim is {widest}, the kernels cover up to {limit} in {q.dtype}"
    if weights is not None:
        return "the kernels have no weights (soft routing)"
    return unsupported_count(q.numel() // max(q.shape[-1], 1), "positions times heads")
