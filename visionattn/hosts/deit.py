"""The host DeiT: one resolution, with a class token or without.

Paper: "Training data-efficient image transformers & distillation through attention", Touvron et al. 2021, arXiv
2012.12877.
"""

from collections.abc import Mapping, Sequence

from timm.layers import ClassifierHead, calculate_drop_path_rates

from visionattn.attention.mixer import MixerLike
from visionattn.attention.softmax import SoftmaxMixer
from visionattn.frames.isotropic import Isotropic, PrefixIsotropic, TokenHead
from visionattn.hosts.parts import Block, Host, MixerArgs, TokenBlock, mixers, norm_factory
from visionattn.layers.blocks import Mlp, Unused
from visionattn.layers.patch_embed import PatchEmbed, PrefixPatchEmbed

__all__ = ["DeiT", "DeiTGrid"]

EPS = 1e-6  # of every layer norm

RULES = (
    (r"^cls_token$", "stem.prefix_tokens"),
    (r"^pos_embed$", "stem.pos_embed"),
    (r"^patch_embed\.", "stem."),
    (r"^blocks\.", "stages."),
)


class DeiT(Host, PrefixIsotropic):
    """DeiT with any mixer in any of its blocks (Touvron et al. 2021, arXiv 2012.12877).

    Args:
        img_size: Height and width that tables of positions are made for; images of other sizes are allowed.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 leaves the classifier out.
        global_pool: ``"token"`` for the class token; ``"avg"``, ``"max"`` or ``"avgmax"`` of the others; ``""`` for no
            pooling.
        patch_size: Side of a patch.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden over outer width of the MLPs.
        mixer: What takes the place of softmax attention: a ``Mixer`` or its class path. None: nothing.
        mixer_depth: How many blocks have the mixer, from the first; None for all.
        mixer_args: Arguments of the mixer.
        norm_layer: ``"layernorm"``, ``"prepbn"`` or ``"repbn"``.
        norm_args: Arguments of the norm, such as ``total_step``.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    release_rules = RULES

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        mixer: MixerLike | None = None,
        mixer_depth: int | None = None,
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
        stem = PrefixPatchEmbed(in_chans, embed_dim, patch_size, img_size, **dd)
        (made,) = mixers(mixer, [mixer_depth], mixer_args, [depth], told=("input_size", "num_prefix_tokens"))
        told = dict(input_size=stem.grid_size, num_prefix_tokens=1, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = []
        for make, rate in zip(made, rates, strict=True):
            attn = (make or SoftmaxMixer)(embed_dim, num_heads, **told)
            mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), proj_drop_rate, **dd)
            blocks.append(TokenBlock(embed_dim, attn, mlp, norm, rate, **dd))
        super().__init__(
            stem=stem,
            blocks=blocks,
            head=TokenHead(embed_dim, num_classes, global_pool, 1, drop_rate, **dd),
            norm=norm(embed_dim, **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()


class DeiTGrid(Host, Isotropic):
    """``DeiT`` without class token: the mean of the patches is classified.

    Args: those of ``DeiT``, and
        unused_token: Hold the class token of SLAB's DeiT, which its forward pass leaves out.
    """

    release_rules = ((r"^cls_token$", "stem.norm.cls_token"), *RULES)

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        mixer: MixerLike | None = None,
        mixer_depth: int | None = None,
        mixer_args: MixerArgs | None = None,
        norm_layer: str = "layernorm",
        norm_args: Mapping[str, object] | None = None,
        unused_token: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        norm = norm_factory(norm_layer, EPS, norm_args)
        unused = Unused(dict(cls_token=(1, 1, embed_dim)), **dd) if unused_token else None
        stem = PatchEmbed(in_chans, embed_dim, patch_size, img_size, unused, **dd)
        (made,) = mixers(mixer, [mixer_depth], mixer_args, [depth], told=("input_size",))
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = []
        for make, rate in zip(made, rates, strict=True):
            attn = (make or SoftmaxMixer)(embed_dim, num_heads, input_size=stem.grid_size, **dd)
            mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), proj_drop_rate, **dd)
            blocks.append(Block(embed_dim, attn, mlp, norm, rate, **dd))
        super().__init__(
            stem=stem,
            blocks=blocks,
            head=ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd),
            norm=norm(embed_dim, **dd),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.init_weights()
