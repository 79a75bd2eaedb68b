"""TransNeXt: aggregated attention in the first three stages of a pyramid, attention to all positions in the last.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", Shi, CVPR 2024, arXiv 2311.17132. Original
code: DaiShiResearch/TransNeXt (Apache-2.0). Same computation; other sizes than the authors' classifier was built for
are computed as if it had been built for them, which its dense backbone calls extrapolation.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import AggregatedAttention, LengthScaledAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone
from visionattn.hosts.parts import Block, StridedConv, norm_factory
from visionattn.layers.blocks import DepthwiseConv, Linear, in_slices
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint

__all__ = ["TransNeXt"]

EPS = 1e-6  # of the norms of blocks and stages
PATCH_EPS = 1e-5
UNDECAYED = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")


class ConvGLU(nn.Module):
    """``fc2(gelu(dwconv(a)) * b)`` with ``a, b = fc1(x)``, the depthwise convolution 3x3, on [B, H, W, dim].

    Args:
        dim: Channels in and out.
        hidden: Channels of ``a`` and of ``b``.
        drop: Dropout of the product and of the result.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.hidden = hidden
        self.fc1 = Linear(dim, 2 * hidden, **dd)
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
        a, b = self.fc1(x).chunk(2, -1)
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(a)) * b)))

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mlp, x, 2 * self.hidden, x.shape[-1])


class TransNeXt(Pyramid):
    """TransNeXt (Shi 2023, arXiv 2311.17132).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        pretrain_size: Side of the images that distances are measured by, whatever the size of those to come.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratios: Of each stage: hidden over outer width of an MLP, of which the gated one has two thirds.
        sr_ratios: Reduction of the pooled map in each stage; the last is that of a stage with aggregated attention.
        aggregated: Whether the last stage has aggregated attention, too.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If an argument is not one of the allowed, or lengths differ.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        pretrain_size: int = 224,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        aggregated: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norm, patch_norm = norm_factory("layernorm", EPS), norm_factory("layernorm", PATCH_EPS)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages, stem = [], nn.Identity()
        for i, (dim, heads, ratio, sr) in enumerate(zip(embed_dims, num_heads, mlp_ratios, sr_ratios, strict=True)):
            side = pretrain_size // (4 << i)
            blocks = []
            for rate in rates[i]:
                if i < len(embed_dims) - 1 or aggregated:
                    attn = AggregatedAttention(dim, heads, sr, side, **dd)
                else:
                    attn = LengthScaledAttention(dim, heads, side, **dd)
                mlp = ConvGLU(dim, int(2 * int(dim * ratio) / 3), proj_drop_rate, **dd)
                blocks.append(Block(dim, attn, mlp, norm, rate, **dd))
            if i == 0:
                stem, downsample = StridedConv(in_chans, dim, 7, 4, 3, norm=patch_norm, **dd), nn.Identity()
            else:
                downsample = StridedConv(embed_dims[i - 1], dim, 3, 2, 1, norm=patch_norm, **dd)
            stages.append(Stage(downsample, blocks, norm(dim, nchw=True, **dd), nhwc=True))
        super().__init__(
            stem=stem,
            stages=stages,
            head=ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=embed_dims,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal linear layers, fan-out normal convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, temperatures and the learned query, as the authors have it."""
        return {name for name, _ in self.named_parameters() if any(part in name for part in UNDECAYED)}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' classifiers and dense backbones; their tables are computed here."""
    rules = (
        (r"(^|\.)(relative_pos_index|relative_coords_table)\d+$|(^|\.)(seq_length_scale|padding_mask)$", None),
        (r"^patch_embed1\.", "stem."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^head\.", "head.fc."),
    )
    return rename_checkpoint(state_dict, rules)


MICRO = dict(embed_dims=(48, 96, 192, 384), depths=(2, 2, 15, 2), num_heads=(2, 4, 8, 16))
TINY = dict(embed_dims=(72, 144, 288, 576), depths=(2, 2, 15, 2), num_heads=(3, 6, 12, 24))
SMALL = dict(embed_dims=(72, 144, 288, 576), depths=(5, 5, 22, 5), num_heads=(3, 6, 12, 24))
BASE = dict(embed_dims=(96, 192, 384, 768), depths=(5, 5, 23, 5), num_heads=(4, 8, 16, 32))
AAAA = dict(MICRO, pretrain_size=256, sr_ratios=(16, 8, 4, 2), aggregated=True)

declare_filter("transnext", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("transnext", first_conv="stem.proj", classifier="head.fc"))


@register_model
def transnext_micro(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_micro", pretrained, **MICRO | kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_tiny", pretrained, **TINY | kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_small", pretrained, **SMALL | kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_base", pretrained, **BASE | kwargs)


@register_model
def transnext_small_384(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_small_384", pretrained, **SMALL | kwargs)


@register_model
def transnext_base_384(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_base_384", pretrained, **BASE | kwargs)


@register_model
def transnext_micro_aaaa_256(pretrained: bool = False, **kwargs) -> TransNeXt:
    return build_backbone(TransNeXt, "transnext_micro_aaaa_256", pretrained, **AAAA | kwargs)
