"""The host CSwin: overlapping convolutions between four stages of cross-shaped attention or any other mixer.

Paper: "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", Dong et al. 2021, arXiv
2107.00652.
"""

from collections.abc import Mapping, Sequence

from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple
from torch import nn

from visionattn.attention import CrossShapedAttention
from visionattn.attention.mixer import MixerLike
from visionattn.frames.backbone import Pyramid, Stage
from visionattn.hosts.parts import Block, Host, MixerArgs, StreamBlock, StridedConv, mixers, norm_factory
from visionattn.layers.blocks import Mlp

__all__ = ["CSwin"]

EPS = 1e-5  # of every layer norm


class CSwin(Host, Pyramid):
    """CSwin with any mixer in any of its blocks (Dong et al. 2021, arXiv 2107.00652).

    Mixers see the whole map. They are built with ``lepe`` and ``stream``, see ``Mixer``.

    Args:
        img_size: Height and width that tables of positions are made for; images of other sizes are allowed.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier; ``""`` for none.
        embed_dim: Channels of the first stage; every next one has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        mlp_ratio: Hidden over outer width of the MLPs.
        split_sizes: Width of the stripes of blocks without a mixer, by stage; the last stage has none.
        mixer: What takes the place of cross-shaped attention: a ``Mixer`` or its class path. None: nothing.
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
        (r"^stage1_conv_embed\.0\.", "stem.proj."),
        (r"^stage1_conv_embed\.2\.", "stem.norm."),
        (r"^merge(\d)\.conv\.", lambda m: f"stages.{m[1]}.downsample.proj."),
        (r"^merge(\d)\.", lambda m: f"stages.{m[1]}.downsample."),
        (r"^stage(\d)\.(\d+)\.(qkv|proj)\.", r"stage\1.\2.attn.\3."),
        (r"\.attns\.(\d)\.get_v\.", r".attn.branches.\1.get_v."),
        (r"\.attns\.\d\.", ".attn."),
        (r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    )

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        split_sizes: Sequence[int] = (1, 2, 7, 7),
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
        made = mixers(mixer, mixer_depths, mixer_args, depths, told=("input_size", "lepe", "stream"))
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        stem = StridedConv(in_chans, embed_dim, 7, 4, 2, norm=norm, **dd)
        size = stem.out_size(to_2tuple(img_size))
        stages = []
        for i, (dim, heads, split) in enumerate(zip(widths, num_heads, split_sizes, strict=True)):
            downsample = nn.Identity()
            if i > 0:
                downsample = StridedConv(widths[i - 1], dim, 3, 2, 1, norm=norm, **dd)
                size = downsample.out_size(size)
            whole = i == len(widths) - 1
            blocks = []
            for make, rate in zip(made[i], rates[i], strict=True):
                if make is None:
                    block, attn = Block, CrossShapedAttention(dim, heads, None if whole else split, **dd)
                else:
                    block, attn = StreamBlock, make(dim, heads, input_size=size, lepe=True, stream=True, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(block(dim, attn, mlp, norm, rate, **dd))
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
