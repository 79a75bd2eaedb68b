"""SLAB: batch norm in place of layer norm, with simplified linear attention (``slab_``) or softmax (``prepbn_``).

Paper: "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", Guo, Chen, Tang, Wang, ICML 2024, arXiv 2405.11582. Original code: xinghaochen/SLAB (no licence stated).
Same computation; ``timm.models.reparameterize_model`` and ``model.reparameterize()`` fold the norms away, exactly.
"""

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import PVT, CSwin, DeiT, DeiTGrid, Swin
from visionattn.hosts.parts import Host
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

SIMPLIFIED = "visionattn.attention.SimplifiedLinearAttention"
LINEAR = dict(mixer=SIMPLIFIED, norm_layer="prepbn")
SHORT = dict(total_step=60_000)
LONG = dict(total_step=300_000)
DEIT = dict(LINEAR, norm_args=SHORT, unused_token=True)
DEIT_T = dict(DEIT, embed_dim=192, num_heads=3)
DEIT_S = dict(DEIT, embed_dim=384, num_heads=6)
PVT_T = dict(LINEAR, norm_args=LONG, depths=(2, 2, 2, 2))
PVT_S = dict(LINEAR, norm_args=LONG, depths=(3, 4, 6, 3))
PVT_M = dict(LINEAR, norm_args=LONG, depths=(3, 4, 18, 3))
SWIN = dict(LINEAR, norm_args=SHORT, mixer_depths=(None, None, 0, 0))
SWIN_T = dict(SWIN, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
SWIN_S = dict(SWIN, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
SWIN_B = dict(SWIN, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
CSWIN = dict(
    LINEAR, mixer_args=dict(unused_scale=True), norm_args=dict(total_step=120_000), mixer_depths=(None, None, 0, 0)
)
CSWIN_T = dict(CSWIN, embed_dim=64, depths=(2, 4, 18, 1), num_heads=(2, 4, 8, 16))
CSWIN_S = dict(CSWIN, embed_dim=64, depths=(2, 4, 32, 2), num_heads=(2, 4, 8, 16))
SOFTMAX_DEIT_T = dict(norm_layer="repbn", embed_dim=192, num_heads=3)
SOFTMAX_DEIT_S = dict(norm_layer="prepbn", norm_args=LONG, embed_dim=384, num_heads=6)
SOFTMAX_PVT = dict(norm_layer="prepbn", norm_args=LONG)
SOFTMAX_SWIN_T = dict(norm_layer="repbn", embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))

declare_filter("slab", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("slab", first_conv="stem.proj", classifier="head.fc"))


def _create(cls: type[Host], variant: str, pretrained: bool, model_args: dict, **kwargs) -> Host:
    return build_backbone(cls, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def slab_deit_t(pretrained: bool = False, **kwargs) -> DeiTGrid:
    return _create(DeiTGrid, "slab_deit_t", pretrained, DEIT_T, **kwargs)


@register_model
def slab_deit_s(pretrained: bool = False, **kwargs) -> DeiTGrid:
    return _create(DeiTGrid, "slab_deit_s", pretrained, DEIT_S, **kwargs)


@register_model
def slab_pvt_t(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "slab_pvt_t", pretrained, PVT_T, **kwargs)


@register_model
def slab_pvt_s(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "slab_pvt_s", pretrained, PVT_S, **kwargs)


@register_model
def slab_pvt_m(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "slab_pvt_m", pretrained, PVT_M, **kwargs)


@register_model
def slab_swin_t(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "slab_swin_t", pretrained, SWIN_T, **kwargs)


@register_model
def slab_swin_s(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "slab_swin_s", pretrained, SWIN_S, **kwargs)


@register_model
def slab_swin_b(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "slab_swin_b", pretrained, SWIN_B, **kwargs)


@register_model
def slab_cswin_t(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "slab_cswin_t", pretrained, CSWIN_T, **kwargs)


@register_model
def slab_cswin_s(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "slab_cswin_s", pretrained, CSWIN_S, **kwargs)


@register_model
def prepbn_deit_t(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "prepbn_deit_t", pretrained, SOFTMAX_DEIT_T, **kwargs)


@register_model
def prepbn_deit_s(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "prepbn_deit_s", pretrained, SOFTMAX_DEIT_S, **kwargs)


@register_model
def prepbn_pvt_t(pretrained: bool = False, **kwargs) -> PVT:
    model_args = dict(SOFTMAX_PVT, depths=(2, 2, 2, 2))
    return _create(PVT, "prepbn_pvt_t", pretrained, model_args, **kwargs)


@register_model
def prepbn_pvt_s(pretrained: bool = False, **kwargs) -> PVT:
    model_args = dict(SOFTMAX_PVT, depths=(3, 4, 6, 3))
    return _create(PVT, "prepbn_pvt_s", pretrained, model_args, **kwargs)


@register_model
def prepbn_pvt_m(pretrained: bool = False, **kwargs) -> PVT:
    model_args = dict(SOFTMAX_PVT, depths=(3, 4, 18, 3))
    return _create(PVT, "prepbn_pvt_m", pretrained, model_args, **kwargs)


@register_model
def prepbn_swin_t(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "prepbn_swin_t", pretrained, SOFTMAX_SWIN_T, **kwargs)
