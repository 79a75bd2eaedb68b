"""Agent attention in the hosts DeiT, PVT, Swin and CSwin.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han, Ye, Han, Xia, Pan, Wan, Song, Huang,
ECCV 2024, arXiv 2312.08874. Original code: LeapLabTHU/Agent-Attention (no licence stated). Same computation; maps of
other sizes than the tables of positions were made for follow the authors' detectors.
"""

from collections.abc import Mapping, Sequence

from timm.models import generate_default_cfgs, register_model

from visionattn.frames.backbone import build_backbone
from visionattn.hosts import PVT, CSwin, DeiT, Swin
from visionattn.hosts.parts import Host
from visionattn.hosts.release import checkpoint_filter_fn
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["checkpoint_filter_fn"]

AGENT = "visionattn.attention.AgentAttention"
AGENTS = dict(mixer=AGENT, mixer_args=tuple(dict(num_agents=M) for M in (9, 16, 49, 49)))
DEIT_T = dict(mixer=AGENT, embed_dim=192, num_heads=3)
DEIT_S = dict(mixer=AGENT, embed_dim=384, num_heads=6)
DEIT_B = dict(mixer=AGENT, mixer_args=dict(num_agents=81), mixer_depth=4, embed_dim=768, num_heads=12)
PVT_T = dict(AGENTS, depths=(2, 2, 2, 2))
PVT_S = dict(AGENTS, depths=(3, 4, 6, 3))
PVT_M = dict(AGENTS, depths=(3, 4, 18, 3))
PVT_L = dict(AGENTS, depths=(3, 8, 27, 3))
SWIN_T = dict(AGENTS, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, None, 0))
SWIN_S = dict(AGENTS, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mixer_depths=(None, None, 0, 0))
SWIN_B = dict(AGENTS, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 2, 0))
CSWIN_T = dict(AGENTS, embed_dim=64, depths=(2, 4, 18, 1), num_heads=(2, 4, 8, 16), mixer_depths=(None, None, 0, 0))
CSWIN_S = dict(AGENTS, embed_dim=64, depths=(3, 6, 29, 2), num_heads=(2, 4, 8, 16), mixer_depths=(None, None, 0, 0))
CSWIN_B = dict(AGENTS, embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), mixer_depths=(None, None, 0, 0))

declare_filter("agent", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("agent", first_conv="stem.proj", classifier="head.fc"))


def _create(
    cls: type[Host],
    variant: str,
    pretrained: bool,
    model_args: dict,
    agent_shapes: Sequence[int | tuple[int, int]] | None = None,
    **kwargs,
) -> Host:
    """Build a model.

    Args:
        agent_shapes: Rows and columns of agents of each stage on large images, if not those of the classifier. The
            authors' detectors have 9, 12, 14, 7 in Swin and 12, 16, 28, 28 in PVT.
    """
    args = dict(model_args, **kwargs)
    if agent_shapes is not None:
        stages = len(args.get("depths", (12,)))
        if len(agent_shapes) != stages:
            raise ValueError(f"agent_shapes must have one entry a stage, {stages}, got {agent_shapes!r}")
        given = args.get("mixer_args") or {}
        given = [given] * stages if isinstance(given, Mapping) else given
        args["mixer_args"] = [dict(a, agent_shape=shape) for a, shape in zip(given, agent_shapes, strict=True)]
    return build_backbone(cls, variant, pretrained, **args)


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "agent_deit_t", pretrained, DEIT_T, **kwargs)


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "agent_deit_s", pretrained, DEIT_S, **kwargs)


@register_model
def agent_deit_s_448(pretrained: bool = False, **kwargs) -> DeiT:
    model_args = dict(DEIT_S, img_size=448)
    return _create(DeiT, "agent_deit_s_448", pretrained, model_args, **kwargs)


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs) -> DeiT:
    return _create(DeiT, "agent_deit_b", pretrained, DEIT_B, **kwargs)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "agent_pvt_t", pretrained, PVT_T, **kwargs)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "agent_pvt_s", pretrained, PVT_S, **kwargs)


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "agent_pvt_m", pretrained, PVT_M, **kwargs)


@register_model
def agent_pvt_m_256(pretrained: bool = False, **kwargs) -> PVT:
    model_args = dict(PVT_M, img_size=256)
    return _create(PVT, "agent_pvt_m_256", pretrained, model_args, **kwargs)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs) -> PVT:
    return _create(PVT, "agent_pvt_l", pretrained, PVT_L, **kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "agent_swin_t", pretrained, SWIN_T, **kwargs)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "agent_swin_s", pretrained, SWIN_S, **kwargs)


@register_model
def agent_swin_s_288(pretrained: bool = False, **kwargs) -> Swin:
    model_args = dict(SWIN_S, img_size=288, window_size=9)
    return _create(Swin, "agent_swin_s_288", pretrained, model_args, **kwargs)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs) -> Swin:
    return _create(Swin, "agent_swin_b", pretrained, SWIN_B, **kwargs)


@register_model
def agent_swin_b_384(pretrained: bool = False, **kwargs) -> Swin:
    model_args = dict(SWIN_B, img_size=384, window_size=12)
    return _create(Swin, "agent_swin_b_384", pretrained, model_args, **kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "agent_cswin_t", pretrained, CSWIN_T, **kwargs)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "agent_cswin_s", pretrained, CSWIN_S, **kwargs)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs) -> CSwin:
    return _create(CSwin, "agent_cswin_b", pretrained, CSWIN_B, **kwargs)


@register_model
def agent_cswin_b_384(pretrained: bool = False, **kwargs) -> CSwin:
    model_args = dict(CSWIN_B, img_size=384, split_sizes=(1, 2, 12, 12))
    return _create(CSwin, "agent_cswin_b_384", pretrained, model_args, **kwargs)
