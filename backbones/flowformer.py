"""Flowformer: a pyramid of ordinary convolutions between stages of flow attention.

Paper: "Flowformer: Linearizing Transformers with Conservation Flows", Wu, Wu, Xu, Wang, Long, ICML 2022, arXiv
2202.06258. Original code: thuml/Flowformer (MIT), the model of its vision folder. Same computation at the authors'
image size; at others the position embedding is resampled, where the authors' code stops.
"""

from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import FlowAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone, update_model_input_size
from visionattn.layers.blocks import PreNormBlock
from visionattn.layers.patch_embed import PatchEmbed, resize_position_embedding
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint

__all__ = ["Flowformer"]

EPS = 1e-6  # of every norm, and of the flows


class Flowformer(Pyramid):
    """Flowformer for images (Wu et al. 2022, arXiv 2202.06258).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        img_size: Image size of the position embedding, which is resampled for others.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of every stage; they divide ``embed_dims``.
        mlp_ratio: Hidden over outer width of the MLPs.
        layer_scale: Initial scale of the MLP branches; the attention branches have none.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of projections and MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or ``img_size`` is smaller than a patch.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            downsample = PatchEmbed(embed_dims[i - 1], dim, 2, None, nchw=True, **dd) if i else nn.Identity()
            blocks = []
            for rate in rates[i]:
                mixer = FlowAttention(dim, num_heads, proj_drop=proj_drop_rate, eps=EPS, flow_eps=EPS, **dd)
                blocks.append(PreNormBlock(dim, mixer, mlp_ratio, (None, layer_scale), proj_drop_rate, rate, EPS, **dd))
            stages.append(Stage(downsample, blocks, nhwc=True))
        super().__init__(
            stem=PatchEmbed(in_chans, embed_dims[0], 4, img_size, nchw=True, **dd),
            stages=stages,
            head=ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=embed_dims,
            norm=LayerNorm2d(embed_dims[-1], eps=EPS, **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal projections and positions, layer scale 1e-5."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif module is not self and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embedding, as the authors have it."""
        return {"stem.pos_embed"}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resample the position embedding for good. Not needed to run on another size, only faster."""
        self.stem.set_input_size(img_size)
        update_model_input_size(self, img_size)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' release and fit the position embedding to the model's image size."""
    rules = (
        (r"(^|\.)total_(ops|params)$", None),  # left by the profiler
        (r"^patch_embed\.0\.", "stem."),
        (r"^patch_embed\.(\d)\.", r"stages.\1.downsample."),
        (r"^pos_embed$", "stem.pos_embed"),
        (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"\.gamma$", ".residual2.gamma"),
        (r"^head\.", "head.fc."),
    )
    return resize_position_embedding(rename_checkpoint(state_dict, rules), model.stem)


declare_filter("flowformer", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("flowformer", first_conv="stem.proj", classifier="head.fc"))


@register_model
def flowformer(pretrained: bool = False, **kwargs) -> Flowformer:
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(3, 3, 10, 3))
    return build_backbone(Flowformer, "flowformer", pretrained, **dict(model_args, **kwargs))
