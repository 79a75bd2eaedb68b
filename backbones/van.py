"""VAN: a convolutional pyramid whose blocks gate their input with a large depthwise kernel.

Paper: "Visual Attention Network", Guo, Lu, Liu, Cheng, Hu, 2022, arXiv 2202.09741.
Original code: Visual-Attention-Network/VAN-Classification (Apache-2.0). Same computation and parameter names inside
a block; the stages are grouped as timm expects, maps stay channels_last, and any input size is accepted.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import LargeKernelAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone
from visionattn.kernels import channels_last
from visionattn.layers.blocks import ScaledResidual, activated, in_slices
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint

__all__ = ["VAN"]


class SpatialAttention(nn.Module):
    """``x + proj_2(LKA(gelu(proj_1(x))))``; the shortcut lies inside the block's scaled branch."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1, **dd)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LargeKernelAttention(dim, **dd)
        self.proj_2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            y = self.activation(self.proj_1(x))
        else:
            y = activated(self.proj_1, self.activation, x)
        return self.proj_2(self.spatial_gating_unit(y)) + x


class ConvMlp(nn.Module):
    """``fc2(gelu(dwconv(fc1(x))))`` with a depthwise 3x3 in the middle."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._mlp(x)
        else:
            return self._sliced(x)

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(self.dwconv(x)) if torch.jit.is_scripting() else activated(self.dwconv, self.act, x)
        return self.drop(self.fc2(self.drop(x)))

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mlp, x, widest=self.hidden)


class Block(nn.Module):
    """Two scaled residual branches, spatial attention and MLP, each behind a batch norm."""

    def __init__(
        self, dim: int, mlp_ratio: float, drop: float = 0.0, drop_path: float = 0.0, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = SpatialAttention(dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.residual1 = ScaledResidual(dim, 1e-2, drop_path, nchw=True, **dd)
        self.residual2 = ScaledResidual(dim, 1e-2, drop_path, nchw=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(x, self.attn(self.norm1(x)))
        return self.residual2(x, self.mlp(self.norm2(x)))


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlapping patches, then batch norm; [B, C, H, W] to [B, dim, H/stride, W/stride]."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=stride, padding=patch_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # One layout from the first convolution on; the rest of the network keeps it without copies.
        return self.norm(self.proj(channels_last(x)))


class VAN(Pyramid):
    """Visual Attention Network (Guo et al. 2022, arXiv 2202.09741).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratios: Hidden over outer width of the MLPs of each stage.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs (the authors' ``drop_rate``).
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (3, 3, 5, 2),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
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
            downsample = nn.Identity() if i == 0 else OverlapPatchEmbed(embed_dims[i - 1], dim, 3, 2, **dd)
            blocks = [Block(dim, mlp_ratios[i], proj_drop_rate, rate, **dd) for rate in rates[i]]
            stages.append(Stage(downsample, blocks, LayerNorm2d(dim, eps=1e-6, **dd)))
        super().__init__(
            stem=OverlapPatchEmbed(in_chans, embed_dims[0], 7, 4, **dd),
            stages=stages,
            head=ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=embed_dims,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: fan-out normal convolutions, truncated normal classifier, layer scale 1e-2."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, ScaledResidual)):
                module.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' release; a state dict with our own names is returned as it is."""
    rules = (
        (r"^patch_embed1\.", "stem."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"^head\.", "head.fc."),
        (r"\.layer_scale_(\d)$", r".residual\1.gamma"),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
    )
    return rename_checkpoint(state_dict, rules)


declare_filter("van", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("van", first_conv="stem.proj", classifier="head.fc"))


def _create_van(variant: str, pretrained: bool = False, **kwargs) -> VAN:
    return build_backbone(VAN, variant, pretrained, **kwargs)


@register_model
def van_nano(pretrained: bool = False, **kwargs) -> VAN:
    """Not of the paper: as small as still learns digits, for demonstrations and tests."""
    model_args = dict(embed_dims=(16, 32, 64, 96), depths=(1, 1, 1, 1), mlp_ratios=(4, 4, 4, 2))
    return _create_van("van_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b0(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(32, 64, 160, 256), depths=(3, 3, 5, 2), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b0", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b1(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(2, 2, 4, 2), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b1", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b2(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 3, 12, 3), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b2", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b3(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 27, 3), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b3", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b4(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b4", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b5(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(96, 192, 480, 768), depths=(3, 3, 24, 3), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b5", pretrained, **dict(model_args, **kwargs))


@register_model
def van_b6(pretrained: bool = False, **kwargs) -> VAN:
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(6, 6, 90, 6), mlp_ratios=(8, 8, 4, 4))
    return _create_van("van_b6", pretrained, **dict(model_args, **kwargs))
