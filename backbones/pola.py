"""PolaFormer: polarity-aware linear attention in the hosts PVT and Swin.

Paper: "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", Meng, Luo, Li, Jiang, Zhang, ICLR 2025,
arXiv 2501.15061. Original code: ZacharyMeng/PolaFormer (MIT). Same computation; one product serves both halves of the
values, and the gate has a projection of its own.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import PVT, Swin
from visionattn.hosts.parts import Host
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

POLA = dict(mixer="visionattn.attention.PolarityAwareAttention")
PVT_T = dict(POLA, depths=(2, 2, 2, 2), unused_norm=True)
PVT_S = dict(POLA, depths=(3, 4, 6, 3), unused_norm=True)
PVT_M = dict(POLA, depths=(3, 4, 18, 3), unused_norm=True)
PVT_L = dict(POLA, depths=(3, 8, 27, 3), unused_norm=True)
SWIN_T = dict(POLA, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, 0, 0))
SWIN_S = dict(POLA, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, 0, 0))
SWIN_B = dict(POLA, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 0, 0))

declare_filter("pola", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("pola", first_conv="stem.proj", classifier="head.fc"))


def _create(cls: type[Host], variant: str, pretrained: bool, model_args: dict, **kwargs) -> Host:
    return build_backbone(cls, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def pola_pvt_t(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "pola_pvt_t", pretrained, PVT_T, **kwargs)


@register_model
def pola_pvt_s(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "pola_pvt_s", pretrained, PVT_S, **kwargs)


@register_model
def pola_pvt_m(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "pola_pvt_m", pretrained, PVT_M, **kwargs)


@register_model
def pola_pvt_l(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "pola_pvt_l", pretrained, PVT_L, **kwargs)


@register_model
def pola_swin_t(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "pola_swin_t", pretrained, SWIN_T, **kwargs)


@register_model
def pola_swin_s(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "pola_swin_s", pretrained, SWIN_S, **kwargs)


@register_model
def pola_swin_b(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "pola_swin_b", pretrained, SWIN_B, **kwargs)
