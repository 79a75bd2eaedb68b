"""Patch embeddings of networks of one resolution, with positions and prefix tokens.

B batch, H W rows and columns of the grid of patches, N = H * W, P prefix tokens, C channels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, resample_abs_pos_embed_nhwc, to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import channels_last
from visionattn.layers.checks import declared
from visionattn.layers.tracing import opaque

__all__ = ["PatchEmbed", "PrefixPatchEmbed", "position_embedding", "resize_position_embedding", "shortfall"]


def shortfall(size: int, wanted: int) -> int:
    """``max(wanted - size, 0)`` without a comparison that would fix the size of a map in a recorded graph."""
    missing = wanted - size
    return missing.clamp(min=0) if isinstance(missing, Tensor) else torch.sym_max(missing, 0)  # one of torch.jit.trace


@register_notrace_function
def at_least(x: Tensor, side: int) -> Tensor:
    """The map [B, C, H, W], with zeros after its end on an axis shorter than ``side``."""
    height, width = x.shape[2], x.shape[3]
    if height >= side and width >= side:
        return x
    return F.pad(x, [0, max(0, side - width), 0, max(0, side - height)])


@register_notrace_function
def position_grid(table: Tensor, size: tuple[int, int], height: int, width: int) -> Tensor:
    """The table [1, N, C] of a grid of ``size``, resampled (bicubic, antialiased) to [1, ``height``, ``width``, C]."""
    grid = table.unflatten(1, [size[0], size[1]])
    fixed = True
    if not torch.jit.is_scripting():
        # While a graph is exported for any size the numbers are symbols, of which nothing must be asked.
        fixed = type(height) is int and type(width) is int
    if fixed and height == size[0] and width == size[1]:
        return grid
    return resample_abs_pos_embed_nhwc(grid, [height, width])


@register_notrace_function
def position_embedding(table: Tensor, size: tuple[int, int], height: int, width: int, prefix: int) -> Tensor:
    """The table [1, P + N, C] of a grid of ``size`` behind P prefix tokens, resampled as by ``position_grid``."""
    grid = position_grid(table[:, prefix:], size, height, width).flatten(1, 2)
    return grid if prefix == 0 else torch.cat([table[:, :prefix], grid], 1)


@opaque  # whether it pads and resamples depends on the size of the image
class _Patches(nn.Module):
    """What both patch embeddings share: projection, embedding of positions, prefix tokens, another image size."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        img_size: int | Sequence[int] | None,
        norm: nn.Module | None,
        num_prefix_tokens: int,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.Identity() if norm is None else norm
        self.grid_size = (1, 1) if img_size is None else self._grid(img_size)
        table = prefix = None
        if img_size is not None:
            tokens = num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
            table = nn.Parameter(torch.empty(1, tokens, dim, **dd))
        if num_prefix_tokens > 0:
            prefix = nn.Parameter(torch.empty(1, num_prefix_tokens, dim, **dd))
        self.register_parameter("pos_embed", table)
        self.register_parameter("prefix_tokens", prefix)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal positions and prefix tokens; the projection keeps its own initialisation."""
        for parameter in (self.pos_embed, self.prefix_tokens):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)

    def _grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        height, width = to_2tuple(img_size)
        if min(height, width) < self.patch_size:
            raise ValueError(f"img_size must be at least the patch size {self.patch_size}, got {img_size!r}")
        return height // self.patch_size, width // self.patch_size

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resample the stored position embedding, which from then on belongs to images of ``img_size``."""
        old, self.grid_size = self.grid_size, self._grid(img_size)
        if self.pos_embed is not None:
            table = position_embedding(self.pos_embed.detach(), old, *self.grid_size, self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def patches(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H', W'] to a grid without positions [B, H, W, C]."""
        x = self.proj(channels_last(at_least(x, self.patch_size)))
        return self.norm(x.permute(0, 2, 3, 1))


@declared
class PatchEmbed(_Patches):
    """Patches side by side, each projected to a vector, and the embedding of their positions.

    A remainder of the image that fills no patch is left out, as the convolution does; an image smaller than a patch
    is padded to one.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the grid.
        patch_size: Side of a patch.
        img_size: Side, or height and width, of the images that the position embedding is made for; it is resampled
            for others. None for no position embedding.
        norm: Applied to the projected patches, on the last axis.
        nchw: Whether the result is a map [B, C, H, W], the same in memory, instead of a grid.

    Raises:
        ValueError: If ``img_size`` is smaller than a patch.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 16,
        img_size: int | Sequence[int] | None = 224,
        norm: nn.Module | None = None,
        nchw: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_chans, dim, patch_size, img_size, norm, 0, device=device, dtype=dtype)
        self.nchw = nchw

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H', W'] to a grid [B, H, W, C]."""
        x = self.patches(x)
        if self.pos_embed is not None:
            height, width = x.shape[1], x.shape[2]
            x = x + position_grid(self.pos_embed, self.grid_size, height, width)
        return x.permute(0, 3, 1, 2) if self.nchw else x


@declared
class PrefixPatchEmbed(_Patches):
    """``PatchEmbed`` behind learned tokens that belong to no place, the class token first among them.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the tokens.
        patch_size: Side of a patch.
        img_size: As in ``PatchEmbed``. The position embedding [1, P + N, C] has a row for each prefix token too.
        norm: Applied to the projected patches, on the last axis.
        num_prefix_tokens: P.

    Raises:
        ValueError: If ``img_size`` is smaller than a patch or ``num_prefix_tokens`` less than 1.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 16,
        img_size: int | Sequence[int] | None = 224,
        norm: nn.Module | None = None,
        num_prefix_tokens: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        if num_prefix_tokens < 1:
            raise ValueError(f"num_prefix_tokens must be at least 1, got {num_prefix_tokens}; PatchEmbed has none")
        super().__init__(in_chans, dim, patch_size, img_size, norm, num_prefix_tokens, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, in_chans, H', W'] to tokens [B, P + N, C] and the size (H, W) of their grid."""
        x = self.patches(x)
        height, width = x.shape[1], x.shape[2]
        x = torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        if self.pos_embed is not None:
            x = x + position_embedding(self.pos_embed, self.grid_size, height, width, self.num_prefix_tokens)
        return x, (height, width)


def resize_position_embedding(
    state_dict: dict[str, Tensor], stem: nn.Module, name: str = "stem.pos_embed"
) -> dict[str, Tensor]:
    """Fit the position embedding of a checkpoint to the image size that a stem was built for.

    Args:
        state_dict: Parameters by our names; returned as it is where nothing has to change.
        stem: ``PatchEmbed`` or ``PrefixPatchEmbed`` of the model they are for.
        name: Of the table. Its patches are taken to form a square where their number differs.

    Raises:
        ValueError: If they form none.
    """
    table = state_dict.get(name)
    if table is None or stem.pos_embed is None or table.shape == stem.pos_embed.shape:
        return state_dict
    prefix = stem.num_prefix_tokens
    patches = table.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches == 0:
        raise ValueError(f"{name} must have {prefix} rows and a square number more, got shape {tuple(table.shape)}")
    return {**state_dict, name: position_embedding(table, (side, side), *stem.grid_size, prefix)}
