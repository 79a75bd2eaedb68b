"""LITv2: convolutional feed-forward blocks, then HiLo attention, with deformable token merging between the stages.

Paper: "Fast Vision Transformers with HiLo Attention", Pan, Cai, Zhuang, NeurIPS 2022, arXiv 2205.13213.
Original code: ziplab/LITv2 (Apache-2.0). Same computation, with the dense-task code's zero padding, so that any image
size is accepted; a merging belongs to the stage after it, so that stage outputs are the feature maps the authors'
detectors and segmenters take. Runs without their CUDA extension.
"""

from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import HiLoAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone
from visionattn.layers.blocks import DepthwiseMlp, ScaledResidual, pad_to_multiple
from visionattn.layers.token_merging import DeformableTokenMerging
from visionattn.layers.tracing import opaque
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint

__all__ = ["LITv2"]

EPS = 1e-5  # of every norm


class Block(nn.Module):
    """A residual feed-forward branch, behind one of HiLo attention where there are heads; [B, H, W, dim]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float,
        qkv_bias: bool,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = self.attn = self.residual1 = None
        if window_size:
            self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
            self.attn = HiLoAttention(dim, num_heads, window_size, alpha, qkv_bias, **dd)
            self.residual1 = ScaledResidual(dim, None, drop_path, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.residual2 = ScaledResidual(dim, None, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = self.residual1(x, self.attn(self.norm1(x)))
        return self.residual2(x, self.mlp(self.norm2(x)))


@opaque  # whether it pads depends on the size of the image
class PatchEmbed(nn.Module):
    """Non-overlapping 4x4 patches, then layer norm; the image to [B, dim, H/4, W/4], rounded up."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), 4).contiguous()  # channels_last from here on
        return self.norm(self.proj(x.permute(0, 3, 1, 2)))


class LITv2(Pyramid):
    """LITv2 (Pan et al. 2022, arXiv 2205.13213).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Window of each stage's attention: 1 for attention between all positions, 0 for blocks without
            attention. An integer stands for the third stage's; the two before have none, the last has all positions.
        alpha: Share of the heads that attend to the pooled map, 0 to 1.
        mlp_ratio: Hidden over outer width of the MLPs.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs (the authors' ``drop_rate``).
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If ``depths``, ``num_heads`` and ``window_size`` differ in length, or a value is not allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 2,
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        windows = (0, 0, window_size, 1) if isinstance(window_size, int) else tuple(window_size)
        if not len(depths) == len(num_heads) == len(windows):
            raise ValueError(
                f"depths, num_heads and window_size must have one entry a stage, got {len(depths)}, {len(num_heads)} "
                f"and {len(windows)}"
            )
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, dim in enumerate(widths):
            downsample = nn.Identity() if i == 0 else DeformableTokenMerging(widths[i - 1], dim, **dd)
            blocks = [
                Block(dim, num_heads[i], windows[i], alpha, qkv_bias, mlp_ratio, proj_drop_rate, rate, **dd)
                for rate in rates[i]
            ]
            stages.append(Stage(downsample, blocks, nhwc=True))
        super().__init__(
            stem=PatchEmbed(in_chans, embed_dim, **dd),
            stages=stages,
            head=ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=widths,
            strides=[4 * 2**i for i in range(len(widths))],
            norm=LayerNorm2d(widths[-1], eps=EPS, **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal linear layers, fan-out normal depthwise convolutions, no offset
        in the mergings and PyTorch's own weights there and in the stem."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, DepthwiseMlp):
                nn.init.normal_(module.dwconv.weight, std=(2 / 9) ** 0.5)
                nn.init.zeros_(module.dwconv.bias)
            elif isinstance(module, DeformableTokenMerging):
                module.reset_parameters()
        self.stem.proj.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' classifiers, detectors and segmenters; ours are returned as they are.

    A detector or segmenter has a norm per output in place of the final norm and the classifier. Those belong to its
    decoder and are left out; load the rest with ``features_only=True`` or ``num_classes=0``.
    """
    rules = (
        (r"^norm\d\.", None),
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"^head\.", "head.fc."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"\.dconv\.conv_offset\.", ".conv_offset."),
        (r"\.dconv\.", ".proj."),
        (r"\.norm_layer\.", ".norm."),
    )
    state_dict = rename_checkpoint(state_dict, rules)
    for name, value in state_dict.items():
        if name.endswith("downsample.proj.weight") and value.ndim == 4:
            # Theirs is the kernel of a convolution; ours acts on the pixels of all taps side by side.
            state_dict[name] = value.permute(0, 2, 3, 1).flatten(1)
    return state_dict


declare_filter("litv2", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("litv2", first_conv="stem.proj", classifier="head.fc"))


def _create_litv2(variant: str, pretrained: bool = False, **kwargs) -> LITv2:
    return build_backbone(LITv2, variant, pretrained, **kwargs)


@register_model
def litv2_small(pretrained: bool = False, **kwargs) -> LITv2:
    model_args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_litv2("litv2_small", pretrained, **dict(model_args, **kwargs))


@register_model
def litv2_medium(pretrained: bool = False, **kwargs) -> LITv2:
    model_args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_litv2("litv2_medium", pretrained, **dict(model_args, **kwargs))


@register_model
def litv2_base(pretrained: bool = False, **kwargs) -> LITv2:
    model_args = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_litv2("litv2_base", pretrained, **dict(model_args, **kwargs))


@register_model
def litv2_small_alpha00(pretrained: bool = False, **kwargs) -> LITv2:
    return _create_litv2("litv2_small_alpha00", pretrained, **dict(alpha=0.0, **kwargs))


@register_model
def litv2_small_alpha02(pretrained: bool = False, **kwargs) -> LITv2:
    return _create_litv2("litv2_small_alpha02", pretrained, **dict(alpha=0.2, **kwargs))


@register_model
def litv2_small_alpha04(pretrained: bool = False, **kwargs) -> LITv2:
    return _create_litv2("litv2_small_alpha04", pretrained, **dict(alpha=0.4, **kwargs))


@register_model
def litv2_small_alpha05(pretrained: bool = False, **kwargs) -> LITv2:
    return _create_litv2("litv2_small_alpha05", pretrained, **dict(alpha=0.5, **kwargs))


@register_model
def litv2_small_alpha07(pretrained: bool = False, **kwargs) -> LITv2:
    return _create_litv2("litv2_small_alpha07", pretrained, **dict(alpha=0.7, **kwargs))


@register_model
def litv2_small_alpha10(pretrained: bool = False, **kwargs) -> LITv2:
    return _create_litv2("litv2_small_alpha10", pretrained, **dict(alpha=1.0, **kwargs))
