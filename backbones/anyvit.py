"""AnyViT: a ViT around any mixer, so that mechanisms are compared with all else equal.

After "An Image is Worth 16x16 Words", Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, and "Better plain ViT
baselines", Beyer, Zhai, Kolesnikov, 2022, arXiv 2205.01580: 12 pre-norm blocks on patches of 16x16, learned position
embedding, the mean of the patches as representation. There is no class token, so that a mixer sees nothing but a grid.
No published weights.
"""

from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention.mixer import MixerLike, find_mixer
from visionattn.frames.backbone import build_backbone
from visionattn.frames.isotropic import Isotropic
from visionattn.layers.blocks import PreNormBlock
from visionattn.layers.patch_embed import PatchEmbed, resize_position_embedding
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter

__all__ = ["AnyViT"]


class AnyViT(Isotropic):
    """ViT at one resolution whose token mixer is an argument.

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        img_size: Image size of the position embedding, which is resampled for others.
        patch_size: Side of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads of the mixer.
        mixer: Class, function or name (see ``visionattn.attention.mixer.find_mixer``), called ``mixer(embed_dim,
            num_heads, **mixer_args, device=, dtype=)`` for each block. What it gives maps a grid [B, H, W, C] to
            another.
        mixer_args: Further arguments of the mixer.
        mlp_ratio: Hidden over outer width of the MLPs.
        layer_scale: Initial scale of the residual branches; None for unscaled branches.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If ``mixer`` is no name of ours, or cannot be called.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mixer: MixerLike = "visionattn.attention.SoftmaxAttention",
        mixer_args: dict | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        make, arguments = find_mixer(mixer), mixer_args or {}
        blocks = []
        for rate in calculate_drop_path_rates(drop_path_rate, depth):
            attention = make(embed_dim, num_heads, **arguments, **dd)
            blocks.append(PreNormBlock(embed_dim, attention, mlp_ratio, layer_scale, proj_drop_rate, rate, **dd))
        head = ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd)
        super().__init__(
            stem=PatchEmbed(in_chans, embed_dim, patch_size, img_size, **dd),
            blocks=blocks,
            head=head,
            norm=nn.LayerNorm(embed_dim, eps=1e-6, **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal projections, whatever the mixer: its other parameters keep its own initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resample the position embedding where the checkpoint is of another image size."""
    return resize_position_embedding(state_dict, model.stem)


declare_filter("anyvit", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("anyvit", first_conv="stem.proj", classifier="head.fc"))


def _create_anyvit(variant: str, pretrained: bool = False, **kwargs) -> AnyViT:
    return build_backbone(AnyViT, variant, pretrained, **kwargs)


@register_model
def anyvit_tiny_patch16(pretrained: bool = False, **kwargs) -> AnyViT:
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_anyvit("anyvit_tiny_patch16", pretrained, **dict(model_args, **kwargs))


@register_model
def anyvit_small_patch16(pretrained: bool = False, **kwargs) -> AnyViT:
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_anyvit("anyvit_small_patch16", pretrained, **dict(model_args, **kwargs))
