"""NaLaFormer: the network of RAVLT with norm-aware linear attention and a second position code in every block.

Paper: "Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention", ICML 2026, arXiv 2506.21137.
Original code: ZacharyMeng/NaLaFormer (MIT). See ``ravlt.py`` for what differs from it. The released code of the
smallest model has 6.1 million parameters, the paper's table 8.
"""

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.backbones.ravlt import BASE, LARGE, RAVLT, SMALL, TINY, checkpoint_filter_fn
from visionattn.frames.backbone import build_backbone
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["NaLaFormer", "checkpoint_filter_fn"]

declare_filter("nalaformer", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("nalaformer", first_conv="stem.proj.0", classifier="head.fc"))

NALA = dict(mixers=("nala", "nala", "normed_softmax", "normed_softmax"), second_code=True)
EXTRA_TINY = dict(embed_dims=(32, 64, 128, 384), depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 12))


class NaLaFormer(RAVLT):
    """Norm-aware linear attention transformer (arXiv 2506.21137). Arguments as of ``RAVLT``."""

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal convolutions of std 0.02, linear layers as PyTorch's."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head.fc:  # theirs is a convolution
                module.reset_parameters()
        if isinstance(self.head.proj, nn.Conv2d):  # and theirs of this is none
            self.head.proj.reset_parameters()


def _create(variant: str, pretrained: bool, model_args: dict, **kwargs) -> NaLaFormer:
    return build_backbone(NaLaFormer, variant, pretrained, **dict(NALA | model_args, **kwargs))


@register_model
def nalaformer_xt(pretrained: bool = False, **kwargs) -> NaLaFormer:
    return _create("nalaformer_xt", pretrained, EXTRA_TINY, **kwargs)


@register_model
def nalaformer_t(pretrained: bool = False, **kwargs) -> NaLaFormer:
    return _create("nalaformer_t", pretrained, TINY | dict(mlp_ratio=4), **kwargs)


@register_model
def nalaformer_s(pretrained: bool = False, **kwargs) -> NaLaFormer:
    return _create("nalaformer_s", pretrained, SMALL, **kwargs)


@register_model
def nalaformer_b(pretrained: bool = False, **kwargs) -> NaLaFormer:
    return _create("nalaformer_b", pretrained, BASE | dict(mlp_ratio=4), **kwargs)


@register_model
def nalaformer_l(pretrained: bool = False, **kwargs) -> NaLaFormer:
    return _create("nalaformer_l", pretrained, LARGE, **kwargs)
