"""RAVLT: rank-augmented linear attention on the two large maps of a pyramid, softmax attention on the two small ones.

Paper: "Breaking the Low-Rank Dilemma of Linear Attention", Fan, Huang, He, CVPR 2025, arXiv 2411.07635.
Original code: qhfan/RALA (no licence stated). Same computation; maps are channels_last, stages are grouped as timm
expects, rotary tables are made in float32 for any input size, and layer scales, one-dimensional here, get no weight
decay from timm's optimizers. MAViT is the same network with another operator, NaLaFormer with a position
code more: see ``mavit.py`` and ``nalaformer.py``.
"""

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.attention import MagnitudeAwareAttention, NormAwareAttention, RankAugmentedAttention, RotaryAttention
from visionattn.frames.backbone import Pyramid, Stage, build_backbone
from visionattn.kernels import autocasting, channels_last
from visionattn.layers.blocks import Linear, ScaledResidual, activated, in_slices
from visionattn.layers.tracing import opaque
from visionattn.weights import pretrained_cfgs
from visionattn.weights.families import declare_filter
from visionattn.weights.rename import rename_checkpoint

__all__ = ["RAVLT"]

MIXERS = {
    "rala": RankAugmentedAttention,
    "mala": MagnitudeAwareAttention,
    "nala": NormAwareAttention,
    "softmax": RotaryAttention,
    "normed_softmax": partial(RotaryAttention, norm_gate=True),
}


@opaque  # which form runs depends on the tensor
class DepthwiseResidual(nn.Conv2d):
    """``x + dwconv(x)`` with a depthwise 3x3 on [B, H, W, dim]."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return x + self._convolved(x, self.weight)
        elif x.dtype in (torch.float32, torch.float64) and not autocasting(x):
            # One pass less. With fewer bits, 1 plus a small weight would lose most of the weight's own.
            one = F.pad(self.weight.new_ones(self.weight.shape[0], 1, 1, 1), (1, 1, 1, 1))
            return self._convolved(x, self.weight + one)
        else:
            return x + self._convolved(x, self.weight)

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x.permute(0, 3, 1, 2), weight, self.bias).permute(0, 2, 3, 1)


class ConvMlp(nn.Module):
    """``fc2(t + dwconv(t))``, ``t = gelu(fc1(x))``, on [B, H, W, dim]."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.hidden = hidden
        self.fc1 = Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.dwconv = DepthwiseResidual(hidden, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._mlp(x)
        else:
            return self._sliced(x)

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x)) if torch.jit.is_scripting() else activated(self.fc1, self.act, x)
        return self.fc2(self.dwconv(x))

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mlp, x, self.hidden, x.shape[-1])


class Block(nn.Module):
    """Convolutional position code, attention, the code again if asked for, MLP, both behind norms; [B, H, W, dim]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mixer: str,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        second_code: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.pos = DepthwiseResidual(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = MIXERS[mixer](dim, num_heads, **dd)
        self.residual1 = ScaledResidual(dim, layer_scale, drop_path, **dd)
        self.pos2 = DepthwiseResidual(dim, **dd) if second_code else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.residual2 = ScaledResidual(dim, layer_scale, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos(x)
        x = self.pos2(self.residual1(x, self.attn(self.norm1(x))))
        return self.residual2(x, self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Four 3x3 convolutions with batch norm, GELU between them; the image to [B, dim, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.half = half = dim // 2
        layers: list[nn.Module] = []
        for channels, out, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, **dd), nn.BatchNorm2d(out, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        if torch.jit.is_scripting():
            return self.proj(x)
        else:
            return self._sliced(x)

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        if self.training:  # batch norm looks at the whole batch
            return self.proj(x)
        return in_slices(self.proj, x, widest=self.half // 4)  # of half the resolution


class Downsample(nn.Module):
    """Strided 3x3 convolution with bias, then batch norm; [B, dim, H, W] to [B, out, H/2, W/2]."""

    def __init__(self, dim: int, out: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(out, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class ProjectedHead(ClassifierHead):
    """``fc(pool(silu(norm(proj(x)))))``: a 1x1 convolution widens the map before it is pooled.

    Without pooling and classes there is nothing left of it.
    """

    def __init__(
        self, width: int, hidden: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        bare = num_classes == 0 and not pool_type
        super().__init__(width if bare else hidden, num_classes, pool_type=pool_type, drop_rate=drop_rate, **dd)
        self.width = width
        self.hidden = hidden
        self._project(not bare, **dd)

    def _project(self, wanted: bool, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(self.width, self.hidden, 1, **dd) if wanted else nn.Identity()
        self.norm = BatchNormAct2d(self.hidden, act_layer="silu", **dd) if wanted else nn.Identity()
        if wanted:
            init_weights(self.proj)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """As timm's heads; a map of another width, which pruning leaves, is classified without the projection."""
        width = self.width if in_features is None else in_features
        pool = self.global_pool.pool_type if pool_type is None else pool_type
        wanted = width == self.width and not reset_other and (num_classes > 0 or bool(pool))
        if wanted == isinstance(self.proj, nn.Identity):
            self._project(wanted, device=device, dtype=dtype)
            self.proj.train(self.training)
            self.norm.train(self.training)
        super().reset(num_classes, pool_type, reset_other, self.hidden if wanted else width, device, dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(self.norm(self.proj(x))))
        if pre_logits:
            return self.flatten(x)
        return self.flatten(self.fc(x))


