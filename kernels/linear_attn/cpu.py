"""Linear attention in PyTorch's own operators: a few samples at a time where that keeps them in a CPU's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.common.cache import samples_at_a_time
from visionattn.kernels.common.precision import precise
from visionattn.kernels.linear_attn.causal import mix_causal
from visionattn.kernels.linear_attn.forms import Form, Rotary, epilogue, features, mix

__all__ = ["linear_attention_torch"]


def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
    rotary: Rotary | None = None,
    key_weights: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The fastest form known in operators of PyTorch. Arguments as in ``linear_attention_reference``."""
    if rotary is not None:
        rotary = precise(rotary[0]).to(precise(q).dtype), precise(rotary[1]).to(precise(q).dtype)
    arguments = (q, k, v, key_weights, residual, gate)
    samples = samples_at_a_time(q)
    if samples >= q.shape[0]:
        return _mixed(form, rotary, *arguments)
    slices = zip(*([None] * q.shape[0] if t is None else t.split(samples) for t in arguments), strict=False)
    return torch.cat([_mixed(form, rotary, *parts) for parts in slices])


def _mixed(form: Form, rotary: Rotary | None, q, k, v, key_weights, residual, gate) -> Tensor:
    query, key, value = features(precise(q), form.query_map), features(precise(k), form.key_map), precise(v)
    weights = None if key_weights is None else key_weights.to(query.dtype)
    options = (form.normalizer, form.scale, form.eps, rotary, weights)
    if form.causal:
        out = mix_causal(query, key, value, *options)
    else:
        joins = residual is not None and residual.dtype == query.dtype
        out = mix(query, key, value, *options, form.rank_augmented, residual if joins else None)
        residual = None if joins else residual
    return epilogue(out.to(v.dtype), residual, gate)
