"""Aggregated attention (TransNeXt, arXiv 2311.17132): one softmax over the 3x3 neighbors and a pooled map.

    a_i = softmax([q_i . k_j + b_j over the neighbors | q_i . k_p + c_ip over the pooled map])
    y_i = sum_j (a_ij + t_ij) v_j + sum_p a_ip v_p

Letters: B batch, H W rows and columns, h heads, D head dim, P pooled positions, N = H * W.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.aggregated.cpu import aggregated_attention_torch, neighbors_exist
from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import check_floating, check_tensors
from visionattn.kernels.common.mode import exporting
from visionattn.kernels.common.precision import precise

__all__ = ["aggregated_attention", "aggregated_attention_reference", "seen_neighbors"]


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    bias: Tensor,
    pooled_bias: Tensor,
    add: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Attend to the 3x3 neighbors and to a pooled map in one softmax (TransNeXt, arXiv 2311.17132).

    Neighbors are numbered row by row from the upper left one; those outside the map have no weight.

    Args:
        q: Queries, scaled. [B, H, W, h, D]
        k: Keys of the map. [B, H, W, h, D]
        v: Values of the map. [B, H, W, h, D]
        pooled_k: Keys of the pooled map. [B, P, h, D]
        pooled_v: Values of the pooled map. [B, P, h, D]
        bias: Added to the logits of the neighbors. [h, 9]
        pooled_bias: Added to the logits of the pooled map. [h, N, P]
        add: Added to the weights of the neighbors behind the softmax. [B, H, W, h, 9]
        backend: ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice; it has no Triton
            kernels.

    Returns:
        Mixed values. [B, H, W, h, D]

    Raises:
        ValueError: If shapes do not fit together or an argument is not one of the allowed.
        BackendError: If Triton is asked for.
    """
    if torch.jit.is_scripting():
        return aggregated_attention_torch(q, k, v, pooled_k, pooled_v, bias, pooled_bias, add)
    else:
        return _chosen(q, k, v, pooled_k, pooled_v, bias, pooled_bias, add, backend)


def seen_neighbors(height: int, width: int, device: torch.device) -> Tensor:
    """How many of the nine positions around a position, itself among them, lie in the map. [H, W]"""
    return neighbors_exist(height, width, device).sum(-1)


def aggregated_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, bias: Tensor, pooled_bias: Tensor, add: Tensor
) -> Tensor:
    """The formula with all neighbors unfolded. Arguments as of ``aggregated_attention``."""
    B, H, W, h, D = q.shape
    full = precise(q)
    near_k, near_v = (_unfolded(precise(t)) for t in (k, v))
    near = torch.einsum("byxhd,byxhsd->byxhs", full, near_k) + bias
    near = near.masked_fill(~neighbors_exist(H, W, q.device)[:, :, None], -torch.inf)
    far = torch.einsum("byxhd,bphd->byxhp", full, precise(pooled_k))
    far = far + pooled_bias.transpose(0, 1).unflatten(0, (H, W))
    weights = torch.cat([near, far], -1).softmax(-1)
    y = torch.einsum("byxhs,byxhsd->byxhd", weights[..., :9] + add, near_v)
    return (y + torch.einsum("byxhp,bphd->byxhd", weights[..., 9:], precise(pooled_v))).to(q.dtype)


def _unfolded(x: Tensor) -> Tensor:
    """The 3x3 neighbors of every position, zeros outside the map. [B, H, W, h, D] to [B, H, W, h, 9, D]"""
    B, H, W, h, D = x.shape
    near = F.unfold(x.flatten(3).permute(0, 3, 1, 2), 3, padding=1)
    return near.view(B, h, D, 9, H, W).permute(0, 4, 5, 1, 3, 2)


@torch.jit.unused
def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    bias: Tensor,
    pooled_bias: Tensor,
    add: Tensor,
    backend: str | None,
) -> Tensor:
    if not exporting():
        _check(q, k, v, pooled_k, pooled_v, bias, pooled_bias, add)
    chosen = choose("aggregated_attention", q, backend, lambda: "it has no kernels")
    form = aggregated_attention_reference if chosen == "reference" else aggregated_attention_torch
    return form(q, k, v, pooled_k, pooled_v, bias, pooled_bias, add)


def _check(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, bias: Tensor, pooled_bias: Tensor, add: Tensor
) -> None:
    given = dict(q=q, k=k, v=v, pooled_k=pooled_k, pooled_v=pooled_v, bias=bias, pooled_bias=pooled_bias, add=add)
    check_tensors(**given)
    check_floating(**given)
    if q.dim() != 5 or pooled_k.dim() != 4:
        raise ValueError(
            f"q must be [B, H, W, heads, D] and pooled_k [B, P, heads, D], got {tuple(q.shape)} and "
            f"{tuple(pooled_k.shape)}"
        )
    B, H, W, h, D = q.shape
    P = pooled_k.shape[1]
    wanted = dict(k=q.shape, v=q.shape, pooled_k=(B, P, h, D), pooled_v=(B, P, h, D), bias=(h, 9))
    wanted |= dict(pooled_bias=(h, H * W, P), add=(B, H, W, h, 9))
    for name, shape in wanted.items():
        if given[name].shape != torch.Size(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(given[name].shape)}")
        if given[name].device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {given[name].device}")
