"""Attention within (shifted) windows, with relative position bias. Shapes: B batch, H rows, W columns, h heads,
D head dim, w window sides, S = w0 * w1 tokens of a window.

    out[i] = sum_j p[i, j] v[j],   p[i, :] = softmax_j(scale * q[i] . k[j] + bias[i - j] + masked * apart[i, j])

where j runs over the window of i, and windows that were shifted over a border of the map hold tokens that are apart
(Swin, arXiv 2103.14030).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import check_extent, check_floating, check_same, check_tensors, per_axis, positive
from visionattn.kernels.common.mode import autocast, exporting
from visionattn.kernels.common.precision import precise_dtype
from visionattn.kernels.window.cpu import window_attention_torch
from visionattn.kernels.window.export import MASKED
from visionattn.kernels.window.geometry import relative_index
from visionattn.kernels.window.triton import unsupported, window_attention_triton

__all__ = ["window_attention"]


def window_attention_reference(
    qkv: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    padding: Tensor | None,
    masked: float,
    scale: float,
) -> Tensor:
    """Pad, roll, cut into windows, attend, and all of it back. Arguments as in :func:`window_attention`, per axis."""
    full = precise_dtype(qkv.dtype)
    H, W = qkv.shape[1:3]
    (w0, w1), (s0, s1) = window_size, shift
    rows, columns = H + -H % w0, W + -W % w1
    x = F.pad(qkv.to(full), [0, 0, 0, 0, 0, 0, 0, columns - W, 0, rows - H])
    if padding is not None:
        outside = torch.ones(rows, columns, 1, 1, 1, dtype=torch.bool, device=qkv.device)
        outside[:H, :W] = False
        x = torch.where(outside, padding.to(full), x)
    x = x.roll((-s0, -s1), (1, 2)).unflatten(2, (-1, w1)).unflatten(1, (-1, w0))  # B H/w w W/w w 3 h D
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6)  # each B H/w W/w h S D
    with torch.autocast(qkv.device.type, enabled=False):
        logits = q * scale @ k.transpose(-1, -2)
        if bias is not None:
            index = relative_index(w0, w1, qkv.device)
            logits = logits + bias.to(full)[index].unflatten(0, (w0 * w1, -1)).permute(2, 0, 1)
        regions = torch.zeros(rows, columns, dtype=torch.long, device=qkv.device)
        for y in (rows - w0, rows - s0):  # the map after the shift: cut where windows, and where the ends meet
            regions[y:] += 3
        for column in (columns - w1, columns - s1):
            regions[:, column:] += 1
        regions = regions.unflatten(1, (-1, w1)).unflatten(0, (-1, w0)).transpose(1, 2).flatten(2)  # H/w W/w S
        apart = regions[..., None] != regions[..., None, :]
        logits = torch.where(apart[:, :, None], logits + masked, logits)
        y = logits.softmax(-1) @ v
    y = y.unflatten(4, (w0, w1)).permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)
    return y.roll((s0, s1), (1, 2))[:, :H, :W].to(qkv.dtype)


def window_attention(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    masked: float = MASKED,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within the windows of a map, read in place from the projection to queries, keys and values.

    A map that is no multiple of the window is padded, right and below, with tokens that are keys and values like any.
    Shifted windows begin at row and column ``shift`` of the padded map and go around its borders; tokens of a window
    that come from two ends of the map see each other through ``masked``.

    Args:
        qkv: Queries, keys and values, of any strides. [B, H, W, 3, h, D]
        window_size: Sides of a window, rows and columns, or one for both.
        shift: How far windows are shifted along either axis, or one value for both; less than the window.
        bias: Relative position bias, added to the scaled logits: row (dy + w0 - 1) * (2 * w1 - 1) + dx + w1 - 1, for a
            key that lies dy rows and dx columns before its query; or ``None``. [(2 * w0 - 1) * (2 * w1 - 1), h]
        padding: Query, key and value of the tokens that pad the map, such as the bias of the projection where zeros pad
            its input; ``None`` for zeros. [3, h, D]
        masked: What is added to the logits of tokens that come from two ends of the map.
        scale: Factor of the logits; ``None`` stands for D ** -0.5.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        The attended values, contiguous; under autocast in its dtype. [B, H, W, h, D]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or an argument is not one of the allowed.
        BackendError: If the backend that was asked for cannot run this call.
    """
    window_size = per_axis("window_size", window_size, 2, int)
    shift = per_axis("shift", shift, 2, int)
    any_size = exporting()
    if not any_size:
        _check(qkv, window_size, shift, bias, padding)
    if isinstance(masked, bool) or not isinstance(masked, (int, float)) or not masked < math.inf:
        raise ValueError(f"masked must be a number or -inf, got {masked!r}")
    scale = operator.index(qkv.shape[-1]) ** -0.5 if scale is None else positive("scale", scale)
    qkv, padding = autocast(qkv, padding)
    if not any_size and qkv.shape[1] % window_size[0] == 0 and qkv.shape[2] % window_size[1] == 0:
        padding = None
    chosen = choose("window_attention", qkv, backend, lambda: unsupported(qkv, window_size))
    return _IMPLEMENTATIONS[chosen](qkv, window_size, shift, bias, padding, float(masked), scale)


_IMPLEMENTATIONS = {
    "triton": window_attention_triton,
    "torch": window_attention_torch,
    "reference": window_attention_reference,
}


def _check(
    qkv: Tensor, window_size: tuple[int, int], shift: tuple[int, int], bias: Tensor | None, padding: Tensor | None
) -> None:
    """Raise a ValueError that names what is wrong."""
    check_tensors(qkv=qkv)
    check_tensors(True, bias=bias, padding=padding)
    shape = tuple(qkv.shape)
    if len(shape) != 6 or shape[3] != 3:
        raise ValueError(f"qkv must be [B, H, W, 3, heads, D], got shape {shape}")
    if min(shape[1], shape[2], shape[4], shape[5]) < 1:
        raise ValueError(f"qkv must have at least one row, column, head and channel, got shape {shape}")
    check_floating(qkv=qkv)
    check_extent("window_size", window_size, shape[1:3])
    for axis, (w, s) in enumerate(zip(window_size, shift, strict=True)):
        if w < 1:
            raise ValueError(f"window_size must be at least 1, got {w} for spatial axis {axis}")
        if not 0 <= s < w:
            raise ValueError(f"shift must be 0 to window_size - 1 = {w - 1}, got {s} for spatial axis {axis}")
    if bias is not None:
        expected = ((2 * window_size[0] - 1) * (2 * window_size[1] - 1), shape[4])
        if bias.shape != expected:
            raise ValueError(f"bias must be [(2 * w0 - 1) * (2 * w1 - 1), heads] = {expected}, got {tuple(bias.shape)}")
    if padding is not None and padding.shape != shape[3:]:
        raise ValueError(f"padding must be [3, heads, D] = {shape[3:]}, got shape {tuple(padding.shape)}")
    check_same(qkv, bias=bias, padding=padding)
