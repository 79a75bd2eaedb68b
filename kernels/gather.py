"""Weighted sums of a few rows of a table each. Shapes: R rows, C channels, P sums, K rows in each.

out[p] = sum_i weight[p, i] * rows[index[p, i]]
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.mode import eager
from visionattn.kernels.common.twice import Found, Remade, remake, watch

__all__ = ["weighted_rows", "weighted_rows_reference"]


def weighted_rows(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums of rows by PyTorch's ``embedding_bag``, one pass over memory, with derivatives of any order and either mode.

    Args:
        rows: [R, C]
        index: Which rows are summed, integers from 0 to R - 1. [P, K]
        weight: Their factors. [P, K]

    Returns:
        Sums in the dtype of ``rows``. [P, C]
    """
    if rows.device.type not in ("cpu", "cuda") or not eager(rows):  # the bags carry no tangents and no maps
        return weighted_rows_reference(rows, index, weight)
    out = F.embedding_bag(index, rows, per_sample_weights=weight.to(rows.dtype), mode="sum")
    if out.requires_grad:
        watch(out, "EmbeddingBag", _again)
    return out


def weighted_rows_reference(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The same, row by row of a sum, in operators that every runtime knows; TorchScript compiles it."""
    out = F.embedding(index[:, 0], rows) * weight[:, :1]
    for i in range(1, index.shape[1]):
        out = out + F.embedding(index[:, i], rows) * weight[:, i : i + 1]
    return out.to(rows.dtype)


def _again(found: Found, grads: tuple[Tensor, ...]) -> Found | None:
    return remake(_read, found, grads)


def _read(node: Any, grad: Tensor) -> Remade:
    index = node._saved_indices.view(len(node._saved_offsets), -1)
    rows, weight = node._saved_weight, node._saved_per_sample_weights
    if rows is None:  # only the rows are differentiated, in which the sums are linear
        rows = grad.new_zeros(()).expand(node._saved_weight_sym_argsize_0, grad.shape[-1]).requires_grad_()
    return lambda rows, weight: weighted_rows_reference(rows, index, weight.view(index.shape)), (rows, weight)
