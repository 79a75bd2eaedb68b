"""BiFormer: a pyramid whose regions attend to the few regions that resemble them most.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu, Wang, Ke, Zhang, Lau, CVPR 2023, arXiv
2303.08810. Original code: rayleizhu/BiFormer (MIT). Same computation; maps that the authors' classifiers refuse are
padded as their detectors do it. ``biformer_stl`` has the layout of Swin-Tiny, ``biformer_stl_nchw`` also the second
generation of the attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import BiLevelRoutingAttention, LePEAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone
from visionattn.kernels import channels_last
from visionattn.layers.blocks import DepthwiseConv, PreNormBlock, ScaledResidual
from visionattn.layers.patch_embed import shortfall
from visionattn.layers.tracing import opaque
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint

__all__ = ["BiFormer"]

LAYOUTS = ("biformer", "swin")
# What the authors' negative topk stand for: full attention whose position code convolves this.
FULL_ATTENTION = {"legacy": {-2: "input", -1: "none"}, "nchw": {-1: "value"}}


class Block(PreNormBlock):
    """Attention and MLP behind layer norms, after a depthwise convolution for positions if there is one."""

    def __init__(self, dim: int, attention: nn.Module, position: bool, device=None, dtype=None, **block) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, attention, **block, **dd)
        self.position = position
        self.pos_embed = DepthwiseConv(dim, 3, **dd) if position else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.position:
            x = x + self.pos_embed(x)
        x = self.residual1(x, self.attn(self.norm1(x)))  # TorchScript has no super().forward
        return self.residual2(x, self.mlp(self.norm2(x)))


@opaque  # how much is padded depends on the size of the map
class PatchConv(nn.Conv2d):
    """Convolution of patches side by side; a map smaller than one patch is completed with zeros."""

    def __init__(self, in_chans: int, dim: int, side: int, device=None, dtype=None) -> None:
        super().__init__(in_chans, dim, side, stride=side, device=device, dtype=dtype)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = F.pad(x, (0, max(self.side - x.shape[3], 0), 0, max(self.side - x.shape[2], 0)))
        else:
            missing = [shortfall(n, self.side) for n in (x.shape[3], x.shape[2])]
            x = F.pad(x, (0, missing[0], 0, missing[1]))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Stem(nn.Module):
    """The image to the first map, [B, dim, H / 4, W / 4], channels_last as all that follow."""

    def __init__(self, in_chans: int, dim: int, layout: str, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if layout == "swin":
            self.proj = nn.Sequential(PatchConv(in_chans, dim, 4, **dd), nn.BatchNorm2d(dim, **dd))
        else:
            self.proj = nn.Sequential(
                nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
                nn.BatchNorm2d(dim // 2, **dd),
                nn.GELU(),
                nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
                nn.BatchNorm2d(dim, **dd),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(channels_last(x))


def _downsample(dim: int, out: int, layout: str, device=None, dtype=None) -> nn.Sequential:
    dd = {"device": device, "dtype": dtype}
    if layout == "swin":
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), PatchConv(dim, out, 2, **dd))
    return nn.Sequential(nn.Conv2d(dim, out, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(out, **dd))


class BiFormer(Pyramid):
    """BiFormer (Zhu et al. 2023, arXiv 2303.08810).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        head_dim: Channels of a head where attention is routed.
        mlp_ratio: Hidden over outer width of the MLPs.
        n_win: Regions a side of the routed stages, for both axes or one per axis. The authors take 8 for segmentation
            of 512 x 512 pixels and 16 for detection; see ``set_n_win``.
        topks: Regions that a region attends to, for each stage. Full attention with 8 heads instead: -2 with a position
            code of the input, -1 without one ("legacy"), or -1 with a position code of the values ("nchw").
        region_sizes: Tokens of a region a side for each stage, (8, 4, 2, 1) to keep them as they are at 224
            pixels, instead of ``n_win``.
        side_dwconv: Kernel side of the position code inside the attention.
        qk_dims: Channels of queries and keys for each stage, if they are not those of the stage.
        kv_downsample_mode: Reduction of keys and values within a region, with the ratio and the tokens left a side for
            each stage in ``kv_downsample_ratios`` and ``kv_per_wins``; see ``BiLevelRoutingAttention``.
        kv_downsample_ratios: As above.
        kv_per_wins: As above.
        soft_routing: As ``diff_routing``, ``param_routing`` and ``param_attention`` in ``BiLevelRoutingAttention``.
        diff_routing: As above.
        param_routing: As above.
        param_attention: As above.
        auto_pad: Whether maps that ``n_win`` does not divide are padded; changes nothing where it does.
        generation: ``"legacy"`` or ``"nchw"``, see ``BiLevelRoutingAttention``.
        layout: ``"biformer"``, or ``"swin"``: patches side by side and no convolution before the attention.
        layer_scale: Initial scale of the residual branches; None for unscaled branches.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If an argument is not one of the allowed, or the values per stage are not as many as the stages.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        n_win: int | Sequence[int] = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        region_sizes: Sequence[int] | None = None,
        side_dwconv: int = 5,
        qk_dims: Sequence[int | None] = (None, None, None, None),
        kv_downsample_mode: str = "identity",
        kv_downsample_ratios: Sequence[int] = (1, 1, 1, 1),
        kv_per_wins: Sequence[int] = (1, 1, 1, 1),
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        param_attention: str = "qkvo",
        auto_pad: bool = True,
        generation: str = "legacy",
        layout: str = "biformer",
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if generation not in FULL_ATTENTION:
            raise ValueError(f"generation must be one of {', '.join(FULL_ATTENTION)}, got {generation!r}")
        per_stage = dict(
            depths=depths,
            topks=topks,
            region_sizes=region_sizes or depths,
            qk_dims=qk_dims,
            kv_downsample_ratios=kv_downsample_ratios,
            kv_per_wins=kv_per_wins,
        )
        for name, values in per_stage.items():
            if len(values) != len(embed_dims):
                raise ValueError(f"{name} must have {len(embed_dims)} values as embed_dims has, got {values!r}")
        routing = dict(n_win=n_win, side_dwconv=side_dwconv, kv_downsample_mode=kv_downsample_mode)
        routing |= dict(soft_routing=soft_routing, diff_routing=diff_routing, param_routing=param_routing)
        routing |= dict(param_attention=param_attention, auto_pad=auto_pad, generation=generation)

        def attention(i: int) -> nn.Module:
            full = FULL_ATTENTION[generation].get(topks[i])
            if full is not None:
                return LePEAttention(embed_dims[i], 8, side_dwconv=side_dwconv, lepe=full, **dd)
            return BiLevelRoutingAttention(
                embed_dims[i],
                max(embed_dims[i] // head_dim, 1),
                topk=topks[i],
                region_size=region_sizes[i] if region_sizes else None,
                qk_dim=qk_dims[i],
                kv_downsample_ratio=kv_downsample_ratios[i],
                kv_per_win=kv_per_wins[i],
                **routing,
                **dd,
            )

        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            downsample = nn.Identity() if i == 0 else _downsample(embed_dims[i - 1], dim, layout, **dd)
            position = layout == "biformer"
            block = dict(mlp_ratio=mlp_ratio, layer_scale=layer_scale, eps=1e-6, **dd)
            blocks = [Block(dim, attention(i), position, drop_path=rate, **block) for rate in rates[i]]
            stages.append(Stage(downsample, blocks, nhwc=True))
        super().__init__(
            stem=Stem(in_chans, embed_dims[0], layout, **dd),
            stages=stages,
            head=ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=embed_dims,
            strides=[4 * 2**i for i in range(len(embed_dims))],
            norm=nn.BatchNorm2d(embed_dims[-1], **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.convolutional = generation == "nchw"
        self.init_weights()

    @torch.jit.ignore
    def set_n_win(self, n_win: int | Sequence[int]) -> None:
        """Cut maps into another number of regions a side, for images of another size. No parameter changes."""
        for module in self.modules():
            if isinstance(module, BiLevelRoutingAttention):
                module.n_win = n_win

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal linear layers, PyTorch's own convolutions.

        The projections of the "nchw" generation are 1x1 convolutions to the authors, which leaves the classifier.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (self.convolutional and name.startswith("stages.")):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, ScaledResidual)):
                module.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' releases; a state dict with our own names is returned as it is.

    A detector or segmenter has a norm per output in place of the final norm and the classifier. Those belong to its
    decoder and are left out; load the rest with ``features_only=True`` or ``num_classes=0``.
    """
    rules = (
        (r"^extra_norms\.\d\.", None),
        (r"^downsample_layers\.0\.", "stem.proj."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(?:blocks\.)?(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
        (r"\.attn\.output_linear\.", ".attn.wo."),
        (r"\.attn\.router\.emb\.", ".attn.router."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"\.gamma(\d)$", r".residual\1.gamma"),
        (r"^head\.", "head.fc."),
    )
    renamed = rename_checkpoint(state_dict, rules, native=("stem.",))
    if renamed is state_dict:
        return state_dict
    matrices = (".qkv.weight", ".wo.weight", ".proj.weight", ".fc1.weight", ".fc2.weight")  # or 1x1 convolutions
    return {name: value.flatten(1) if name.endswith(matrices) else value for name, value in renamed.items()}


declare_filter("biformer", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("biformer", first_conv="stem.proj.0", classifier="head.fc"))


def _create_biformer(variant: str, pretrained: bool = False, **kwargs) -> BiFormer:
    return build_backbone(BiFormer, variant, pretrained, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 8, 2))
    return _create_biformer("biformer_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dims=(64, 128, 256, 512), depths=(4, 4, 18, 4))
    return _create_biformer("biformer_small", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(4, 4, 18, 4))
    return _create_biformer("biformer_base", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0, layout="swin")
    return _create_biformer("biformer_stl", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0, layout="swin")
    model_args |= dict(generation="nchw", topks=(1, 4, 16, -1))
    return _create_biformer("biformer_stl_nchw", pretrained, **dict(model_args, **kwargs))
