"""The hosts PVT and PVTv2: four stages of spatial-reduction attention or any other mixer.

Papers: "Pyramid Vision Transformer", Wang et al. 2021, arXiv 2102.12122; "PVT v2: Improved Baselines with Pyramid
Vision Transformer", Wang et al. 2021, arXiv 2106.13797.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionattn.attention import SpatialReductionAttention
from visionattn.attention.mixer import MixerLike
from visionattn.frames.backbone import Pyramid, Stage
from visionattn.hosts.parts import Block, Host, MixerArgs, StridedConv, mixers, norm_factory
from visionattn.layers.blocks import DepthwiseConv, Linear, Mlp, Unused, activated, in_slices, resize_table
from visionattn.layers.tracing import opaque

__all__ = ["PVT", "PVTv2"]

EPS = 1e-6  # of the layer norms of blocks
PATCH_EPS = 1e-5


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
        x = self.project(x)
        return x + resize_table(self.pos_embed.permute(0, 3, 1, 2), x.shape[2], x.shape[3], "bilinear")


class ConvMlp(nn.Module):
    """``fc2(gelu(dwconv(fc1(x))))`` with a depthwise 3x3 in the middle, on [B, H, W, dim]."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.hidden = hidden
        self.fc1 = Linear(dim, hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._mlp(x)
        else:
            return self._sliced(x)

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(self.dwconv(x)) if torch.jit.is_scripting() else activated(self.dwconv, self.act, x)
        return self.drop(self.fc2(self.drop(x)))

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mlp, x, self.hidden, x.shape[-1])


class PVT(Host, Pyramid):
    """PVT with any mixer in any of its blocks (Wang et al. 2021, arXiv 2102.12122).

    Args:
        img_size: Height and width that tables of positions are made for; images of other sizes are allowed.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
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
    release_rules = (
        (r"^pos_embed(\d)$", r"patch_embed\1.pos_embed"),
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
        global_pool: str = "avg",
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
        norm = norm_factory(norm_layer, EPS, norm_args)
        patch_norm = norm_factory(norm_layer, PATCH_EPS if norm_layer == "layernorm" else EPS, norm_args)
        made = mixers(mixer, mixer_depths, mixer_args, depths, told=("input_size",))
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        mlp_class = ConvMlp if self.overlapping else Mlp
        size = to_2tuple(img_size)
        stages, stem = [], nn.Identity()
        for i, (dim, heads, ratio, sr) in enumerate(zip(embed_dims, num_heads, mlp_ratios, sr_ratios, strict=True)):
            source, stride = (in_chans, 4) if i == 0 else (embed_dims[i - 1], 2)
            if self.overlapping:
                side = 2 * stride - 1
                embed = StridedConv(source, dim, side, stride, side // 2, norm=patch_norm, **dd)
            else:
                embed = PositionedPatches(source, dim, stride, size, patch_norm, **dd)
            size = embed.out_size(size)
            blocks = []
            for make, rate in zip(made[i], rates[i], strict=True):
                if make is None:
                    attn = SpatialReductionAttention(dim, heads, sr, norm=norm, **dd)
                else:
                    attn = make(dim, heads, input_size=size, **dd)
                blocks.append(
                    Block(dim, attn, mlp_class(dim, int(dim * ratio), proj_drop_rate, **dd), norm, rate, **dd)
                )
            stem, downsample = (embed, nn.Identity()) if i == 0 else (stem, embed)
            stage_norm = norm(dim, nchw=True, **dd) if self.overlapping else None
            stages.append(Stage(downsample, blocks, stage_norm, nhwc=True))
        last = embed_dims[-1]
        super().__init__(
            stem=stem,
            stages=stages,
            head=ClassifierHead(last, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=embed_dims,
            strides=[4 * 2**i for i in range(len(embed_dims))],
            norm=Unused(dict(weight=(last,), bias=(last,)), **dd) if unused_norm else None,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()


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
