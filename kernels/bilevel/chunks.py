"""Attention of regions to routed regions in bounded memory, on the CPU or where Triton is not.

Shapes: N regions of all images, T tokens of one, M regions of keys with S tokens each, K of them routed to, h heads,
D head dim of queries and keys, E of values.
"""

from functools import partial

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.attend import attend

# Of copied keys and values at a time. Measured on an AMD EPYC: larger copies leave the cache, smaller ones make more
# calls than their work is worth.
CHUNK_BYTES = 2 * 2**20


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """Copy the keys and values of a few regions at a time; the backward pass copies them again.

    Args:
        q: [N, T, h, D]
        k: [M, S, h, D]
        v: [M, S, h, E]
        index: The K regions of keys that a region of queries attends to. [N, K]
        weights: Factor of each of them, or None. [N, K]
        scale: Factor of the logits.

    Returns:
        [N, T, h, E]
    """
    tensors = [t for t in (q, k, v, weights) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Chunked.apply(q, k, v, weights, index, scale)
    return _forward(q, k, v, weights, index, scale, keep=False)[0]


def _chunks(k: Tensor, v: Tensor, index: Tensor) -> list[slice]:
    bytes_each = index.shape[1] * (k[:1].nbytes + v[:1].nbytes)
    step = max(1, CHUNK_BYTES // max(1, bytes_each))
    return [slice(first, min(first + step, len(index))) for first in range(0, len(index), step)]


def _copies(x: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """The regions of x that an index names, weighted. [n, h, K * S, D]"""
    x = x.index_select(0, index.flatten()).unflatten(0, index.shape)
    if weights is not None:
        x = x * weights[:, :, None, None, None]
    return x.flatten(1, 2).transpose(1, 2)


def _has_flash(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's fused kernels of the CPU, whose backward pass needs no second forward pass, take these."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.shape[1] > 0


def _forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, index: Tensor, scale: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output and, if they are to be kept, what the fused backward pass needs of every chunk."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    sums = []
    flash = keep and _has_flash(q, v)
    for part in _chunks(k, v, index):
        gate = None if weights is None else weights[part]
        queries = q[part].transpose(1, 2)
        keys, values = _copies(k, index[part], gate), _copies(v, index[part], gate)
        if flash:
            result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, 0.0, False, scale=scale
            )
            sums.append(lse)
        else:
            result = attend(queries, keys, values, None, scale)
        out[part] = result.transpose(1, 2)
    return out, sums


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, weights, index, scale):
        out, sums = _forward(q, k, v, weights, index, scale, keep=True)
        ctx.save_for_backward(q, k, v, weights, index, out, *sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights, index, out, *sums = ctx.saved_tensors
        if twice.wanted(grad):
            return *twice.gradients(partial(_again, index=index, scale=ctx.scale), grad, (q, k, v, weights)), None, None
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dweights = None if weights is None else torch.empty_like(weights)
        for i, part in enumerate(_chunks(k, v, index)):
            gate = None if weights is None else weights[part]
            queries, grads = q[part].transpose(1, 2), grad[part].transpose(1, 2)
            keys, values = _copies(k, index[part], gate), _copies(v, index[part], gate)
            if sums:
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grads, queries, keys, values, out[part].transpose(1, 2), sums[i], 0.0, False, scale=ctx.scale
                )
            else:
                found = _recomputed(grads, queries, keys, values, ctx.scale)
            dq[part] = found[0].transpose(1, 2)
            rows = index[part].flatten()
            total = 0
            for given, gradient, copies in ((k, dk, found[1]), (v, dv, found[2])):
                copies = copies.transpose(1, 2).unflatten(1, (index.shape[1], -1))  # n K S h D
                if weights is not None:
                    total = total + (copies * given[index[part]]).sum((2, 3, 4))
                    copies = copies * gate[:, :, None, None, None]
                gradient.index_add_(0, rows, copies.flatten(0, 1))
            if weights is not None:
                dweights[part] = total
        return dq, dk, dv, dweights, None, None


def _again(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, index: Tensor, scale: float) -> Tensor:
    """All regions at once."""
    out = attend(q.transpose(1, 2), _copies(k, index, weights), _copies(v, index, weights), None, scale)
    return out.transpose(1, 2)


def _recomputed(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves, None, scale)
        return torch.autograd.grad(out, leaves, grad)
