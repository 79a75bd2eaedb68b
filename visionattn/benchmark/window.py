"""Window attention to measure: ours, the authors' order of operations, and timm's. Importing this registers them.

B batch, H rows, W columns, C channels, h heads, D head dim, S tokens of a window, n windows.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from visionattn.benchmark.ops import OpCase, Size, op_benchmark
from visionattn.kernels import window_attention

__all__ = ["TimmWindows"]

WINDOW = 7
SIDES = (WINDOW, WINDOW)


def _regions_apart(H: int, W: int, shift: int, device: torch.device) -> Tensor | None:
    """timm's mask of shifted windows. [n, S, S]"""
    if shift == 0:
        return None
    regions = torch.zeros(1, H, W, 1, device=device)
    bounds = ((0, -WINDOW), (-WINDOW, -shift), (-shift, None))
    for i, rows in enumerate(bounds):
        for j, columns in enumerate(bounds):
            regions[:, slice(*rows), slice(*columns)] = 3 * i + j
    regions = window_partition(regions, SIDES).flatten(1)  # n S
    return (regions[:, None] != regions[:, :, None]).to(torch.float32) * -100.0


class _TimmOperator:
    """Roll, partition, scaled dot-product attention under an expanded mask, reverse and roll back, as timm has them."""

    def __init__(self, size: Size, shift: int, index: Tensor, mask: Tensor | None) -> None:
        self.size, self.shift, self.index, self.mask = size, shift, index, mask

    def __call__(self, qkv: Tensor, table: Tensor) -> Tensor:
        B, H, W, _, h, D = qkv.shape
        if H % WINDOW or W % WINDOW:
            raise ValueError(f"timm's composition is measured on multiples of the window, {WINDOW}, not on {self.size}")
        S = WINDOW**2
        x = qkv.flatten(3)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = window_partition(x, SIDES).view(-1, S, 3, h, D).permute(2, 0, 3, 1, 4)
        q, k, v = x.unbind(0)
        mask = table[self.index].view(S, S, -1).permute(2, 0, 1).contiguous()[None]
        if self.mask is not None:
            n = self.mask.shape[0]
            windows = self.mask.to(mask.dtype).view(1, n, 1, S, S).expand(len(q) // n, -1, h, -1, -1)
            mask = mask + windows.reshape(-1, h, S, S)
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(-1, *SIDES, h * D)
        y = window_reverse(y, SIDES, H, W)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return y.view(B, H, W, h, D)


def _case(batch: int, size: Size, rand: Callable[..., Tensor], shift: int) -> OpCase:
    heads = max(size.channels // 32, 1)
    qkv = rand(batch, size.height, size.width, 3, heads, size.channels // heads)
    index = WindowAttention(heads, heads, window_size=WINDOW).relative_position_index.view(-1).to(qkv.device)
    mask = None
    if size.height % WINDOW == 0 and size.width % WINDOW == 0:
        mask = _regions_apart(size.height, size.width, shift, qkv.device)

    def attend(qkv: Tensor, table: Tensor, backend: str) -> Tensor:
        return window_attention(qkv, WINDOW, shift, table, backend=backend)

    functions = {name: partial(attend, backend=name) for name in ("reference", "torch", "triton")}
    functions["timm"] = _TimmOperator(size, shift, index, mask)
    return OpCase(inputs=(qkv, rand((2 * WINDOW - 1) ** 2, heads)), functions=functions)


CANDIDATES = ("timm", "reference", "torch", "triton", "timm+compile", "torch+compile")


@op_benchmark("window7", size_set="swin_t", candidates=CANDIDATES)
def window7(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Attention within windows of 7x7 with relative position bias, from a fused projection of heads of 32 channels."""
    return _case(batch, size, rand, shift=0)


@op_benchmark("window7_shifted", size_set="swin_t", candidates=CANDIDATES)
def window7_shifted(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """The same in windows that are shifted by 3, under a mask."""
    return _case(batch, size, rand, shift=WINDOW // 2)


class TimmWindows(nn.Module):
    """timm's layer on a map whose sides are multiples of the window, with what its block does around it."""

    def __init__(self, dim: int, heads: int, shift: bool, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer = WindowAttention(dim, heads, window_size=WINDOW)
        self.shift = WINDOW // 2 if shift and min(size) > WINDOW else 0
        self.register_buffer("mask", _regions_apart(*size, self.shift, torch.device("cpu")), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        y = self.layer(window_partition(x, SIDES).flatten(1, 2), self.mask).unflatten(1, SIDES)
        y = window_reverse(y, SIDES, H, W)
        return y.roll((self.shift, self.shift), (1, 2)) if self.shift else y
