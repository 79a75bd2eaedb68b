"""The hosts PVT and PVTv2: four stages of spatial-reduction attention or any other mixer, a class token for the last.

Papers: "Pyramid Vision Transformer", Wang et al. 2021, arXiv 2102.12122; "PVT v2: Improved Baselines with Pyramid
Vision Transformer", Wang et al. 2021, arXiv 2106.13797.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from visionattn.attention import SpatialReductionAttention
from visionattn.attention.mixer import MixerLike
from visionattn.attention.softmax import SoftmaxMixer
from visionattn.frames.backbone import Pyramid, Stage
from visionattn.frames.isotropic import TokenHead
from visionattn.hosts.parts import Block, Host, MixerArgs, StridedConv, TokenBlock, mixers, norm_factory
from visionattn.layers.blocks import DepthwiseMlp, Mlp, Unused, resize_table
from visionattn.layers.checks import check_images
from visionattn.layers.tracing import opaque

__all__ = ["PVT", "ClassTokenPVT", "PVTv2"]

EPS = 1e-6  # of the layer norms of blocks
OUTER_EPS = 1e-5  # of those of patches and of reduced maps


@opaque  # whether it resizes depends on the size of the map
class PositionedPatches(StridedConv):
    """Patches side by side, norm, and an embedding of positions that is resized bilinearly to other maps."""

    def __init__(self, in_chans: int, dim: int, side: int, img_size: tuple[int, int], norm, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, dim, side, side, norm=norm, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, *self.out_size(img_size), dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.positioned(x)

    def positioned(self, x: Tensor) -> Tensor:
        """Patches with their positions. [B, dim, H, W]"""
        x = self.project(x)
        return x + resize_table(self.pos_embed.permute(0, 3, 1, 2), x.shape[2], x.shape[3], "bilinear")


class TokenPatches(PositionedPatches):
    """``PositionedPatches`` behind a class token, as tokens [B, 1 + H * W, dim] and the size (H, W) of their map."""

    def __init__(self, in_chans: int, dim: int, side: int, img_size: tuple[int, int], norm, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, dim, side, img_size, norm, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.cls_embed = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.positioned(x)
        token = (self.cls_token + self.cls_embed).expand(x.shape[0], -1, -1)
        return torch.cat([token, x.flatten(2).transpose(1, 2)], 1), (x.shape[2], x.shape[3])


class TokenStage(nn.Module):
    """A ``Stage`` whose blocks get a class token before the map; it gives the tokens and the size of their map.

    Args:
        downsample: ``TokenPatches``.
        blocks: Called as ``block(tokens, size)``, applied in order; this is where gradient checkpointing cuts.
    """

    def __init__(self, downsample: TokenPatches, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, size = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, size)
            else:
                x = block(x, size)
        return x, size


class PVT(Host, Pyramid):
    """PVT with any mixer in any of its blocks (Wang et al. 2021, arXiv 2102.12122).

    Args:
        img_size: Height and width that tables of positions are made for; images of other sizes are allowed.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none. None: ``"token"`` if there is a class token, else
            ``"avg"``.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratios: Hidden over outer width of the MLPs of each stage.
        sr_ratios: By how much blocks without a mixer reduce their keys, by stage.
        mixer: What takes the place of spatial-reduction attention: a ``Mixer`` or its class path. None: nothing.
        mixer_depths: How many blocks of each stage have the mixer, from the first; None for all.
        mixer_args: Arguments of the mixer, for all stages or one mapping a stage.
        norm_layer: ``"layernorm"``, ``"prepbn"`` or ``"repbn"``.
        norm_args: Arguments of the norm, such as ``total_step``.
        unused_norm: Hold the final norm of FLatten's PVT, which its forward pass leaves out.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If an argument is not one of the allowed, or lengths differ.
    """

    overlapping = False  # patches; PVTv2 has convolutions that overlap, and norms at the end of each stage
    class_token = False  # of the last stage; ``ClassTokenPVT`` has one
    release_rules = (
        (r"^pos_embed(\d)$", r"patch_embed\1.pos_embed"),
        (r"^cls_token$", "patch_embed4.cls_token"),
        (r"^patch_embed1\.", "stem."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
    )

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mixer: MixerLike | None = None,
        mixer_depths: Sequence[int | None] | None = None,
        mixer_args: MixerArgs | None = None,
        norm_layer: str = "layernorm",
        norm_args: Mapping[str, object] | None = None,
        unused_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if self.class_token and (len(depths) < 2 or sr_ratios[-1] != 1 or unused_norm):
            raise ValueError(
                "a class token needs two stages or more, sr_ratios that end in 1 and unused_norm=False, got "
                f"{len(depths)} stages, sr_ratios {tuple(sr_ratios)} and unused_norm={unused_norm}"
            )
        if global_pool is None:
            global_pool = "token" if self.class_token else "avg"
        norm = norm_factory(norm_layer, EPS, norm_args)
        outer_norm = norm_factory(norm_layer, OUTER_EPS if norm_layer == "layernorm" else EPS, norm_args)
        told = ("input_size", "num_prefix_tokens") if self.class_token else ("input_size",)
        made = mixers(mixer, mixer_depths, mixer_args, depths, told)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        mlp_class = DepthwiseMlp if self.overlapping else Mlp
        size = to_2tuple(img_size)
        stages, stem = [], nn.Identity()
        for i, (dim, heads, ratio, sr) in enumerate(zip(embed_dims, num_heads, mlp_ratios, sr_ratios, strict=True)):
            source, stride = (in_chans, 4) if i == 0 else (embed_dims[i - 1], 2)
            tokens = self.class_token and i == len(embed_dims) - 1
            if self.overlapping:
                side = 2 * stride - 1
                embed = StridedConv(source, dim, side, stride, side // 2, norm=outer_norm, **dd)
            else:
                patches = TokenPatches if tokens else PositionedPatches
                embed = patches(source, dim, stride, size, outer_norm, **dd)
            size = embed.out_size(size)
            blocks = []
            for make, rate in zip(made[i], rates[i], strict=True):
                if tokens:
                    attn = (make or SoftmaxMixer)(dim, heads, input_size=size, num_prefix_tokens=1, **dd)
                elif make is None:
                    attn = SpatialReductionAttention(dim, heads, sr, norm=outer_norm, **dd)
                else:
                    attn = make(dim, heads, input_size=size, **dd)
                mlp = mlp_class(dim, int(dim * ratio), proj_drop_rate, **dd)
                blocks.append((TokenBlock if tokens else Block)(dim, attn, mlp, norm, rate, **dd))
            stem, downsample = (embed, nn.Identity()) if i == 0 else (stem, embed)
            stage_norm = norm(dim, nchw=True, **dd) if self.overlapping else None
            stages.append(
                TokenStage(downsample, blocks) if tokens else Stage(downsample, blocks, stage_norm, nhwc=True)
            )
        last = embed_dims[-1]
        final_norm = Unused(dict(weight=(last,), bias=(last,)), **dd) if unused_norm else None
        if self.class_token:
            head = TokenHead(last, num_classes, global_pool, 1, drop_rate, **dd)
            final_norm = norm(last, **dd)
        else:
            head = ClassifierHead(last, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        super().__init__(
            stem=stem,
            stages=stages,
            head=head,
            widths=embed_dims,
            strides=[4 * 2**i for i in range(len(embed_dims))],
            norm=final_norm,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()


class ClassTokenPVT(PVT):
    """``PVT`` as published: a class token joins the map in the last stage, and is what is classified.

    The last stage gives tokens, so maps of features come from ``forward_intermediates`` and timm's wrapper that calls
    it. ``forward_features`` gives the tokens [B, 1 + H * W, C], the class token first.

    Args: those of ``PVT``, with mixers that take ``num_prefix_tokens``. ``global_pool`` is ``"token"`` for the class
        token, ``"avg"``, ``"max"`` or ``"avgmax"`` for the others, or ``""`` for no pooling.

    Raises:
        ValueError: As ``PVT``, and if there is but one stage, the last one reduces its map, or ``unused_norm`` is asked
            for.
    """

    class_token = True
    num_prefix_tokens = 1
    feature_cls = "getter"

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token, as the authors have it."""
        return {name for name, _ in self.named_parameters() if name.endswith(".cls_token")}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H', W'] to unpooled features [B, 1 + N, num_features], or a map if stages were cut."""
        if not torch.jit.is_scripting():
            check_images(x)
        x = self.stages(self.stem(x))
        if isinstance(x, Tensor):
            return self.norm(x)
        else:
            return self.norm(x[0])

    @torch.jit.unused
    def normed(self, x: Any) -> Any:
        return self.norm(x) if isinstance(x, Tensor) else (self.norm(x[0]), x[1])

    @torch.jit.unused
    def features(self, x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else x[0]

    @torch.jit.unused
    def feature_map(self, x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else x[0][:, 1:].unflatten(1, x[1]).permute(0, 3, 1, 2)


class PVTv2(PVT):
    """PVTv2 with any mixer in any of its blocks (Wang et al. 2021, arXiv 2106.13797). Arguments as of ``PVT``."""

    overlapping = True

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal linear layers, fan-out normal convolutions."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                nn.init.zeros_(module.bias)
