"""What every path of linear attention shares, in operators that TorchScript and every exporter know.

Shapes: B batch, N queries, M keys, h heads, D head dim, F features, V width of a value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.cache import runs_in_slices
from visionattn.kernels.focused_map.op import focused
from visionattn.kernels.linear_attn import products
from visionattn.kernels.linear_attn.rotation import rotate_pairs

FEATURE_MAPS = ("identity", "relu", "relu2", "elu+1", "exp", "softmax", "focused")
NORMALIZERS = ("sum", "mean", "none", "inline", "magnitude")
Rotary = tuple[Tensor, Tensor]


class Form(NamedTuple):
    """What linear attention computes, apart from tensors. See ``linear_attention`` for the meaning of each."""

    query_map: str
    key_map: str
    normalizer: str
    scale: float
    eps: float
    rank_augmented: bool
    causal: bool


def features(x: Tensor, name: str) -> Tensor:
    """The feature map ``name``, one of ``FEATURE_MAPS``. [B, N, h, D] in and out"""
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    if name == "elu+1":
        if x.device.type != "cpu":
            return F.elu(x) + 1
        # The same by exp: a CPU's expm1, of which F.elu is made, takes 2 (AVX2) to 8 times (AVX-512) as long. Clamping
        # instead of the difference would have no gradient at 0.
        positive = F.relu(x)
        return (x - positive).exp() + positive
    if name == "exp":
        return x.clamp(max=30.0).exp()  # squared and added up over millions of tokens it is within float32
    if name == "softmax":
        return x.softmax(-1)
    if name == "focused":
        return focused(x)
    return x


def away_from_zero(x: Tensor, eps: float) -> Tensor:
    """``x`` with a magnitude of at least ``eps``: what a feature map with negative values may need as a divisor."""
    if not torch.jit.is_scripting():
        if runs_in_slices(x) and float(x.amin()) >= eps:
            return x
    return torch.where(x.abs() < eps, torch.where(x < 0, -eps, eps), x)


def coefficients(total: Tensor, count: int, normalizer: str, scale: float, eps: float) -> tuple[Tensor, Tensor | None]:
    """What the products with the state and the mean value are multiplied by, the latter None if it is not added.

    Args:
        total: Every query's similarity to all keys together, ``phi(q) . sum_j w_j phi(k_j)``.
        count: Number of keys.
        normalizer: One of ``NORMALIZERS``.
        scale: Factor of similarities.
        eps: Added to the divisor.
    """
    if normalizer == "sum":
        return 1 / away_from_zero(total + eps, eps), None
    if normalizer == "mean":
        return (1 / count) / away_from_zero(total / count + eps, eps), None
    if normalizer == "none":
        return torch.full_like(total, scale), None
    mean = total * (scale / count)
    factor = torch.full_like(total, scale / count)
    if normalizer == "inline":
        return factor, 1 - mean
    return factor * (1 + 1 / away_from_zero(mean + eps, eps)), -mean


def global_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """RALA's weights of keys, ``softmax_j(scale * mean_i(query_i) . key_j)``. [B, N, h, F] twice to [B, M, h]"""
    return ((key * query.mean(1, keepdim=True)).sum(-1) * scale).softmax(1)


def _products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``query (key^T value)`` of every head. [B, N, h, F], [B, M, h, F], [B, M, h, V] to [B, N, h, V]"""
    if torch.jit.is_scripting():
        return _matrix_products(query, key, value)
    elif products.prefers_convolutions(query, key, value):
        return products.convolved_products(query, key, value)
    elif runs_in_slices(query):
        return products.products(query, key, value)
    else:
        return _matrix_products(query, key, value)


def _matrix_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    state = key.permute(0, 2, 3, 1) @ value.transpose(1, 2)  # B h F V
    return (query.transpose(1, 2) @ state).transpose(1, 2)


def _centered(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``mean(v) + q (k^T v - sum(k) mean(v)) * scale`` of every head: "inline" without a pass for the divisor."""
    if not torch.jit.is_scripting():
        if runs_in_slices(query):
            return products.centered(query, key, value, scale)
    mean = value.mean(1)[:, :, None]  # B h 1 V
    state = key.permute(0, 2, 3, 1) @ value.transpose(1, 2) - key.sum(1)[..., None] * mean
    query, state, mean = (t.flatten(0, 1) for t in (query.transpose(1, 2), state * scale, mean))
    return torch.baddbmm(mean, query, state).unflatten(0, [-1, value.shape[2]]).transpose(1, 2)


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: str,
    scale: float,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    key_weights: Tensor | None,
    rank_augmented: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear attention of features, all in one dtype, without the causal form.

    Args:
        query: [B, N, h, F]
        key: [B, M, h, F]
        value: [B, M, h, V]
        normalizer: One of ``NORMALIZERS``.
        scale: Factor of similarities.
        eps: Added to divisors.
        rotary: Twice [N, F / 2]
        key_weights: [B, M, h]
        rank_augmented: Whether to compute the weights.
        residual: Added to the result. [B, N, h, V]
    """
    if rank_augmented:
        key_weights = global_weights(query, key, scale)
    if key_weights is not None:
        key = key * key_weights[..., None]
    if normalizer == "inline" and rotary is None:
        out = _centered(query, key, value, scale / value.shape[1])
        return out if residual is None else out + residual
    total = (query * key.sum(1, keepdim=True)).sum(-1, keepdim=True)
    if rotary is not None:
        query, key = rotate_pairs(query, rotary[0], rotary[1]), rotate_pairs(key, rotary[0], rotary[1])
    out = _products(query, key, value)
    factor, shift = coefficients(total, value.shape[1], normalizer, scale, eps)
    out = out * factor if residual is None else torch.addcmul(residual, out, factor)
    return out if shift is None else torch.addcmul(out, shift, value.mean(1, keepdim=True))


def epilogue(out: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """The residual added, then the gate multiplied, where there are such. [B, N, h, V] all"""
    out = out if residual is None else out + residual
    return out if gate is None else out * gate
