"""Backbones of a single resolution, as ViT: one patch embedding, then blocks that keep the size of the map.

B batch, H W rows and columns of the grid of patches, N = H * W, P prefix tokens, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import (
    get_device_dtype,
    global_pool_nlc,
    register_notrace_function,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from visionattn.backbone import Backbone, feature_take_indices, update_model_input_size
from visionattn.blocks import to_channels_last

__all__ = ["Isotropic", "PatchEmbed", "PrefixIsotropic", "PrefixPatchEmbed", "TokenHead", "resize_position_embedding"]

POOLS = ("token", "avg", "max", "avgmax", "")
FORMATS = ("NCHW", "NHWC", "NLC")


@register_notrace_function
def at_least(x: Tensor, side: int) -> Tensor:
    """The map [B, C, H, W], with zeros after its end on an axis shorter than ``side``."""
    height, width = x.shape[2], x.shape[3]
    if height >= side and width >= side:
        return x
    return F.pad(x, [0, max(0, side - width), 0, max(0, side - height)])


@register_notrace_function
def position_embedding(table: Tensor, size: tuple[int, int], height: int, width: int, prefix: int) -> Tensor:
    """The table [1, P + N, C] of a grid of ``size``, resampled (bicubic, antialiased) to ``height`` by ``width``."""
    fixed = True
    if not torch.jit.is_scripting():
        # While a graph is exported for any size the numbers are symbols, of which nothing must be asked.
        fixed = type(height) is int and type(width) is int
    if fixed and height == size[0] and width == size[1]:
        return table
    return resample_abs_pos_embed(table, [height, width], [size[0], size[1]], num_prefix_tokens=prefix)


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
        x = self.proj(to_channels_last(at_least(x, self.patch_size)))
        return self.norm(x.permute(0, 2, 3, 1))


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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_chans, dim, patch_size, img_size, norm, 0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H', W'] to a grid [B, H, W, C]."""
        x = self.patches(x)
        if self.pos_embed is not None:
            height, width = x.shape[1], x.shape[2]
            table = position_embedding(self.pos_embed, self.grid_size, height, width, 0)
            x = x + table.unflatten(1, [height, width])
        return x


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


