"""DiNAT and DiNAT_s: NAT whose every other block dilates its neighborhood until it spans the map.

Paper: "Dilated Neighborhood Attention Transformer", Hassani, Shi, 2022, arXiv 2209.15001.
Original code: SHI-Labs/Neighborhood-Attention-Transformer (MIT). DiNAT is NAT with dilations; DiNAT_s has the same
blocks between Swin's patch embedding and patch merging.
"""

from functools import partial

from timm.models import generate_default_cfgs, register_model

from visionattn.backbones.nat import EPS, NAT, checkpoint_filter_fn, create
from visionattn.hosts.parts import StridedConv, norm_factory
from visionattn.hosts.swin import PatchMerging
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["DiNAT", "DiNATs", "checkpoint_filter_fn"]

# For maps of 56, 28, 14 and 7 positions a side, and for 96, 48, 24 and 12: seven dilated steps span the map.
DILATIONS_224 = ((1, 8), (1, 4), (1, 2), (1,))
DILATIONS_384 = ((1, 13), (1, 6), (1, 3), (1,))


NORM = norm_factory("layernorm", EPS)


class DiNAT(NAT):
    """Dilated Neighborhood Attention Transformer (Hassani & Shi 2022, arXiv 2209.15001): NAT given ``dilations``."""


class DiNATs(NAT):
    """DiNAT in the layout of Swin (same paper): patch embedding and patch merging in place of convolutions."""

    tokenizer = staticmethod(partial(StridedConv, kernel_size=4, stride=4, whole=True, norm=NORM))
    downsampler = staticmethod(partial(PatchMerging, norm=NORM))


declare_filter("dinat", checkpoint_filter_fn)
declare_filter("dinat_s", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(
    pretrained_cfgs("dinat", first_conv="stem.proj.0", classifier="head.fc")
    | pretrained_cfgs("dinat_s", first_conv="stem.proj", classifier="head.fc")
)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> DiNAT:
    model_args = dict(
        embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, dilations=DILATIONS_224
    )
    return create(DiNAT, "dinat_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> DiNAT:
    model_args = dict(
        embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, dilations=DILATIONS_224
    )
    return create(DiNAT, "dinat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> DiNAT:
    # No layer scale, unlike nat_small: so are the checkpoints.
    model_args = dict(
        embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, dilations=DILATIONS_224
    )
    return create(DiNAT, "dinat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> DiNAT:
    model_args = dict(
        embed_dim=128,
        depths=(3, 4, 18, 5),
        num_heads=(4, 8, 16, 32),
        mlp_ratio=2.0,
        layer_scale=1e-5,
        dilations=DILATIONS_224,
    )
    return create(DiNAT, "dinat_base", pretrained, **dict(model_args, **kwargs))


LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> DiNAT:
    model_args = dict(LARGE, dilations=DILATIONS_224)
    return create(DiNAT, "dinat_large", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> DiNAT:
    model_args = dict(LARGE, dilations=DILATIONS_384)
    return create(DiNAT, "dinat_large_384", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> DiNAT:
    model_args = dict(LARGE, kernel_size=11, dilations=DILATIONS_224)  # eleven steps of 8, 4, 2 and 1 span 384 px
    return create(DiNAT, "dinat_large_384_11x11", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> DiNATs:
    model_args = dict(
        embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0, dilations=DILATIONS_224
    )
    return create(DiNATs, "dinat_s_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> DiNATs:
    model_args = dict(
        embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0, dilations=DILATIONS_224
    )
    return create(DiNATs, "dinat_s_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> DiNATs:
    model_args = dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mlp_ratio=4.0, dilations=DILATIONS_224
    )
    return create(DiNATs, "dinat_s_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> DiNATs:
    model_args = dict(
        embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4.0, dilations=DILATIONS_224
    )
    return create(DiNATs, "dinat_s_large", pretrained, **dict(model_args, **kwargs))


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> DiNATs:
    model_args = dict(
        embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4.0, dilations=DILATIONS_384
    )
    return create(DiNATs, "dinat_s_large_384", pretrained, **dict(model_args, **kwargs))
