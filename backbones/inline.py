"""InLine attention in the hosts DeiT, PVT, Swin and CSwin.

Paper: "Bridging the Divide: Reconsidering Softmax and Linear Attention", Han, Pu, Xia, Han, Pan, Li, Lu, Song, Huang,
NeurIPS 2024, arXiv 2412.06590. Original code: LeapLabTHU/InLine (no licence stated). Same computation; nothing in an
InLine layer depends on the size of the map.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import PVT, CSwin, DeiT, Swin
from visionattn.hosts.parts import Host
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

INLINE = dict(mixer="visionattn.attention.InLineAttention")
DEIT_T = dict(INLINE, embed_dim=192, num_heads=6)
DEIT_S = dict(INLINE, embed_dim=320, num_heads=10, img_size=288)
DEIT_B = dict(INLINE, embed_dim=384, num_heads=12, img_size=448)
PVT_T = dict(INLINE, depths=(2, 2, 2, 2), num_heads=(2, 4, 10, 16))
PVT_S = dict(INLINE, depths=(3, 4, 6, 3), num_heads=(2, 4, 10, 16))
PVT_M = dict(INLINE, depths=(3, 4, 18, 3), num_heads=(2, 4, 10, 16))
PVT_L = dict(INLINE, depths=(3, 8, 27, 3), num_heads=(2, 4, 10, 16))
SWIN_T = dict(INLINE, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, None, 0))
SWIN_S = dict(INLINE, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, 0, 0))
SWIN_B = dict(INLINE, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 2, 0))
CSWIN_T = dict(INLINE, embed_dim=64, depths=(2, 4, 18, 1), num_heads=(2, 4, 8, 16), mixer_depths=(None, None, 0, 0))
CSWIN_S = dict(INLINE, embed_dim=64, depths=(3, 6, 29, 2), num_heads=(2, 4, 8, 16), mixer_depths=(None, None, 0, 0))
CSWIN_B = dict(INLINE, embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 0, 0))

declare_filter("inline", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("inline", first_conv="stem.proj", classifier="head.fc"))


def _create(cls: type[Host], variant: str, pretrained: bool, model_args: dict, **kwargs) -> Host:
    return build_backbone(cls, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def inline_deit_t(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "inline_deit_t", pretrained, DEIT_T, **kwargs)


@register_model
def inline_deit_s(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "inline_deit_s", pretrained, DEIT_S, **kwargs)


@register_model
def inline_deit_b(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "inline_deit_b", pretrained, DEIT_B, **kwargs)


@register_model
def inline_pvt_t(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "inline_pvt_t", pretrained, PVT_T, **kwargs)


@register_model
def inline_pvt_s(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "inline_pvt_s", pretrained, PVT_S, **kwargs)


@register_model
def inline_pvt_m(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "inline_pvt_m", pretrained, PVT_M, **kwargs)


@register_model
def inline_pvt_l(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "inline_pvt_l", pretrained, PVT_L, **kwargs)


@register_model
def inline_swin_t(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "inline_swin_t", pretrained, SWIN_T, **kwargs)


@register_model
def inline_swin_s(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "inline_swin_s", pretrained, SWIN_S, **kwargs)


@register_model
def inline_swin_b(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "inline_swin_b", pretrained, SWIN_B, **kwargs)


@register_model
def inline_swin_b_384(pretrained: bool = False, **kwargs) -> Swin:
    model_args = dict(SWIN_B, img_size=384, window_size=12)
    return _create(Swin, "inline_swin_b_384", pretrained, model_args, **kwargs)


@register_model
def inline_cswin_t(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "inline_cswin_t", pretrained, CSWIN_T, **kwargs)


@register_model
def inline_cswin_s(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "inline_cswin_s", pretrained, CSWIN_S, **kwargs)


@register_model
def inline_cswin_b(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "inline_cswin_b", pretrained, CSWIN_B, **kwargs)


@register_model
def inline_cswin_b_384(pretrained: bool = False, **kwargs) -> CSwin:
    model_args = dict(CSWIN_B, img_size=384, split_sizes=(1, 2, 12, 12))
    return _create(CSwin, "inline_cswin_b_384", pretrained, model_args, **kwargs)
