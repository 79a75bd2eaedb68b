"""The timm contract, written once: every backbone is a chain ``stem -> stages -> norm -> head``."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices  # private names of timm are imported in this file only
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from visionattn.frames.arguments import checked
from visionattn.kernels import keep_freed_memory
from visionattn.layers.checks import check_images
from visionattn.weights.pretrained import with_weights

__all__ = ["Backbone", "Pyramid", "Stage", "build_backbone", "feature_take_indices", "update_model_input_size"]


class Stage(nn.Module):
    """One resolution of a pyramid: downsample, blocks, norm.

    Args:
        downsample: Halves the map, or ``nn.Identity()`` where the stem already did the work.
        blocks: Applied in order; this is where gradient checkpointing cuts.
        norm: Norm in the main path at the end of the stage, if the family has one.
        nhwc: The blocks work on [B, H, W, C], a free view of the map; downsample and norm see [B, C, H, W].
    """

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None, nhwc: bool = False
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.nhwc = nhwc
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.nhwc:
            x = x.permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        if self.nhwc:
            x = x.permute(0, 3, 1, 2)
        return self.norm(x)


class Backbone(nn.Module):
    """Base of every model: what timm, its feature wrappers and their clients call on a network.

    The network is the chain ``stem -> stages[0] -> ... -> stages[-1] -> norm -> head``; every stage end is a feature
    map. Between stages activations are what the stages agree on; ``feature_map`` turns a stage's output into the
    [B, C, H, W] map handed to users, so a network that passes tokens overrides that one method.

    Args:
        stem: Image [B, in_chans, H, W] to the first activation.
        stages: Modules applied in order. A stage that supports gradient checkpointing has ``grad_checkpointing``.
        head: timm classifier head (``ClassifierHead`` or a relative): pools, drops out, classifies, and can ``reset``.
        feature_info: One ``dict(num_chs=, reduction=, module=)`` per stage.
        norm: Final norm between the last stage and the head, if the family has one.
        num_classes: Number of classes the head was built for; 0 for none.
        in_chans: Input channels the stem was built for.
    """

    norm_fits_every_stage = False
    feature_cls: str | None = None  # timm's wrapper for ``features_only``, if not that for stages that pass maps
    num_prefix_tokens = 0  # of ``forward_features``, before the positions of a map

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        head: nn.Module,
        feature_info: list[dict],
        norm: nn.Module | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        keep_freed_memory()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.feature_info = feature_info
        self.num_features = feature_info[-1]["num_chs"]
        self.head_hidden_size = head.num_features
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity() if norm is None else norm
        self.head = head

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that sort parameters by depth, for layer-wise learning-rate decay."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to keep from weight decay beyond biases and one-dimensional ones, which timm exempts."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer, ``nn.Identity`` if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes of the new one; 0 removes it.
            global_pool: ``"avg"``, ``"max"``, ... or ``""`` for unpooled maps; None keeps the present pooling.
        """
        self.num_classes = num_classes
        trainable = any(p.requires_grad for p in self.parameters())
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head.fc.requires_grad_(trainable)  # a frozen network stays frozen
        self.head_hidden_size = self.head.num_features

    def feature_map(self, x: Any) -> Tensor:
        """A stage's output as a map [B, C, H, W]."""
        return x

    def normed(self, x: Any) -> Any:
        """The last stage's output behind the final norm, in the same form."""
        return self.norm(x)

    def features(self, x: Any) -> Tensor:
        """What ``forward_features`` gives, of the last stage's output."""
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The final features together with the maps of chosen stages.

        Args:
            x: Images. [B, in_chans, H, W]
            indices: Stages to return: the last n if an int, those listed otherwise (negative counts from the end),
                all if None.
            norm: Apply the final norm to the last stage's map.
            stop_early: Do not run stages after the last one wanted.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Return only the list.

        Returns:
            ``(features, maps)``, where ``features`` equals ``forward_features(x)`` if the last stage ran.

        Raises:
            ValueError: If ``output_fmt`` is neither of the two.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed are 'NCHW' and 'NHWC'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        check_images(x)
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > max_index:
                break
            x = stage(x)
            if i == last and norm:
                x = self.normed(x)
            if i in take_indices:
                y = self.feature_map(x)
                intermediates.append(y if output_fmt == "NCHW" else y.permute(0, 2, 3, 1))
            if i == last and not norm:
                x = self.normed(x)
        if intermediates_only:
            return intermediates
        return self.features(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut away what the chosen stages' maps do not need.

        Args:
            indices: Stages to keep, as in ``forward_intermediates``.
            prune_norm: Remove the final norm too. One that fits the last stage alone goes whenever stages are cut.
            prune_head: Remove pooling and classifier too. They go in any case when stages are cut.

        Returns:
            The kept indices, counted from the start.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or (cut and not self.norm_fits_every_stage):
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to unpooled features [B, num_features, H', W'].

        Raises:
            ValueError: If ``x`` is no tensor of images.
        """
        if not torch.jit.is_scripting():
            check_images(x)
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Unpooled features to logits [B, num_classes], or to the pooled vector if ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Pyramid(Backbone):
    """A backbone whose stages pass maps [B, C, H, W] of halving resolution.

    Maps are channels_last in memory from the stem on, so that blocks which work on [B, H, W, C] see a contiguous
    tensor behind a free ``permute`` and convolutions run in the layout they are fastest in.

    Args:
        widths: Channels of each stage.
        strides: Reduction of each stage relative to the image.

    Raises:
        ValueError: If there is not one width for each stride.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        head: nn.Module,
        widths: Sequence[int],
        strides: Sequence[int] = (4, 8, 16, 32),
        norm: nn.Module | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        if len(widths) != len(strides):
            raise ValueError(f"a pyramid has one width for each of the strides {tuple(strides)}, got {tuple(widths)}")
        info = [
            dict(num_chs=width, reduction=stride, module=f"stages.{i}")
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        super().__init__(stem, stages, head, info, norm=norm, num_classes=num_classes, in_chans=in_chans)


def build_backbone(cls: type[Backbone], variant: str, pretrained: bool, **kwargs) -> Backbone:
    """Build a registered model as timm does.

    With ``features_only`` a pyramid gives the maps of its four stages. A network of one resolution gives those of its
    last four blocks if ``out_indices`` names no others, through timm's wrapper that calls ``forward_intermediates``:
    its blocks pass no maps [B, C, H, W] on.

    Args:
        cls: The model's class.
        variant: Its registered name, which finds its cfg and the function that renames its releases.
        pretrained: Whether to load the published weights.
        kwargs: Arguments of ``cls`` and of ``timm.models.build_model_with_cfg``.

    Raises:
        WeightsError: If the weights cannot be had, or do not fit.
    """
    filter_fn, kwargs = with_weights(variant, pretrained, kwargs)
    pyramid = issubclass(cls, Pyramid)
    features = dict(out_indices=(0, 1, 2, 3) if pyramid else 4)
    if cls.feature_cls is not None:
        features["feature_cls"] = cls.feature_cls
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(features, flatten_sequential=True),
        **kwargs,
    )
