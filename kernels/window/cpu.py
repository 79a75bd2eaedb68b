"""Window attention on a CPU: rows of D numbers are picked from the map by index, so that shift, windows, padding and
heads cost one copy, and logits are made for a few windows at a time, which stay in the cache.

B batch, H rows, W columns, h heads, D head dim, S tokens of a window, n windows of a kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.attend import attend
from visionattn.kernels.common.mode import eager, exporting
from visionattn.kernels.window.export import window_attention_export
from visionattn.kernels.window.geometry import dense_bias, shift_mask, table_gradient

__all__ = ["window_attention_torch"]

LOGITS = 2**17  # at a time: half a MiB; a quarter or four times as many measured the same within 5 %


class _Kind(NamedTuple):
    """Windows of one mask: which tokens are apart, and the rows [D] of an image that they are made of.

    Attributes:
        apart: None where none are. [S, S]
        source: Rows of qkv that are queries, ordered by window, head and token. [n * h * S]
        target: Those of the result. [n * h * S]
    """

    apart: Tensor | None
    source: Tensor
    target: Tensor


class _Tables(NamedTuple):
    """The kinds of windows of a map, and where its rows are among those of all kinds, one kind behind another.

    Attributes:
        padded: Whether windows hold one token more than the map has.
        place: Place among the rows of an image in the kind that a row belongs to. [H * W * h]
        own: How many rows of an image that kind has. [H * W * h]
        before: How many those before it have. [H * W * h]
        total: How many all have.
    """

    kinds: tuple[_Kind, ...]
    padded: bool
    place: Tensor
    own: Tensor
    before: Tensor
    total: int


def covers(qkv: Tensor, bias: Tensor | None, padding: Tensor | None) -> bool:
    """Whether tensors are such that :func:`_window_attention_eager` can take them and is the fastest."""
    if qkv.device.type != "cpu" or qkv.dtype not in (torch.float32, torch.float64):
        return False
    eagerly = all(t is None or (eager(t) and t.dtype == qkv.dtype) for t in (qkv, bias, padding))
    return eagerly and qkv.numel() > 0  # in this order: a compiler may not know how many samples there are


@lru_cache(maxsize=64)
def _tables(H: int, W: int, h: int, window: tuple[int, int], shift: tuple[int, int]) -> _Tables:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used for training later
        return _make_tables(H, W, h, window, shift)


def _make_tables(H: int, W: int, h: int, window: tuple[int, int], shift: tuple[int, int]) -> _Tables:
    windows = [-(-L // w) for L, w in zip((H, W), window, strict=True)]
    places, cuts = [], []
    for n, w, s in zip(windows, window, shift, strict=True):
        places.append(((torch.arange(n * w) + s) % (n * w)).view(n, w))
        cuts.append([slice(0, n)] if s == 0 else [slice(0, n - 1), slice(n - 1, n)][n == 1 :])
    mask = shift_mask(list(window), list(shift), *windows, torch.device("cpu")).unflatten(0, windows)
    padded = windows[0] * window[0] != H or windows[1] * window[1] != W
    head = torch.arange(h)[:, None]
    found = torch.empty(3, (H * W + 1) * h, dtype=torch.long)
    kinds, before = [], 0
    for across, along in itertools.product(*cuts):
        y, x = places[0][across][:, None, :, None], places[1][along][:, None]
        token = torch.where((y < H) & (x < W), y * W + x, H * W).flatten(2).flatten(0, 1)[:, None]  # n 1 S
        apart = mask[across, along][0, 0]
        kinds.append(_Kind(apart if apart.any() else None, *((token * p * h + head).flatten() for p in (3, 1))))
        target = kinds[-1].target
        found[0, target] = torch.arange(target.numel())
        found[1, target], found[2, target] = target.numel(), before
        before += target.numel()
    return _Tables(tuple(kinds), padded, *found[:, : H * W * h], before)


def _places(tables: _Tables, B: int) -> Tensor:
    """Where rows are among those of all kinds, in each kind one image behind another. [B, H * W * h]"""
    return torch.arange(B)[:, None] * tables.own + (tables.before * B + tables.place)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, padding, window, shift, masked, scale):
        B, H, W, _, h, D = qkv.shape
        S = window[0] * window[1]
        tables = _tables(H, W, h, window, shift)
        x = _rows(qkv, padding, tables.padded)
        dense = None if bias is None else dense_bias(bias, *window)
        wanted = any(ctx.needs_input_grad[:3])
        out = x.new_empty(B * tables.total, D)
        kept, first = [], 0
        for kind in tables.kinds:
            q, k, v = (x.index_select(1, kind.source + part * h).view(-1, S, D) for part in range(3))
            own = out[first : first + len(q) * S].view(-1, S, D)
            first += len(q) * S
            weights = _attend(q, k, v, _added(dense, kind.apart, masked, h, x.dtype), own, h, scale, wanted)
            kept += [q, k, v, weights]
        ctx.shape, ctx.arguments = qkv.shape, (window, shift, masked, scale)
        ctx.set_materialize_grads(False)
        way = twice.stand_in(qkv)
        ctx.save_for_backward(way, bias, padding, *(kept if wanted else ()))
        return out.index_select(0, _places(tables, B).flatten()).view(B, H, W, h, D), way

    @staticmethod
    def backward(ctx, grad, way_grad):
        if grad is None:
            return way_grad, *(None,) * 6
        B, H, W, _, h, D = ctx.shape
        window, shift, masked, scale = ctx.arguments
        S = window[0] * window[1]
        tables = _tables(H, W, h, window, shift)
        way, bias, padding, *kept = ctx.saved_tensors
        if twice.wanted(grad):
            form = partial(_again, ctx.arguments, _put_back(kept, tables, ctx.shape))
            dqkv, dbias, dpadding = twice.gradients(form, grad, (way, bias, padding))
            return dqkv if way_grad is None else dqkv + way_grad, dbias, dpadding, *(None,) * 4
        grad = _rows(grad, None, tables.padded)
        total = grad.new_zeros(h, S, S) if ctx.needs_input_grad[1] else None
        padding = grad.new_zeros(3, h, D) if ctx.needs_input_grad[2] else None
        dqkv = grad.new_empty(B, 3 * H * W * h, D)
        saved = [t.view(B, -1, *t.shape[1:]) for t in kept]
        images = max(
            1, LOGITS // (tables.total * S)
        )  # at a time: all at once need as much memory as the gradients again
        for first in range(0, B, images):
            at = slice(first, first + images)
            rows = grad[at]
            out = grad.new_empty(3, len(rows) * tables.total, D)
            before = 0
            for i, kind in enumerate(tables.kinds):
                grads = rows.index_select(1, kind.target).view(-1, S, D)
                own = out[:, before : before + len(grads) * S].view(3, -1, S, D)
                before += len(grads) * S
                _attend_backward(*(t[at].flatten(0, 1) for t in saved[4 * i : 4 * i + 4]), grads, own, total, h, scale)
                if padding is not None:
                    outside = (kind.target >= H * W * h).view(-1, h, S, 1)
                    padding += (own.view(3, len(rows), -1, h, S, D) * outside).sum((1, 2, 4))
            places = _places(tables, len(rows)).view(len(rows), H * W, 1, h)
            places = places + torch.arange(3)[:, None] * (len(rows) * tables.total)
            torch.index_select(out.view(-1, D), 0, places.flatten(), out=dqkv[at].view(-1, D))
        dqkv = dqkv.view(ctx.shape) if ctx.needs_input_grad[0] else None
        dqkv = dqkv if way_grad is None or dqkv is None else dqkv + way_grad
        return dqkv, None if total is None else table_gradient(total, *window), padding, None, None, None, None


def _again(arguments, qkv: Tensor, way: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    window, shift, masked, scale = arguments
    return window_attention_export(qkv + way, list(window), list(shift), bias, padding, masked, scale)


def _put_back(kept: Sequence[Tensor], tables: _Tables, shape: torch.Size) -> Tensor:
    """The map that the rows of all kinds, for each its queries, keys, values and weights, were picked from."""
    B, H, W, _, h, D = shape
    rows = kept[0].new_empty(B, (H * W + 1) * 3 * h, D)
    for i, kind in enumerate(tables.kinds):
        for part in range(3):
            rows.index_copy_(1, kind.source + part * h, kept[4 * i + part].view(B, -1, D))
    return rows[:, : H * W * 3 * h].reshape(shape)


def _rows(x: Tensor, padding: Tensor | None, padded: bool) -> Tensor:
    """The rows of a map, and if need be those of one more token, which is zero by default. [B, rows, D]"""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    if not padded:
        return rows
    token = x.new_zeros(x.shape[3:]) if padding is None else padding
    return torch.cat([rows, token.reshape(1, -1, x.shape[-1]).expand(len(rows), -1, -1)], 1)


def _added(dense: Tensor | None, apart: Tensor | None, masked: float, h: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits of a kind of windows. [h, S, S]"""
    if apart is None:
        return dense
    mask = torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, masked)
    return mask.expand(h, -1, -1) if dense is None else dense + mask