class TokenHead(nn.Module):
    """Pooling of tokens [B, P + N, C], dropout and a linear classifier.

    Args:
        in_features: Channels.
        num_classes: Number of classes; 0 leaves the classifier out.
        pool_type: ``"token"`` takes the first prefix token; ``"avg"``, ``"max"`` and their mean ``"avgmax"`` pool the
            others; ``""`` pools nothing.
        num_prefix_tokens: P.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: If ``pool_type`` is not one of those.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "token",
        num_prefix_tokens: int = 1,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.pool_type = pool_type
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, in_features, device=device, dtype=dtype)

    @torch.jit.ignore
    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """Replace the classifier, and the pooling if ``pool_type`` is given. Arguments as of the class."""
        pool_type = self.pool_type if pool_type is None else pool_type
        if pool_type not in POOLS:
            raise ValueError(f"global_pool is {pool_type!r}; allowed are {', '.join(map(repr, POOLS))}")
        self.pool_type = pool_type
        self.num_features = self.num_features if in_features is None else in_features
        dd = get_device_dtype(self, device=device, dtype=dtype)
        self.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(global_pool_nlc(x, self.pool_type, self.num_prefix_tokens))
        return x if pre_logits else self.fc(x)


class Isotropic(Backbone):
    """A backbone whose blocks pass a grid of patches [B, H, W, C] of one size.

    Every block is a feature map. ``forward_features`` gives the grid itself, as timm's other networks with
    ``output_fmt`` NHWC do.

    Args:
        stem: ``PatchEmbed``.
        blocks: Modules from grid to grid, applied in order.
        head: timm classifier head that takes the grid (``input_fmt="NHWC"``).
        norm: Final norm, on the last axis.
        num_classes: Number of classes the head was built for; 0 for none.
        in_chans: Input channels the stem was built for.
    """

    norm_fits_every_stage = True

    def __init__(
        self,
        stem: PatchEmbed,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        norm: nn.Module | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        dim, stride = stem.proj.out_channels, stem.patch_size
        info = [dict(num_chs=dim, reduction=stride, module=f"stages.{i}") for i in range(len(blocks))]
        super().__init__(stem, blocks, head, info, norm=norm, num_classes=num_classes, in_chans=in_chans)
        self.num_prefix_tokens = stem.num_prefix_tokens
        self.grad_checkpointing = False
        if self.num_prefix_tokens == 0:
            self.output_fmt = "NHWC"

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that sort parameters by depth, for layer-wise learning-rate decay."""
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to keep from weight decay beyond biases and one-dimensional ones, which timm exempts."""
        embeddings = ("pos_embed", "prefix_tokens")
        return {f"stem.{name}" for name, _ in self.stem.named_parameters() if name in embeddings}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resample the position embedding for good. Not needed to run on another size, only faster.

        Args:
            img_size: Side, or height and width, of the images to come.

        Raises:
            ValueError: If ``img_size`` is smaller than a patch.
        """
        self.stem.set_input_size(img_size)
        update_model_input_size(self, img_size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """The final features together with the maps of chosen blocks.

        Args:
            x: Images. [B, in_chans, H', W']
            indices: Blocks to return: the last n if an int, those listed otherwise (negative counts from the end),
                all if None.
            return_prefix_tokens: Return pairs of map and prefix tokens [B, P, C], if the network has such tokens.
            norm: Apply the final norm to every map.
            stop_early: Do not run blocks after the last one wanted.
            output_fmt: ``"NCHW"``, ``"NHWC"`` or ``"NLC"``.
            intermediates_only: Return only the list.

        Returns:
            ``(features, maps)``, where ``features`` equals ``forward_features(x)`` if the last block ran.

        Raises:
            ValueError: If ``output_fmt`` is none of the three.
        """
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed are {', '.join(map(repr, FORMATS))}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        taps = []
        x, *size = self._embed(x)
        for i, block in enumerate(self.stages):
            if stop_early and i > max_index:
                break
            x = checkpoint(block, x, *size) if self.grad_checkpointing else block(x, *size)
            if i in take_indices:
                y = self.norm(x) if norm else x
                grid, prefix = self._split(y, *size)
                y = {"NHWC": grid, "NLC": grid.flatten(1, 2), "NCHW": grid.permute(0, 3, 1, 2)}[output_fmt]
                taps.append((y, prefix) if return_prefix_tokens and self.num_prefix_tokens else y)
            if i == last:
                x = self.norm(x)
        return taps if intermediates_only else (x, taps)

    @torch.jit.unused
    def _embed(self, x: Tensor) -> tuple:
        """The first activation and what every block gets beside it."""
        return (self.stem(x),)

    @torch.jit.unused
    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """An activation as grid [B, H, W, C] and prefix tokens [B, P, C]."""
        return x, None

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H', W'] to unpooled features [B, H, W, num_features]."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x)
        else:
            x = self.stages(x)
        return self.norm(x)


class PrefixIsotropic(Isotropic):
    """A backbone whose blocks pass tokens [B, P + N, C], of which the first P belong to no place.

    Args:
        stem: ``PrefixPatchEmbed``.
        blocks: Called as ``block(tokens, size)`` with the grid's (H, W), giving tokens, applied in order.
        head: ``TokenHead``.
        norm: Final norm, on the last axis.
        num_classes: Number of classes the head was built for; 0 for none.
        in_chans: Input channels the stem was built for.
    """

    def __init__(
        self,
        stem: PrefixPatchEmbed,
        blocks: Sequence[nn.Module],
        head: TokenHead,
        norm: nn.Module | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(stem, blocks, head, norm=norm, num_classes=num_classes, in_chans=in_chans)
        self.stages = nn.ModuleList(self.stages)  # TorchScript compiles the forward of a Sequential: one argument

    @torch.jit.unused
    def _embed(self, x: Tensor) -> tuple:
        return self.stem(x)

    @torch.jit.unused
    def _split(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        return x[:, self.num_prefix_tokens :].unflatten(1, size), x[:, : self.num_prefix_tokens]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H', W'] to unpooled features [B, P + N, num_features]."""
        x, size = self.stem(x)
        for block in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, size)
            else:
                x = block(x, size)
        return self.norm(x)


def resize_position_embedding(
    state_dict: dict[str, Tensor], model: Isotropic, name: str = "stem.pos_embed"
) -> dict[str, Tensor]:
    """Fit the position embedding of a checkpoint to the image size a model was built for.

    Args:
        state_dict: Parameters by our names; returned as it is where nothing has to change.
        model: The model they are for.
        name: Of the table. Its patches are taken to form a square where their number differs.
    """
    table, stem = state_dict.get(name), model.stem
    if table is None or stem.pos_embed is None or table.shape == stem.pos_embed.shape:
        return state_dict
    prefix = stem.num_prefix_tokens
    resized = resample_abs_pos_embed(table, list(stem.grid_size), num_prefix_tokens=prefix)
    return {**state_dict, name: resized}
