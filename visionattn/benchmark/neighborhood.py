"""Neighborhood attention as one writes it with PyTorch alone: scaled dot-product attention under a dense mask, and
compiled flex_attention. B batch, H rows, W columns, N positions, h heads, D head dim, K window side.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.neighborhood import axis_mask, map_windows

__all__ = ["flex", "flex_mods", "masked_sdpa"]


def _rows(qkv: Tensor) -> tuple[Tensor, ...]:
    """[B, H, W, 3, h, D] to three of [B, h, N, D]."""
    return tuple(t.flatten(1, 2).transpose(1, 2) for t in qkv.unbind(3))


def masked_sdpa(qkv: Tensor, bias: Tensor | None = None, window: int = 7, dilation: int = 1) -> Tensor:
    """Attention between all positions under a mask made for every call."""
    spatial = list(qkv.shape[1:3])
    keys, offsets, _ = map_windows(spatial, [window] * 2, [dilation] * 2, [False] * 2, qkv.device)
    table = qkv.new_zeros(1, 2 * window - 1, 2 * window - 1) if bias is None else bias
    mask = qkv.new_full((1, table.shape[0], *(len(keys),) * 2), -torch.inf)
    mask = mask.scatter(3, keys.expand(1, len(table), -1, -1), table.flatten(1)[None, :, offsets])
    out = F.scaled_dot_product_attention(*_rows(qkv), attn_mask=mask)
    return out.transpose(1, 2).unflatten(1, spatial)


def flex_mods(
    spatial: tuple[int, int], bias: Tensor | None, window: int, dilation: int, device: torch.device
) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
    """The ``mask_mod`` and ``score_mod`` of flex_attention; the latter adds the bias."""
    W = spatial[1]
    (at_y, seen_y), (at_x, seen_x) = (axis_mask(L, window, dilation, False, device) for L in spatial)

    def mask_mod(b, h, query, key):
        return seen_y[query // W, key // W] & seen_x[query % W, key % W]

    def score_mod(score, b, h, query, key):
        return score + bias[h, at_y[query // W, key // W], at_x[query % W, key % W]]

    return mask_mod, None if bias is None else score_mod


_compiled: dict[tuple, Callable[..., Tensor]] = {}


def flex(qkv: Tensor, bias: Tensor | None = None, window: int = 7, dilation: int = 1) -> Tensor:
    """Compiled flex_attention; the mask of blocks and the graph are kept for the next call of the same shape.

    Raises:
        ValueError: On a CPU, where flex_attention has no backward and is several times slower than the other ways.
    """
    if qkv.device.type == "cpu":
        raise ValueError("compiled flex_attention is measured on a GPU only: on a CPU it has no backward")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spatial = tuple(qkv.shape[1:3])
    key = (*qkv.shape, qkv.dtype, qkv.requires_grad, bias is None, window, dilation)
    if key not in _compiled:
        mask_mod, _ = flex_mods(spatial, None, window, dilation, qkv.device)
        N = spatial[0] * spatial[1]
        blocks = create_block_mask(mask_mod, None, None, N, N, device=qkv.device)

        def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
            _, score_mod = flex_mods(spatial, bias, window, dilation, qkv.device)
            out = flex_attention(*_rows(qkv), score_mod=score_mod, block_mask=blocks)
            return out.transpose(1, 2).unflatten(1, spatial)

        _compiled[key] = torch.compile(attend, dynamic=False)
    return _compiled[key](qkv, bias)