class RAVLT(Pyramid):
    """Rank-augmented vision linear transformer (Fan et al. 2025, arXiv 2411.07635), and MAViT (arXiv 2507.00698).

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mixers: Attention of each stage: ``"rala"``, ``"mala"``, ``"nala"``, ``"softmax"`` or ``"normed_softmax"``.
        mlp_ratio: Hidden over outer width of the MLPs.
        layer_scales: Initial scale of the residual branches of each stage; None for unscaled branches.
        head_width: Channels of the 1x1 convolution before the pooling.
        second_code: Whether every block has a position code before its MLP, too.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If the arguments of the stages differ in length, or a mixer is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mixers: Sequence[str] = ("rala", "rala", "softmax", "softmax"),
        mlp_ratio: float = 3.5,
        layer_scales: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        head_width: int = 1024,
        second_code: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        for mixer in mixers:
            if mixer not in MIXERS:
                raise ValueError(f"mixers must be of {', '.join(MIXERS)}, got {mixer!r}")
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            downsample = nn.Identity() if i == 0 else Downsample(embed_dims[i - 1], dim, **dd)
            made = (dim, num_heads[i], mixers[i], mlp_ratio, layer_scales[i])
            blocks = [Block(*made, rate, second_code, **dd) for rate in rates[i]]
            stages.append(Stage(downsample, blocks, nhwc=True))
        super().__init__(
            stem=Stem(in_chans, embed_dims[0], **dd),
            stages=stages,
            head=ProjectedHead(embed_dims[-1], head_width, num_classes, global_pool, drop_rate, **dd),
            widths=embed_dims,
            strides=[4 * 2**i for i in range(len(embed_dims))],
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal weights of std 0.02, zero biases, neutral norms."""
        for module in self.modules():
            init_weights(module)


def init_weights(module: nn.Module) -> None:
    """Initialise one module as the authors do."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, ScaledResidual)):
        module.reset_parameters()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of the authors' RAVLT, MAViT and NaLaFormer; our own state dict is returned as it is.

    The angles of the rotary embedding, which the releases store, are computed here. A detector or segmenter has a norm
    per output in place of the head. Those belong to its decoder and are left out; load the rest with
    ``features_only=True`` or ``num_classes=0``.
    """
    rules = (
        (r"\.RoPE\.", None),
        (r"^extra_norms\.", None),
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.(norm\d)\.norm\.", r".\1."),
        (r"\.attn\.qkv[og]\.", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.cpe1\.", ".pos."),
        (r"\.cpe2\.", ".pos2."),
        (r"\.ffn\.", ".mlp."),
        (r"\.gamma_(\d)$", r".residual\1.gamma"),
        (r"^(proj|norm)\.", r"head.\1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    renamed = rename_checkpoint(state_dict, rules)
    if renamed is state_dict:
        return renamed
    # 1x1 convolutions are linear layers here, but for the head's; layer scales are vectors.
    linear = re.compile(r"\.attn\.(qkv|proj)\.weight$|\.fc\d?\.weight$")
    fitted = {
        name: value.flatten(1) if linear.search(name) else value.flatten() if name.endswith(".gamma") else value
        for name, value in renamed.items()
    }
    if "head.proj.weight" in fitted and fitted["head.proj.weight"].dim() == 2:  # NaLaFormer's is a linear layer
        fitted["head.proj.weight"] = fitted["head.proj.weight"][:, :, None, None]
    return fitted


declare_filter("ravlt", checkpoint_filter_fn)
default_cfgs = generate_default_cfgs(pretrained_cfgs("ravlt", first_conv="stem.proj.0", classifier="head.fc"))

# Of RAVLT, MAViT and NaLaFormer alike.
TINY = dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
SMALL = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8))
BASE = dict(embed_dims=(96, 192, 384, 512), depths=(4, 6, 12, 6), num_heads=(1, 2, 6, 8))
BASE["layer_scales"] = (1.0, 1.0, 1e-6, 1e-6)
LARGE = dict(embed_dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(1, 2, 7, 10))
LARGE["layer_scales"] = (1e-6, 1e-6, 1e-6, 1e-6)


def create(variant: str, pretrained: bool = False, **kwargs) -> RAVLT:
    """Build a registered model of this family or of MAViT."""
    return build_backbone(RAVLT, variant, pretrained, **kwargs)


@register_model
def ravlt_t(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("ravlt_t", pretrained, **dict(TINY, **kwargs))


@register_model
def ravlt_s(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("ravlt_s", pretrained, **dict(SMALL, **kwargs))


@register_model
def ravlt_b(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("ravlt_b", pretrained, **dict(BASE, **kwargs))


@register_model
def ravlt_l(pretrained: bool = False, **kwargs) -> RAVLT:
    return create("ravlt_l", pretrained, **dict(LARGE, **kwargs))