def _steps(rows: int, h: int, S: int) -> range:
    return range(0, rows, max(LOGITS // (h * S * S), 1) * h)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, out: Tensor, h: int, scale: float, keep: bool
) -> Tensor | None:
    """Attention of windows, [n * h, S, D] all, written to ``out``; returns its weights if they are to be kept."""
    N, S, _ = q.shape
    steps = _steps(N, h, S)
    weights = q.new_empty(N, S, S) if keep else None
    for i in steps:
        at = slice(i, i + steps.step)
        logits = q.new_empty(len(q[at]), S, S)
        if added is not None:
            logits.view(-1, h, S, S).copy_(added)
        torch.baddbmm(logits, q[at], k[at].mT, beta=int(added is not None), alpha=scale, out=logits)
        # Not in place, which takes twice the time.
        p = torch.softmax(logits, -1) if weights is None else torch.softmax(logits, -1, out=weights[at])
        torch.bmm(p, v[at], out=out[at])
    return weights


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, grads: Tensor, out: Tensor, total: Tensor | None, h: int, scale
) -> None:
    """Write the gradients of q, k and v to ``out``, and add that of the logits to ``total`` [h, S, S]."""
    N, S, _ = q.shape
    steps = _steps(N, h, S)
    for i in steps:
        at = slice(i, i + steps.step)
        dq, dk, dv = out[:, at]
        p, do = weights[at], grads[at]
        torch.bmm(p.mT, do, out=dv)
        ds = torch._softmax_backward_data(torch.bmm(do, v[at].mT), p, -1, p.dtype)
        if total is not None:
            total += ds.view(-1, h, S, S).sum(0)
        torch.baddbmm(dq, ds, k[at], beta=0, alpha=scale, out=dq)
        torch.baddbmm(dk, ds.mT, q[at], beta=0, alpha=scale, out=dk)


