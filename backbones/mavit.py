"""MAViT: the network of RAVLT with magnitude-aware linear attention and a wider head.

Paper: "Rectifying Magnitude Neglect in Linear Attention", Fan, Huang, Ai, He, ICCV 2025, arXiv 2507.00698.
Original code: qhfan/MALA (no licence stated). See ``ravlt.py`` for what differs from it. A checkpoint tells the two
families apart by the width of the head alone, so each has its own names.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.backbones.ravlt import BASE, LARGE, RAVLT, SMALL, TINY, checkpoint_filter_fn, create
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

declare_filter("mavit", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("mavit", first_conv="stem.proj.0", classifier="head.fc"))

MALA = dict(mixers=("mala", "mala", "softmax", "softmax"), head_width=2048)


@register_model
def mavit_t(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("mavit_t", pretrained, **dict(TINY | MALA, **kwargs))


@register_model
def mavit_s(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("mavit_s", pretrained, **dict(SMALL | MALA, **kwargs))


@register_model
def mavit_b(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("mavit_b", pretrained, **dict(BASE | MALA, **kwargs))


@register_model
def mavit_l(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("mavit_l", pretrained, **dict(LARGE | MALA | dict(head_width=2560), **kwargs))
