"""How tensors lie in memory, and maps that are padded and cropped at the bottom and on the right.

What pads and crops is written so that TorchScript compiles it too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common.mode import exporting

__all__ = ["channels_last", "crop_map", "is_channels_last", "last_contiguous", "pad_map"]


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map lie side by side, so that a convolution returns channels_last. [B, C, H, W]"""
    return x.stride(1) == 1


def channels_last(x: Tensor) -> Tensor:
    """The map in channels_last, without a copy if it is already. [B, C, H, W]

    Written with ``permute``, which ``torch.func.vmap`` knows, unlike ``contiguous(memory_format=...)``.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def last_contiguous(x: Tensor) -> Tensor:
    """The tensor, copied unless its last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pad_map(x: Tensor, height: int, width: int) -> Tensor:
    """Zeros at the bottom and on the right up to a size. [B, H, W, C]"""
    below, right = height - x.shape[1], width - x.shape[2]
    if torch.jit.is_scripting():
        needed = below + right > 0
    else:
        needed = exporting() or below + right > 0  # an exported graph fixes no size by comparing it
    return F.pad(x, [0, 0, 0, right, 0, below]) if needed else x


def crop_map(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of a map. [B, H, W, C]"""
    if not torch.jit.is_scripting():
        if exporting():
            # The strides of a slice depend on whether it leaves anything out, which would fix the size.
            rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
            return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width]
