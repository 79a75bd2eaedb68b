"""Launches the Triton kernels of linear attention; see ``triton_kernels.py`` for what they compute."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.checks import unsupported_dtype
from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.launch import halves
from visionattn.kernels.common.layout import last_contiguous
from visionattn.kernels.common.precision import precise, precise_dtype
from visionattn.kernels.linear_attn.forms import Form, epilogue, features, global_weights, mix
from visionattn.kernels.linear_attn.launches import (
    KEYS,
    KEYS_BWD,
    MAX_WIDTH,
    QUERIES,
    QUERIES_BWD,
    constants,
    steps,
)
from visionattn.kernels.linear_attn.triton_kernels import (
    linear_keys,
    linear_keys_bwd,
    linear_queries,
    linear_queries_bwd,
)

__all__ = ["linear_attention_triton", "unsupported"]

IN_KERNEL = ("identity", "relu", "relu2", "elu+1", "exp")  # all other maps are applied before
ROWS = ("q", "k", "v", "residual", "gate")


def _constants(kernel: str, q: Tensor, v: Tensor, **form) -> dict:
    return constants(kernel, q.shape[-1], v.shape[-1], v.dtype, torch.version.hip is not None, **form)


def _steps_of(x: Tensor | None) -> tuple[int, ...]:
    """Strides of batch, tokens and heads. [B, N, h, D] or [B, N, h]"""
    return (0, 0, 0) if x is None else tuple(x.stride()[:3])


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _sums(q: Tensor, v: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for partial sums: state, sum of keys, sum of values."""
    rows = (parts, q.shape[0] * q.shape[2])
    dtype = precise_dtype(v.dtype)
    shapes = ((q.shape[-1], v.shape[-1]), (q.shape[-1],), (v.shape[-1],))
    return tuple(torch.empty(rows + shape, device=q.device, dtype=dtype) for shape in shapes)


