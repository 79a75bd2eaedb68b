"""FLatten: focused linear attention in the hosts PVT, PVTv2, Swin and CSwin.

Paper: "FLatten Transformer: Vision Transformer using Focused Linear Attention", Han, Pan, Han, Song, Huang, ICCV 2023,
arXiv 2308.00442. Original code: LeapLabTHU/FLatten-Transformer (no licence stated). Same computation as after its
change of May 2024, which divides by means instead of sums.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import PVT, CSwin, PVTv2, Swin
from visionattn.hosts.parts import Host
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

FOCUSED = dict(mixer="visionattn.attention.FocusedLinearAttention")
PVT_T = dict(FOCUSED, depths=(2, 2, 2, 2), unused_norm=True)
PVT_S = dict(FOCUSED, depths=(3, 4, 6, 3), unused_norm=True)
PVT_M = dict(FOCUSED, depths=(3, 4, 18, 3), unused_norm=True)
PVT_L = dict(FOCUSED, depths=(3, 8, 27, 3), unused_norm=True)
V2_B0 = dict(FOCUSED, depths=(2, 2, 2, 2), embed_dims=(32, 64, 160, 256))
V2_B1 = dict(FOCUSED, depths=(2, 2, 2, 2))
V2_B2 = dict(FOCUSED, depths=(3, 4, 6, 3))
V2_B3 = dict(FOCUSED, depths=(3, 4, 18, 3))
V2_B4 = dict(FOCUSED, depths=(3, 8, 27, 3))
SWIN_T = dict(FOCUSED, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, 0, 0))
SWIN_S = dict(FOCUSED, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, 0, 0))
SWIN_B = dict(FOCUSED, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 0, 0))
CSWIN_T = dict(FOCUSED, embed_dim=64, depths=(2, 4, 18, 1), num_heads=(2, 4, 8, 16), mixer_depths=(None, None, 0, 0))
CSWIN_S = dict(FOCUSED, embed_dim=64, depths=(2, 4, 32, 2), num_heads=(2, 4, 8, 16), mixer_depths=(None, None, 0, 0))
CSWIN_B = dict(FOCUSED, embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 0, 0))

declare_filter("flatten", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("flatten", first_conv="stem.proj", classifier="head.fc"))


def _create(cls: type[Host], variant: str, pretrained: bool, model_args: dict, **kwargs) -> Host:
    return build_backbone(cls, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def flatten_pvt_t(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "flatten_pvt_t", pretrained, PVT_T, **kwargs)


@register_model
def flatten_pvt_s(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "flatten_pvt_s", pretrained, PVT_S, **kwargs)


@register_model
def flatten_pvt_m(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "flatten_pvt_m", pretrained, PVT_M, **kwargs)


@register_model
def flatten_pvt_l(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "flatten_pvt_l", pretrained, PVT_L, **kwargs)


@register_model
def flatten_pvt_v2_b0(pretrained: bool = False, **kwargs) -> PVTv2:
    return _create(PVTv2, "flatten_pvt_v2_b0", pretrained, V2_B0, **kwargs)


@register_model
def flatten_pvt_v2_b1(pretrained: bool = False, **kwargs) -> PVTv2:
    return _create(PVTv2, "flatten_pvt_v2_b1", pretrained, V2_B1, **kwargs)


@register_model
def flatten_pvt_v2_b2(pretrained: bool = False, **kwargs) -> PVTv2:
    return _create(PVTv2, "flatten_pvt_v2_b2", pretrained, V2_B2, **kwargs)


@register_model
def flatten_pvt_v2_b3(pretrained: bool = False, **kwargs) -> PVTv2:
    return _create(PVTv2, "flatten_pvt_v2_b3", pretrained, V2_B3, **kwargs)


@register_model
def flatten_pvt_v2_b4(pretrained: bool = False, **kwargs) -> PVTv2:
    return _create(PVTv2, "flatten_pvt_v2_b4", pretrained, V2_B4, **kwargs)


@register_model
def flatten_swin_t(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "flatten_swin_t", pretrained, SWIN_T, **kwargs)


@register_model
def flatten_swin_s(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "flatten_swin_s", pretrained, SWIN_S, **kwargs)


@register_model
def flatten_swin_b(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "flatten_swin_b", pretrained, SWIN_B, **kwargs)


@register_model
def flatten_swin_b_384(pretrained: bool = False, **kwargs) -> Swin:
    model_args = dict(SWIN_B, img_size=384, window_size=12)
    return _create(Swin, "flatten_swin_b_384", pretrained, model_args, **kwargs)


@register_model
def flatten_cswin_t(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "flatten_cswin_t", pretrained, CSWIN_T, **kwargs)


@register_model
def flatten_cswin_s(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "flatten_cswin_s", pretrained, CSWIN_S, **kwargs)


@register_model
def flatten_cswin_b(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "flatten_cswin_b", pretrained, CSWIN_B, **kwargs)


@register_model
def flatten_cswin_b_384(pretrained: bool = False, **kwargs) -> CSwin:
    model_args = dict(CSWIN_B, img_size=384, split_sizes=(1, 2, 12, 12))
    return _create(CSwin, "flatten_cswin_b_384", pretrained, model_args, **kwargs)
