"""NAT: a convolutional tokenizer and downsampler around blocks of neighborhood attention.

Paper: "Neighborhood Attention Transformer", Hassani, Walton, Li, Li, Shi, CVPR 2023, arXiv 2204.07143.
Original code: SHI-Labs/Neighborhood-Attention-Transformer (MIT). Same computation, including the zero padding of maps
smaller than a window that natten had when the checkpoints were trained; stages are grouped as timm expects.
"""

from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import NeighborhoodAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone
from visionattn.kernels import channels_last
from visionattn.layers.blocks import Mlp, ScaledResidual
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint, resize_axes

__all__ = ["NAT"]

EPS = 1e-5  # of every norm


class Block(nn.Module):
    """Two residual branches behind layer norms, neighborhood attention and MLP; [B, H, W, dim]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        layer_scale: float | None,
        proj_drop: float,
        drop_path: float,
        device=None,
        dtype=None,
        **attention,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = NeighborhoodAttention(dim, num_heads, proj_drop=proj_drop, **attention, **dd)
        self.residual1 = ScaledResidual(dim, layer_scale, drop_path, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.residual2 = ScaledResidual(dim, layer_scale, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(x, self.attn(self.norm1(x)))
        return self.residual2(x, self.mlp(self.norm2(x)))


class ConvTokenizer(nn.Module):
    """Two strided 3x3 convolutions with nothing between them, then layer norm; the image to [B, dim, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(channels_last(x)))


class ConvDownsampler(nn.Module):
    """Strided 3x3 convolution without bias that doubles the channels, then layer norm; [B, dim, H, W]."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = LayerNorm2d(2 * dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class NAT(Pyramid):
    """Neighborhood Attention Transformer (Hassani et al. 2023, arXiv 2204.07143).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        kernel_size: Window side of the attention.
        dilations: Dilations of each stage's blocks in turn, repeated from the start if there are more blocks.
        mlp_ratio: Hidden over outer width of the MLPs.
        layer_scale: Initial scale of the residual branches; None for unscaled branches.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        position: Where attention knows positions from, ``"bias"``, ``"rope"`` or ``"none"``.
        small_maps: What attention does on maps smaller than a dilated window, ``"pad"`` (as the checkpoints were
            trained), ``"shrink"`` or ``"error"``; see ``NeighborhoodAttention``.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of projections and MLPs (the authors' ``drop_rate``).
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If there are more dilations than blocks, or ``depths``, ``num_heads`` and ``dilations`` differ in
            length.
    """

    tokenizer: type[nn.Module] = ConvTokenizer
    downsampler: type[nn.Module] = ConvDownsampler

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] = ((1,), (1,), (1,), (1,)),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        position: str = "bias",
        small_maps: str = "pad",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if not len(depths) == len(num_heads) == len(dilations):
            raise ValueError(
                f"depths, num_heads and dilations must have one entry a stage, got {len(depths)}, {len(num_heads)} "
                f"and {len(dilations)}"
            )
        attention = dict(kernel_size=kernel_size, qkv_bias=qkv_bias, position=position, small_maps=small_maps)
        attention["attn_drop"] = attn_drop_rate
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, dim in enumerate(widths):
            if not 1 <= len(dilations[i]) <= depths[i]:
                raise ValueError(f"dilations[{i}] must have 1 to {depths[i]} values, got {dilations[i]!r}")
            blocks = [
                Block(
                    dim,
                    num_heads[i],
                    mlp_ratio,
                    layer_scale,
                    proj_drop_rate,
                    rate,
                    dilation=dilations[i][j % len(dilations[i])],
                    **attention,
                    **dd,
                )
                for j, rate in enumerate(rates[i])
            ]
            downsample = nn.Identity() if i == 0 else self.downsampler(widths[i - 1], **dd)
            stages.append(Stage(downsample, blocks, nhwc=True))
        super().__init__(
            stem=self.tokenizer(in_chans, embed_dim, **dd),
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
        """The authors' initialisation: truncated normal linear layers and bias tables, PyTorch's own convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm, NeighborhoodAttention, ScaledResidual)):
                module.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' NAT, DiNAT and DiNAT_s; our own state dict is returned as it is.

    A detector or segmenter has a norm per output in place of the final norm and the classifier. Those belong to its
    decoder and are left out; load the rest with ``features_only=True`` or ``num_classes=0``. Bias tables of another
    window are interpolated, as the authors did for 11x11 windows.
    """
    rules = (
        (r"^norm\d\.", None),
        (r"^patch_embed\.", "stem."),
        (r"^(?:levels|layers)\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^(?:levels|layers)\.", "stages."),
        (r"^head\.", "head.fc."),
        (r"\.gamma(\d)$", r".residual\1.gamma"),
    )
    state_dict = rename_checkpoint(state_dict, rules)
    for name, module in model.named_modules():
        key = f"{name}.rpb"
        if isinstance(module, NeighborhoodAttention) and module.rpb is not None and key in state_dict:
            table = resize_axes(state_dict[key], module.rpb.shape[1:], (1, 2), name=key)
            state_dict = state_dict if table is state_dict[key] else state_dict | {key: table}
    return state_dict


declare_filter("nat", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("nat", first_conv="stem.proj.0", classifier="head.fc"))


def create(cls: type[NAT], variant: str, pretrained: bool = False, **kwargs) -> NAT:
    """Build a registered model of this family or one of its relatives."""
    return build_backbone(cls, variant, pretrained, **kwargs)


@register_model
def nat_nano(pretrained: bool = False, **kwargs) -> NAT:
    """Not of the paper: as small as still learns digits, for demonstrations and tests."""
    model_args = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, mlp_ratio=1.0)
    return create(NAT, "nat_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
    return create(NAT, "nat_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0)
    return create(NAT, "nat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, layer_scale=1e-5)
    return create(NAT, "nat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    model_args = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, layer_scale=1e-5)
    return create(NAT, "nat_base", pretrained, **dict(model_args, **kwargs))
