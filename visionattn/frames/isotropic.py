"""Backbones of a single resolution, as ViT: one patch embedding, then blocks that keep the size of the map.

B batch, H W rows and columns of the grid of patches, N = H * W, P prefix tokens, C channels.
"""

from collections.abc import Sequence

import torch
from timm.layers import get_device_dtype, global_pool_nlc
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from visionattn.frames.backbone import Backbone, feature_take_indices, update_model_input_size
from visionattn.layers.checks import check_images
from visionattn.layers.patch_embed import PatchEmbed, PrefixPatchEmbed

__all__ = ["Isotropic", "PrefixIsotropic", "TokenHead"]

POOLS = ("token", "avg", "max", "avgmax", "")
FORMATS = ("NCHW", "NHWC", "NLC")


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
    feature_cls = "getter"

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
        check_images(x)
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
        if not torch.jit.is_scripting():
            check_images(x)
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
        if not torch.jit.is_scripting():
            check_images(x)
        x, size = self.stem(x)
        for block in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, size)
            else:
                x = block(x, size)
        return self.norm(x)