@custom_op("linear_attention", rows=ROWS, whole=("cos", "sin"))
def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    query_map: str,
    key_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the state, the sum of keys and the mean of values. The last axis of all inputs is contiguous."""
    (B, N, h, _), M = q.shape, k.shape[1]
    out, state, key_sum, mean = _empty_results(q, v)
    if out.numel() == 0:
        return out, state.zero_(), key_sum.zero_(), mean.zero_()
    config = _constants(KEYS, k, v, MAP=key_map, ROTARY=cos is not None, WEIGHTED=weights is not None)
    config["STEPS"] = steps(M, B * h, config["BLOCK_N"])
    parts = max(-(-M // (config["BLOCK_N"] * config["STEPS"])), 1)
    sums = _sums(q, v, parts)
    linear_keys[(B * h, parts)](
        k, v, _or(weights, k), _or(cos, k), _or(sin, k), *sums, *map(_steps_of, (k, v, weights)), h, M,
        **config,
    )  # fmt: skip
    for total, part in zip((state, key_sum, mean), sums, strict=True):
        torch.sum(part, 0, out=total)
    mean.div_(max(M, 1))
    config = _constants(QUERIES, q, v, MAP=query_map, NORMALIZER=normalizer, ROTARY=cos is not None)
    config |= {"RESIDUAL": residual is not None, "GATE": gate is not None}
    linear_queries[(B * h, -(-N // config["BLOCK_N"]))](
        q, _or(cos, q), _or(sin, q), state, key_sum, mean, _or(residual, q), _or(gate, q), out,
        *map(_steps_of, (q, residual, gate)), h, N, max(M, 1), *halves(scale), *halves(eps), **config,
    )  # fmt: skip
    return out, state, key_sum, mean


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty((*q.shape[:-1], v.shape[-1]), device=q.device, dtype=v.dtype)
    return out, *(total[0] for total in _sums(q, v, 1))


@_linear.register_fake
def _(q, k, v, *args):
    return _empty_results(q, v)


@custom_op(
    "linear_attention_backward",
    rows=("grad", "q", "k", "v", "residual", "gate"),
    whole=("cos", "sin", "state", "key_sum", "mean"),
)
def _linear_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    key_sum: Tensor,
    mean: Tensor,
    query_map: str,
    key_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, weights and gate, the last two empty if there are none."""
    (B, N, h, _), M = q.shape, k.shape[1]
    dq, dk, dv, dweights, dgate = grads = _empty_gradients(grad, q, k, v, weights, gate)
    if grad.numel() == 0 or M == 0:
        return tuple(g.zero_() for g in grads)
    rotary = cos is not None
    config = _constants(QUERIES_BWD, q, v, MAP=query_map, NORMALIZER=normalizer, ROTARY=rotary)
    config |= {"RESIDUAL": residual is not None, "GATE": gate is not None}
    config["STEPS"] = steps(N, B * h, config["BLOCK_N"])
    parts = -(-N // (config["BLOCK_N"] * config["STEPS"]))
    sums = _sums(q, v, parts)
    linear_queries_bwd[(B * h, parts)](
        grad, q, _or(cos, q), _or(sin, q), state, key_sum, mean, _or(residual, q), _or(gate, q), dq, dgate, *sums,
        *map(_steps_of, (grad, q, residual, gate)), h, N, M, *halves(scale), *halves(eps), **config,
    )  # fmt: skip
    dstate, dkey_sum, dmean = (part.sum(0) for part in sums)
    config = _constants(KEYS_BWD, k, v, MAP=key_map, ROTARY=rotary, WEIGHTED=weights is not None)
    linear_keys_bwd[(B * h, -(-M // config["BLOCK_N"]))](
        k, v, _or(weights, k), _or(cos, k), _or(sin, k), dstate, dkey_sum, dmean / M, dk, dv, dweights,
        *map(_steps_of, (k, v, weights)), h, M, **config,
    )  # fmt: skip
    return grads


def _empty_gradients(grad, q, k, v, weights, gate) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))
    dweights = q.new_empty(0) if weights is None else torch.empty(weights.shape, device=q.device, dtype=weights.dtype)
    return dq, dk, dv, dweights, torch.empty(0 if gate is None else grad.shape, device=q.device, dtype=v.dtype)


@_linear_backward.register_fake
def _(grad, q, k, v, weights, cos, sin, residual, gate, *args):
    return _empty_gradients(grad, q, k, v, weights, gate)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.arguments = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 13
    tensors = ctx.saved_tensors
    if twice.wanted(grad):
        return *twice.gradients(partial(_again, ctx.arguments), grad, tensors[:8]), *(None,) * 5
    weights, residual, gate = tensors[3], tensors[6], tensors[7]
    grad = last_contiguous(grad)
    dq, dk, dv, dweights, dgate = _linear_backward(grad, *tensors, *ctx.arguments)
    dresidual = None if residual is None else grad if gate is None else grad * gate
    gradients = (dq, dk, dv, None if weights is None else dweights, None, None, dresidual)
    return *gradients, None if gate is None else dgate, *(None,) * 5


def _again(arguments, q, k, v, weights, cos, sin, residual, gate) -> Tensor:
    query_map, key_map, normalizer, scale, eps = arguments
    query, key = features(precise(q), query_map), features(precise(k), key_map)
    rotary = None if cos is None else (cos.to(query.dtype), sin.to(query.dtype))
    out = mix(query, key, precise(v), normalizer, scale, eps, rotary, weights, rank_augmented=False)
    return epilogue(out, residual, gate)


_linear.register_autograd(_backward, setup_context=_save)


@flop_formula("linear_attention")
def _flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    B, N, h, D = q_shape
    return 2 * B * h * (N + k_shape[1]) * D * v_shape[-1]


@flop_formula("linear_attention_backward")
def _flops_backward(grad_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    B, N, h, D = q_shape
    return 2 * B * h * (3 * N + 2 * k_shape[1]) * D * v_shape[-1]


def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
    rotary: tuple[Tensor, Tensor] | None = None,
    key_weights: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The Triton kernels. Arguments as in ``linear_attention_reference``.

    They read q, k, v, residual and gate in place if their last axis is contiguous, as it is in views of one projection.
    """
    if form.rank_augmented:
        query, key = features(precise(q), form.query_map), features(precise(k), form.key_map)
        key_weights = global_weights(query, key, form.scale)
    maps = [form.query_map, form.key_map]
    tensors = [q, k]
    for i, feature_map in enumerate(maps):
        if feature_map not in IN_KERNEL:
            tensors[i], maps[i] = features(precise(tensors[i]), feature_map), "identity"
    cos, sin = (None, None) if rotary is None else (table.detach().contiguous() for table in rotary)
    q, k, v, *epilogue = (None if t is None else last_contiguous(t) for t in (*tensors, v, residual, gate))
    return _linear(q, k, v, key_weights, cos, sin, *epilogue, *maps, form.normalizer, form.scale, form.eps)[0]


def unsupported(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    """What of a call the Triton kernels do not cover, ``None`` if they cover it."""
    if reason := unsupported_dtype(q, k, v):
        return reason
    if form.causal:
        return "it is causal, the kernels sum over all keys"
    launched = [v.dtype]
    for x, feature_map in ((q, form.query_map), (k, form.key_map)):
        launched.append(x.dtype if feature_map in IN_KERNEL else precise_dtype(x.dtype))
    widest = MAX_WIDTH[max(dtype.itemsize for dtype in launched)]
    if q.shape[-1] % 2 or max(q.shape[-1], v.shape[-1]) > widest:
        return f"the head dims are {q.shape[-1]} and {v.shape[-1]}, the kernels cover even ones up to {widest}"
    if q.shape[0] * q.shape[2] >= 2**31 or max(q.shape[1], v.shape[1]) // 16 > 65535:
        return "there are more samples times heads or blocks of tokens than a grid has"
    return None
