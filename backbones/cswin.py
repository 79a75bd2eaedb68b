"""CSWin as its authors publish it: the host CSwin with cross-shaped attention in every block.

Paper: "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", Dong, Bao, Chen, Zhang, Yu,
Yuan, Chen, Guo, CVPR 2022, arXiv 2107.00652. Original code: microsoft/CSWin-Transformer (MIT). Same computation; maps
that stripes do not divide are padded, where the authors' code stops.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import CSwin
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

TINY = dict(embed_dim=64, depths=(1, 2, 21, 1), num_heads=(2, 4, 8, 16))
SMALL = dict(embed_dim=64, depths=(2, 4, 32, 2), num_heads=(2, 4, 8, 16))
BASE = dict(embed_dim=96, depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32))
LARGE = dict(embed_dim=144, depths=(2, 4, 32, 2), num_heads=(6, 12, 24, 24))
SIZE_384 = dict(img_size=384, split_sizes=(1, 2, 12, 12))

declare_filter("cswin", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("cswin", first_conv="stem.proj", classifier="head.fc"))


@register_model
def cswin_tiny_224(pretrained: bool = False, **kwargs) -> CSwin:
    return build_backbone(CSwin, "cswin_tiny_224", pretrained, **TINY | kwargs)


@register_model
def cswin_small_224(pretrained: bool = False, **kwargs) -> CSwin:
    return build_backbone(CSwin, "cswin_small_224", pretrained, **SMALL | kwargs)


@register_model
def cswin_base_224(pretrained: bool = False, **kwargs) -> CSwin:
    return build_backbone(CSwin, "cswin_base_224", pretrained, **BASE | kwargs)


@register_model
def cswin_base_384(pretrained: bool = False, **kwargs) -> CSwin:
    return build_backbone(CSwin, "cswin_base_384", pretrained, **BASE | SIZE_384 | kwargs)


@register_model
def cswin_large_224(pretrained: bool = False, **kwargs) -> CSwin:
    return build_backbone(CSwin, "cswin_large_224", pretrained, **LARGE | kwargs)


@register_model
def cswin_large_384(pretrained: bool = False, **kwargs) -> CSwin:
    return build_backbone(CSwin, "cswin_large_384", pretrained, **LARGE | SIZE_384 | kwargs)
