"""The host Swin: patch merging between four stages of window attention or any other mixer.

Paper: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu et al. 2021, arXiv 2103.14030.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, calculate_drop_path_rates, is_exporting, to_2tuple
from torch import Tensor, nn

from visionattn.attention import WindowAttention
from visionattn.attention.mixer import MixerLike
from visionattn.frames.backbone import Pyramid, Stage
from visionattn.hosts.parts import Block, Factory, Host, MixerArgs, StridedConv, mixers, norm_factory
from visionattn.layers.blocks import Linear, Mlp
from visionattn.layers.norms import fold_before, fold_into
from visionattn.layers.tracing import opaque

__all__ = ["PatchMerging", "Swin"]

EPS = 1e-5  # of every layer norm


@opaque  # whether it pads depends on the size of the map
class PatchMerging(nn.Module):
    """Squares of 2x2 positions side by side, norm, linear map to half of their channels; [B, dim, H, W].

    Odd maps are zero-padded before the norm, which counts those zeros.

    Args:
        dim: Channels in; out come twice as many.
        norm: Makes a norm of a number of channels.
    """

    def __init__(self, dim: int, norm: Factory, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = norm(4 * dim, **dd)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1)
        # The row varies before the column.
        if is_exporting():  # without branches on sizes
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
            left, right = x[:, :, :W:2], x[:, :, 1 : W + 1 : 2]
            x = torch.cat([left[:, :H:2], left[:, 1 : H + 1 : 2], right[:, :H:2], right[:, 1 : H + 1 : 2]], -1)
        else:
            if H % 2 + W % 2 > 0:
                x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
            x = x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold a norm that is affine in evaluation into the linear map, which gets a bias."""
        self.norm = fold_into(self.norm, partial(fold_before, self.reduction))


class Swin(Host, Pyramid):
    """Swin with any mixer in any of its blocks (Liu et al. 2021, arXiv 2103.14030).

    Args:
        img_size: Height and width that tables of positions are made for; images of other sizes are allowed.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratio: Hidden over outer width of the MLPs.
        window_size: Side of the windows of blocks without a mixer; every other block shifts them.
        shift_small_maps: See ``WindowAttention``.
        mixer: What takes the place of window attention: a ``Mixer`` or its class path. None: nothing.
        mixer_depths: How many blocks of each stage have the mixer, from the first; None for all.
        mixer_args: Arguments of the mixer, for all stages or one mapping a stage.
        norm_layer: ``"layernorm"``, ``"prepbn"`` or ``"repbn"``.
        norm_args: Arguments of the norm, such as ``total_step``.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If an argument is not one of the allowed, or lengths differ.
    """

    release_rules = (
        (r"^norm\d\.", None),  # of a detector's outputs, which belong to its decoder
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
    )

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        shift_small_maps: bool | None = None,
        mixer: MixerLike | None = None,
        mixer_depths: Sequence[int | None] | None = None,
        mixer_args: MixerArgs | None = None,
        norm_layer: str = "layernorm",
        norm_args: Mapping[str, object] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norm = norm_factory(norm_layer, EPS, norm_args)
        made = mixers(mixer, mixer_depths, mixer_args, depths, told=("input_size",))
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        stem = StridedConv(in_chans, embed_dim, 4, 4, whole=True, norm=norm, **dd)
        size = stem.out_size(to_2tuple(img_size))
        stages = []
        for i, (dim, heads) in enumerate(zip(widths, num_heads, strict=True)):
            downsample = nn.Identity()
            if i > 0:
                downsample = PatchMerging(widths[i - 1], norm, **dd)
                size = (-(-size[0] // 2), -(-size[1] // 2))
            blocks = []
            for j, make in enumerate(made[i]):
                if make is None:
                    window = dict(window_size=window_size, shift=j % 2 == 1, shift_small_maps=shift_small_maps)
                    attn = WindowAttention(dim, heads, input_size=size, **window, **dd)
                else:
                    attn = make(dim, heads, input_size=size, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(Block(dim, attn, mlp, norm, rates[i][j], **dd))
            stages.append(Stage(downsample, blocks, nhwc=True))
        super().__init__(
            stem=stem,
            stages=stages,
            head=ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            widths=widths,
            strides=[4 * 2**i for i in range(len(widths))],
            norm=norm(widths[-1], nchw=True, **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
