"""Faster forms of the products of linear attention in inference on a CPU.

Shapes: B batch, N queries, M keys, h heads, F features, V width of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.cache import runs_in_slices

__all__ = ["centered", "convolved_products", "prefers_convolutions", "products"]

# On one thread PyTorch leaves convolutions of less than 16 samples to another library.
SAMPLES = 16
# Tokens from which on a copy of the result costs more than products that write it with strides.
LARGE_MAP = 1024


def prefers_convolutions(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`convolved_products` is the fastest: one head, one thread, inference in float32 with oneDNN.

    Measured on an AMD EPYC at 64 channels: 0.5 times the time on maps of 56x56 and 112x112; on two threads 1.3 times.
    """
    if not runs_in_slices(query) or torch.get_num_threads() > 1 or not torch.backends.mkldnn.is_available():
        return False
    N, M = query.shape[1], key.shape[1]
    fits = query.shape[2] == 1 and N % SAMPLES == 0 and M % SAMPLES == 0 and min(N, M) > 0
    return fits and query.dtype == torch.float32


def convolved_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``query (key^T value)`` of one head by the 1x1 convolutions of oneDNN.

    The sum over keys is what a convolution of keys to values has as the gradient of its weight.
    """
    outputs = []
    for q, k, v in zip(query, key, value, strict=True):
        q, k, v = (t.reshape(SAMPLES, -1, 1, t.shape[-1]).permute(0, 3, 1, 2) for t in (q, k, v))
        shape = (v.shape[1], k.shape[1], 1, 1)
        state = torch.nn.grad.conv2d_weight(k, shape, v)
        outputs.append(F.conv2d(q, state).permute(0, 2, 3, 1).reshape(1, -1, 1, v.shape[1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``query (key^T value)`` of every head, sample by sample: no tensor has to be copied to be one batch of matrices.

    Arguments as in ``_products`` of ``forms.py``.
    """
    out, heads = _result(query, value)
    for q, k, v, o in zip(query, key, value, heads, strict=True):
        torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0) @ v.transpose(0, 1), out=o)
    return out


def centered(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As ``_centered`` in ``forms.py``, sample by sample."""
    out, heads = _result(query, value)
    sums, means = key.sum(1)[..., None], value.mean(1)[:, :, None]
    for q, k, v, s, m, o in zip(query, key, value, sums, means, heads, strict=True):
        state = torch.baddbmm(s * m, k.permute(1, 2, 0), v.transpose(0, 1), beta=-scale, alpha=scale)
        torch.baddbmm(m, q.transpose(0, 1), state, out=o)
    return out


def _result(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a result, [B, N, h, V], and the same as matrices, [B, h, N, V]."""
    B, N, h, _ = query.shape
    if N >= LARGE_MAP:
        out = torch.empty(B, N, h, value.shape[-1], dtype=query.dtype, device=query.device)
        return out, out.transpose(1, 2)
    heads = torch.empty(B, h, N, value.shape[-1], dtype=query.dtype, device=query.device)
    return heads.transpose(1, 2), heads
