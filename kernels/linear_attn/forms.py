"""What every path of linear attention shares, in operators that TorchScript and every exporter know.

Shapes: B batch, N queries, M keys, h heads, D head dim, F features, V width of a value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import backend as _dispatch
from visionattn.kernels.common.backend import eager
from visionattn.kernels.focused_map.cpu import Focused, focused_plain
from visionattn.kernels.focused_map.triton import focused_triton, unsupported
from visionattn.kernels.linear_attn import cpu as _linear_eager
from visionattn.kernels.linear_attn import rotation as _rotate_op

FEATURE_MAPS = ("identity", "relu", "relu2", "elu+1", "exp", "softmax", "focused")
NORMALIZERS = ("sum", "mean", "none", "inline", "magnitude")


class Form(NamedTuple):
    """What linear attention computes, apart from tensors. See ``linear_attention`` for the meaning of each."""

    query_map: str
    key_map: str
    normalizer: str
    scale: float
    eps: float
    rank_augmented: bool
    causal: bool


def precise(x: Tensor) -> Tensor:
    """``x`` in the dtype that sums are formed in: float64 for itself, float32 for all others."""
    return x if x.dtype == torch.float64 else x.float()


def features(x: Tensor, name: str) -> Tensor:
    """The feature map ``name``, one of ``FEATURE_MAPS``. [B, N, h, D] in and out"""
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    if name == "elu+1":
        return F.elu(x) + 1
    if name == "exp":
        return x.clamp(max=30.0).exp()  # squared and added up over millions of tokens it is within float32
    if name == "softmax":
        return x.softmax(-1)
    if name == "focused":
        return focused(x)
    return x


def focused(x: Tensor, power: float = 3.0, scale: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Sharpen ``y = (relu(x) + 1e-6) / softplus(scale)`` to ``y ** power`` and give it back the norm of ``y``.

    The norms are those of whole tokens, all heads together (FLatten, arXiv 2308.00442).

    Args:
        x: Queries or keys; the result is at least in float32. [B, N, h, D]
        power: The focusing factor.
        scale: Learned, one of each channel; None for no division. Any shape of h * D elements.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.
    """
    divisor = torch.ones([], dtype=x.dtype, device=x.device)
    if scale is not None:
        divisor = F.softplus(scale).reshape(x.shape[-2], x.shape[-1])
    if torch.jit.is_scripting():
        return focused_plain(x, power, divisor)
    else:
        return _fastest_focused(x, power, divisor, backend)


def _fastest_focused(x: Tensor, power: float, divisor: Tensor, backend: str | None) -> Tensor:
    chosen = _dispatch.choose("focused", x, backend, lambda: unsupported(x))
    if chosen == "triton":
        return focused_triton(x, power, divisor)
    if chosen == "torch" and x.device.type == "cpu" and x.numel() > 0 and eager(x):
        return Focused.apply(x, power, divisor)
    return focused_plain(x, power, divisor)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the adjacent pairs (2i, 2i + 1) of the last axis.

    Args:
        x: Features. [B, N, h, D]
        cos: Cosines of the angles of every position. [N, D / 2]
        sin: Sines. [N, D / 2]
    """
    if torch.jit.is_scripting():
        return _rotate_parts(x, cos, sin)
    else:
        if _rotate_op.suits_compiler(x, cos, sin):
            return _rotate_op.rotate_op(x, cos, sin)
        return _linear_eager.rotate_pairs(x, cos, sin) if eager(x) else _rotate_parts(x, cos, sin)


def _rotate_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, [cos.shape[-1], 2])
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def rotary_tables(
    height: int, width: int, dim: int, device: torch.device | None = None, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of every position of a map, row-major, in float32. Twice [height * width, dim / 2]

    The first half of the pairs turns with the row, the second with the column, at speeds from 1 to ``1 / base``, both
    ends included: ``base ** -(i / (n - 1))`` for ``n = dim / 4`` (RMT, arXiv 2309.11523; RAVLT; MAViT).

    Args:
        height: Rows of the map.
        width: Columns of the map.
        dim: Head dim, a multiple of 4.
        device: Where the tables are made.
        base: Fastest over slowest turn.
    """
    count = dim // 4
    speed = torch.pow(base, torch.arange(count, device=device, dtype=torch.float32) / -max(count - 1, 1))
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * speed
    columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * speed
    cos = _row_major(rows.cos(), columns.cos())
    return cos, _row_major(rows.sin(), columns.sin())


def _row_major(rows: Tensor, columns: Tensor) -> Tensor:
    """[H, n] and [W, m] to [H * W, n + m]."""
    H, W = rows.shape[0], columns.shape[0]
    rows = rows[:, None].expand(H, W, rows.shape[1])
    return torch.cat([rows, columns[None].expand(H, W, columns.shape[1])], -1).flatten(0, 1)


def away_from_zero(x: Tensor, eps: float) -> Tensor:
    """``x`` with a magnitude of at least ``eps``: what a feature map with negative values may need as a divisor."""
    if not torch.jit.is_scripting():
        if _linear_eager.runs_in_slices(x) and float(x.amin()) >= eps:
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
    elif _linear_eager.prefers_convolutions(query, key, value):
        return _linear_eager.convolved_products(query, key, value)
    elif _linear_eager.runs_in_slices(query):
        return _linear_eager.products(query, key, value)
    else:
        return _matrix_products(query, key, value)


def _matrix_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    state = key.permute(0, 2, 3, 1) @ value.transpose(1, 2)  # B h F V
    return (query.transpose(1, 2) @ state).transpose(1, 2)


def _centered(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``mean(v) + q (k^T v - sum(k) mean(v)) * scale`` of every head: "inline" without a pass for the divisor."""
    if not torch.jit.is_scripting():
        if _linear_eager.runs_in_slices(query):
            return _linear_eager.centered(query, key, value, scale)
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
