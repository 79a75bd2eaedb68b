"""Window attention in a few operators that every runtime knows: to script, to compile, to export for any size of map.
B batch, H rows, W columns, h heads, D head dim, w window sides, S tokens of a window, n windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.attend import attend
from visionattn.kernels.window.geometry import dense_bias, shift_mask

__all__ = ["MASKED", "window_attention_export"]

MASKED = -100.0  # what Swin adds to the logits of tokens that were not neighbors before the shift


def _roll(x: Tensor, shift: list[int], back: bool, shifted: Tensor | None) -> Tensor:
    if shifted is None:
        return x.roll([s if back else -s for s in shift], [1, 2])
    for axis in (1, 2):
        by = shifted * (-shift[axis - 1] if back else shift[axis - 1])
        x = x.index_select(axis, (torch.arange(x.shape[axis], device=x.device) + by) % x.shape[axis])
    return x


def window_attention_export(
    qkv: Tensor,
    window_size: list[int],
    shift: list[int],
    bias: Tensor | None,
    padding: Tensor | None,
    masked: float,
    scale: float,
    any_size: bool = False,
    shifted: Tensor | None = None,
) -> Tensor:
    """Windows folded into the head axis, so that one mask serves all images. Nothing is checked.

    Arguments as in :func:`window_attention`, one value per axis.

    Args:
        any_size: Whether the sides of the map may be symbols, on which nothing may branch.
        shifted: 0 or 1, whether windows are shifted, where that depends on such a side.
    """
    B, H, W, h, D = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[4], qkv.shape[5]
    w0, w1 = window_size[0], window_size[1]
    S = w0 * w1
    rows, columns = (H + w0 - 1) // w0, (W + w1 - 1) // w1
    x = qkv.flatten(3)
    rolled = max(shift[0], shift[1]) > 0
    padded = any_size or rows * w0 != H or columns * w1 != W
    if padded:
        x = F.pad(x, [0, 0, 0, columns * w1 - W, 0, rows * w0 - H])
        if padding is not None:
            outside = (torch.arange(rows * w0, device=x.device) >= H)[:, None]
            outside = outside | (torch.arange(columns * w1, device=x.device) >= W)
            x = torch.where(outside[:, :, None], padding.flatten(), x)
    if rolled:
        x = _roll(x, shift, False, shifted)
    x = x.reshape(B, rows, w0, columns, w1, 3, h, D).permute(5, 0, 1, 3, 6, 2, 4, 7)
    logits: Tensor | None = None if bias is None else dense_bias(bias, w0, w1)[None]
    if rolled:
        mask = shift_mask(window_size, shift, rows, columns, x.device).to(qkv.dtype if bias is None else bias.dtype)
        if shifted is not None:
            mask = mask * shifted
        # As a product the mask could not be -inf.
        mask = torch.where(mask > 0, masked, 0.0).to(mask.dtype)[:, None]  # n 1 S S
        logits = (mask.expand(-1, h, -1, -1) if logits is None else logits + mask).flatten(0, 1)[None]
        x = x.reshape(3, B, rows * columns * h, S, D)
    else:
        x = x.reshape(3, B * rows * columns, h, S, D)
    y = _attend(x[0], x[1], x[2], logits, scale)
    y = (
        y.reshape(B, rows, columns, h, w0, w1, D)
        .permute(0, 1, 4, 2, 5, 3, 6)
        .reshape(B, rows * w0, columns * w1, h * D)
    )
    if rolled:
        y = _roll(y, shift, True, shifted)
    if any_size:  # a slice would be asked for its strides
        y = y.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
    elif padded:
        y = y[:, :H, :W].contiguous()
    return y.unflatten(3, [h, D])


def _attend(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None, scale: float) -> Tensor:
    if logits is not None and logits.requires_grad:  # for which PyTorch's fused attention has no fast path
        return ((q * scale) @ k.transpose(-1, -2) + logits).softmax(-1).to(v.dtype) @ v
    mask = None if logits is None else logits.to(q.dtype)
    return attend(q, k, v, mask, scale)