def _window_attention_eager(
    qkv: Tensor,
    window_size: list[int],
    shift: list[int],
    bias: Tensor | None,
    padding: Tensor | None,
    masked: float,
    scale: float,
) -> Tensor:
    """Arguments as in :func:`window_attention`, one value per axis, for tensors that :func:`covers` lets pass."""
    window, steps = tuple(window_size), tuple(shift)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, bias, padding)):
        return _WindowAttention.apply(qkv, bias, padding, window, steps, masked, scale)[0]
    return _infer(qkv, bias, padding, window, steps, masked, scale)


def _infer(qkv, bias, padding, window, shift, masked, scale) -> Tensor:
    """PyTorch's fused attention on tokens picked whole: a little faster than single heads where nothing is kept."""
    B, H, W, _, h, D = qkv.shape
    S = window[0] * window[1]
    tables = _tables(H, W, 1, window, shift)
    tokens = _rows(qkv, padding, tables.padded).view(B, -1, 3 * h * D)
    dense = None if bias is None else dense_bias(bias, *window)
    grid = (B, H // window[0], window[0], W // window[1], window[1], -1)
    whole = shift == (0, 0) and not tables.padded  # a permutation of axes, faster than one of tokens
    parts = []
    for kind in tables.kinds:
        own = tokens.view(grid).transpose(2, 3) if whole else tokens.index_select(1, kind.target)
        q, k, v = own.reshape(-1, S, 3, h, D).permute(2, 0, 3, 1, 4)
        added = _added(dense, kind.apart, masked, h, qkv.dtype)
        out = attend(q, k, v, None if added is None else added[None], scale)
        parts.append(out.transpose(1, 2).reshape(-1, h * D))
    if whole:
        B, rows, w0, columns, w1, _ = grid
        return parts[0].view(B, rows, columns, w0, w1, h * D).transpose(2, 3).reshape(B, H, W, h, D)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    out = out.index_select(0, _places(tables, B).flatten())
    return out.view(B, H, W, h, D)


def window_attention_torch(
    qkv: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
    padding: Tensor | None,
    masked: float,
    scale: float,
) -> Tensor:
    """The fastest form known in operators of PyTorch. Arguments as in ``window_attention_reference``."""
    arguments = (qkv, list(window_size), list(shift), bias, padding, masked, scale)
    if covers(qkv, bias, padding):
        return _window_attention_eager(*arguments)
    return window_attention_export(*arguments, exporting())
