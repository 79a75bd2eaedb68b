"""PVT, the first version, as its authors publish it: the host PVT with a class token in the last stage.

Paper: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", Wang, Xie, Li, Fan,
Song, Liang, Lu, Luo, Shao, ICCV 2021, arXiv 2102.12122. Original code: whai362/PVT (Apache-2.0). Same computation; the
embedding of positions is resampled whenever the map has another size, where the authors' code fails for stage 2 at
448 px.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import ClassTokenPVT
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

declare_filter("pvt", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("pvt", first_conv="stem.proj", classifier="head.fc"))


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> ClassTokenPVT:
    return build_backbone(ClassTokenPVT, "pvt_tiny", pretrained, **dict(depths=(2, 2, 2, 2)) | kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> ClassTokenPVT:
    return build_backbone(ClassTokenPVT, "pvt_small", pretrained, **dict(depths=(3, 4, 6, 3)) | kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> ClassTokenPVT:
    return build_backbone(ClassTokenPVT, "pvt_medium", pretrained, **dict(depths=(3, 4, 18, 3)) | kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs) -> ClassTokenPVT:
    return build_backbone(ClassTokenPVT, "pvt_large", pretrained, **dict(depths=(3, 8, 27, 3)) | kwargs)
