"""Neighborhood attention over 1-, 2- or 3-D maps, with relative position bias. Shapes: B batch, N positions, h heads,
D head dim, K window side, S slots of a window (the product of its sides).

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j] + bias[j - i])

where j runs over the S positions of i's window: see ``geometry.py`` for which these are (arXiv 2204.07143, with
dilation arXiv 2209.15001).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import check_filled, check_floating, check_same, check_tensors, per_axis, positive
from visionattn.kernels.common.mode import autocast
from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.neighborhood.cpu import neighborhood_attention_torch
from visionattn.kernels.neighborhood.geometry import map_windows
from visionattn.kernels.neighborhood.natten import neighborhood_attention_natten
from visionattn.kernels.neighborhood.triton import neighborhood_attention_triton, unsupported

__all__ = ["neighborhood_attention"]


MAX_AXES = 3


def neighborhood_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """Gather every query's keys and values. Arguments as in :func:`neighborhood_attention`, one value per axis."""
    full = precise_dtype(q.dtype)
    keys, offsets, exists = map_windows(q.shape[1:-2], kernel_size, dilation, is_causal, q.device)
    rows, k, v = (t.flatten(1, -3).to(full) for t in (q, k, v))  # B N h D
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bnhd,bnshd->bhns", rows * scale, k[:, keys])
        if bias is not None:
            logits = logits + bias.to(full).flatten(1)[:, offsets]
        weights = logits.masked_fill(~exists, -torch.inf).softmax(-1)
        out = torch.einsum("bhns,bnshd->bnhd", weights, v[:, keys])
    return out.reshape(q.shape).to(q.dtype)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    bias: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from every position of a map to the window around it.

    Every query sees exactly ``kernel_size`` keys per axis: near a border the window is moved inwards, never cut or
    padded. Only a causal axis has fewer, before its start.

    Args:
        q: Queries, with one, two or three spatial axes and any strides. [B, L0, (L1, (L2,)) h, D]
        k: Keys, shaped as ``q``.
        v: Values, shaped as ``q``.
        kernel_size: Window side K, for all axes or one per axis. An even window has one more key before the query
            than after it.
        dilation: Distance between the keys of a window, for all axes or one per axis.
        bias: Relative position bias, added to the scaled logits at index key - query + K - 1, in steps of the
            dilation; or ``None``. [h, 2 * K0 - 1, (2 * K1 - 1, (2 * K2 - 1))]
        is_causal: Whether a query sees only itself and positions before it on the axis, for all axes or one per axis.
        scale: Factor of the logits; ``None`` stands for D ** -0.5.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, ``"natten"`` for the installed package of that name (no
            bias), or ``None`` for the setting or the automatic choice.

    Returns:
        The attended values, contiguous; under autocast in its dtype. [B, L0, (L1, (L2,)) h, D]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or an axis is shorter than kernel_size * dilation
            (pad the map before the projection to queries, keys and values), or ``backend`` is unknown.
        BackendError: If the backend that was asked for cannot run this call.
    """
    check_tensors(q=q, k=k, v=v)
    check_tensors(True, bias=bias)
    if not 4 <= q.dim() <= 3 + MAX_AXES:
        raise ValueError(
            f"q must be [B, *spatial, heads, D] with 1 to {MAX_AXES} spatial axes, got shape {tuple(q.shape)}"
        )
    axes = q.dim() - 3
    kernel_size = per_axis("kernel_size", kernel_size, axes, int)
    dilation = per_axis("dilation", dilation, axes, int)
    is_causal = per_axis("is_causal", is_causal, axes, bool)
    if not torch.jit.is_tracing():  # which warns of every comparison
        _check(q, k, v, kernel_size, dilation, bias)
    scale = operator.index(q.shape[-1]) ** -0.5 if scale is None else positive("scale", scale)
    q, k, v = autocast(q, k, v)
    chosen = backend
    if backend != "natten":  # never the automatic choice
        chosen = choose(
            "neighborhood_attention", q, backend, lambda: unsupported(q, kernel_size, dilation, is_causal, bias)
        )
    return _IMPLEMENTATIONS[chosen](q, k, v, kernel_size, dilation, bias, is_causal, scale)


_IMPLEMENTATIONS = {
    "triton": neighborhood_attention_triton,
    "torch": neighborhood_attention_torch,
    "reference": neighborhood_attention_reference,
    "natten": neighborhood_attention_natten,
}


def _check(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: tuple[int, ...], dilation: tuple[int, ...], bias: Tensor | None
) -> None:
    """Raise a ValueError that names what is wrong. Every look at a tensor costs time on small maps: few are taken."""
    shape = q.shape
    for axis, (L, K, d) in enumerate(zip(shape[1:-2], kernel_size, dilation, strict=True)):
        if K < 1:
            raise ValueError(f"kernel_size must be at least 1, got {K} for spatial axis {axis}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} for spatial axis {axis}")
        if isinstance(L, int) and K * d > L:  # an exported graph would keep the comparison with a symbol
            raise ValueError(
                f"kernel_size * dilation must not exceed the map: {K} * {d} = {K * d} on spatial axis {axis} of "
                f"length {L}; pad the map, or take a smaller window"
            )
    check_floating(q=q)
    check_filled("q", q, head=-2, channel=-1)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} as q is, got shape {tuple(tensor.shape)}")
    check_same(q, "q", k=k, v=v, bias=bias)
    if bias is not None:
        expected = (shape[-2], *(2 * K - 1 for K in kernel_size))
        if bias.shape != expected:
            raise ValueError(
                f"bias must be [heads, 2 * kernel_size - 1 per axis] = {expected}, got shape {tuple(bias.shape)}"
            )
