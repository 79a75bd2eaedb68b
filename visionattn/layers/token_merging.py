"""Deformable token merging: a strided 2x2 convolution whose taps move to where an offset convolution sends them.

Shapes: B batch, H W rows and columns, C channels, P positions to sample.
"""

import torch
from torch import Tensor, nn

from visionattn.kernels import exporting, weighted_rows, weighted_rows_reference
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import declared
from visionattn.layers.patch_embed import at_least
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = ["DeformableTokenMerging", "bilinear_sample"]


def bilinear_sample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear interpolation of a map at any places; the map is zero outside.

    Args:
        x: Map. [B, H, W, C]
        rows: Vertical coordinate of each place, 0 for the first row. [B, P]
        columns: Horizontal coordinate of each place. [B, P]

    Returns:
        The map at the places. [B, P, C]
    """
    index, weight = _corners(rows, columns, x.shape[1], x.shape[2])
    sums = weighted_rows_reference(x.reshape(-1, x.shape[-1]), index.flatten(0, 1), weight.flatten(0, 1))
    return sums.unflatten(0, [rows.shape[0], rows.shape[1]])


def _corners(rows: Tensor, columns: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """The four pixels around every place, numbered through the batch, and their weights. [B, P, 4] each"""
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None] * (H * W)
    rows, columns = rows.clamp(-1, H), columns.clamp(-1, W)  # beyond, all four weights are 0 anyway
    top, left = rows.floor(), columns.floor()
    indices, weights = [], []
    for y, near_y in ((top, 1 - (rows - top)), (top + 1, rows - top)):
        near_y = near_y * ((y >= 0) & (y < H))
        first = batch + y.long().clamp(0, H - 1) * W
        for x, near_x in ((left, 1 - (columns - left)), (left + 1, columns - left)):
            indices.append(first + x.long().clamp(0, W - 1))
            weights.append(near_y * near_x * ((x >= 0) & (x < W)))
    return torch.stack(indices, -1), torch.stack(weights, -1)


@opaque  # how it samples depends on the tensor
@declared
class DeformableTokenMerging(nn.Module):
    """``gelu(norm(deformable_conv(x)))`` with a 2x2 kernel and stride 2: half the map, other channels (LITv2).

    Tap (a, b) of output (i, j) samples the map at row ``2 i + a + offset[2 (2 a + b)]`` and column
    ``2 j + b + offset[2 (2 a + b) + 1]``, the offsets being an ordinary 2x2 convolution with stride 2. With zero
    offsets, as initialised, this is such a convolution itself. It computes what ``torchvision.ops.deform_conv2d`` does.

    Args:
        dim: Channels of the map. [B, dim, H, W]
        out_dim: Channels of the result. [B, out_dim, H // 2, W // 2], in channels_last, at least one row and column
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.exportable = built_for_export()
        self.sampled = 4 * dim
        self.conv_offset = nn.Conv2d(dim, 8, 2, stride=2, **dd)
        self.proj = Linear(4 * dim, out_dim, **dd)  # of the four sampled pixels side by side, tap by tap
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        self.act = nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of a convolution with the weights of ``proj``, and no offsets."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)
        self.proj.reset_parameters()
        self.norm.reset_parameters()

    @torch.jit.ignore
    def lr_scales(self) -> dict[str, float]:
        """Parameters with a learning rate of their own: offsets learn at a hundredth of it, as the authors trained."""
        return {"conv_offset.*": 0.01}

    def forward(self, x: Tensor) -> Tensor:
        x = at_least(x, 2)
        if torch.jit.is_scripting():
            offset = self.conv_offset(x)
        else:
            offset = self._offset(x)
        offset = offset if offset.dtype == torch.float64 else offset.float()  # half precision has no fine positions
        offset = offset.permute(0, 2, 3, 1).unflatten(-1, [4, 2])  # B h w taps axes
        B, h, w = offset.shape[0], offset.shape[1], offset.shape[2]
        tap = torch.arange(4, device=x.device)
        rows = 2 * torch.arange(h, device=x.device)[:, None, None] + tap // 2 + offset[..., 0]
        columns = 2 * torch.arange(w, device=x.device)[:, None] + tap % 2 + offset[..., 1]
        rows, columns, pixels = rows.flatten(1), columns.flatten(1), x.permute(0, 2, 3, 1)
        if torch.jit.is_scripting() or self.exportable:
            y = bilinear_sample(pixels, rows, columns)
        else:
            y = self._sample(pixels, rows, columns)
        y = self.proj(y.reshape(B, h, w, self.sampled)).permute(0, 3, 1, 2)
        if not torch.jit.is_scripting():
            if exporting():
                y = y.contiguous()  # else the order of the strides is looked at, which would fix the size
        return self.act(self.norm(y))

    @torch.jit.unused
    def _offset(self, x: Tensor) -> Tensor:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return self.conv_offset(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_offset(x.to(next(self.conv_offset.parameters()).dtype))

    @torch.jit.unused
    def _sample(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or exporting():
            return bilinear_sample(x, rows, columns)
        index, weight = _corners(rows, columns, x.shape[1], x.shape[2])
        # One pass over memory. On the CPU 4 to 5 times as fast as deform_conv2d forward, 7 to 8 times with backward.
        y = weighted_rows(x.reshape(-1, x.shape[-1]), index.reshape(-1, 4), weight.reshape(-1, 4))
        return y.reshape(*rows.shape, x.shape[-1])
