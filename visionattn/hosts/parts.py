"""What the host backbones share: blocks that take any mixer, stems, and which block gets which mixer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, trunc_normal_
from torch import Tensor, nn

from visionattn.attention.mixer import MixerLike, find_mixer
from visionattn.frames.backbone import Backbone
from visionattn.kernels import channels_last
from visionattn.layers.blocks import ScaledResidual
from visionattn.layers.norms import create_norm, fold_after, fold_before, fold_into, folded
from visionattn.layers.patch_embed import at_least
from visionattn.layers.tracing import opaque

__all__ = ["Block", "Host", "MixerArgs", "StreamBlock", "StridedConv", "TokenBlock", "mixers", "norm_factory"]

MixerArgs = Mapping[str, object] | Sequence[Mapping[str, object]]
Factory = Callable[..., nn.Module]


class Block(nn.Module):
    """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``, on maps [B, H, W, dim].

    Args:
        dim: Channels.
        attn: The mixer.
        mlp: The feed-forward layer, whose first layer is ``fc1``.
        norm: Makes a norm of a number of channels.
        drop_path: Probability of leaving a branch out of a training sample.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        norm: Factory,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = norm(dim, **dd)
        self.attn = attn
        self.residual1 = ScaledResidual(dim, None, drop_path, **dd)
        self.norm2 = norm(dim, **dd)
        self.mlp = mlp
        self.residual2 = ScaledResidual(dim, None, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(x, self.attn(self.norm1(x)))
        return self.residual2(x, self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold norms that are affine in evaluation into the layers behind them."""
        self.norm1 = fold_into(self.norm1, getattr(self.attn, "fold_input", None))
        self.norm2 = fold_into(self.norm2, partial(fold_before, getattr(self.mlp, "fc1", None)))


class StreamBlock(Block):
    """``Block`` that hands its mixer the map before the norm, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(x, self.attn(self.norm1(x), stream=x))
        return self.residual2(x, self.mlp(self.norm2(x)))


class TokenBlock(Block):
    """``Block`` on prefix tokens and a map as one sequence."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, P + H * W, dim] and the size (H, W) of their map to tokens."""
        x = self.residual1(x, self.attn(self.norm1(x), size))
        return self.residual2(x, self.mlp(self.norm2(x)))


@opaque  # whether it pads depends on the size of the map
class StridedConv(nn.Module):
    """Convolution with stride, then norm; [B, in_chans, H, W] to [B, dim, H', W'].

    Args:
        in_chans: Channels in.
        dim: Channels out.
        kernel_size: Side of the filters.
        stride: Step of the filters.
        padding: Zeros on every side.
        whole: Pad with zeros, right and below, to a multiple of the stride instead of leaving the rest out. A map
            smaller than one filter is padded in any case.
        norm: Makes a norm of a number of channels, for maps [B, dim, H', W'].
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        whole: bool = False,
        *,
        norm: Factory,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.whole = kernel_size, stride, padding, whole
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = norm(dim, nchw=True, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """Padding, convolution and norm."""
        if self.whole and is_exporting():  # enough for any size; what does not fill a patch is left out
            x = F.pad(x, [0, self.stride - 1, 0, self.stride - 1])
        elif self.whole:
            x = F.pad(x, [0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride])
        else:
            x = at_least(x, self.kernel_size - 2 * self.padding)
        return self.norm(self.proj(channels_last(x)))

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the result for a map of some."""
        k, s, p = self.kernel_size, self.stride, self.padding
        H, W = (n + -n % s if self.whole else max(n + 2 * p, k) - 2 * p for n in size)
        return (H + 2 * p - k) // s + 1, (W + 2 * p - k) // s + 1

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold a norm that is affine in evaluation into the convolution."""
        self.norm = fold_into(self.norm, partial(fold_after, self.proj))


class Host(Backbone):
    """What the hosts share besides the contract: initialisation, and folding of norms."""

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal linear layers; everything else as its module says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold every norm that is affine in evaluation, the final one into the classifier where there is one.

        In place, for inference. timm's ``reparameterize_model`` does the same but for the final norm, which it leaves
        as one scale and shift.
        """
        for module in list(self.modules())[1:]:
            if hasattr(module, "reparameterize"):
                module.reparameterize()
        pool = getattr(self.head, "pool_type", None) or self.head.global_pool.pool_type
        if pool in ("avg", "token"):  # which commute with the norm
            self.norm = fold_into(self.norm, partial(fold_before, self.head.fc))
        elif folded(self.norm) is not None:
            self.norm = self.norm.fuse()


def norm_factory(kind: str, eps: float, norm_args: Mapping[str, object] | None = None) -> Factory:
    """A function of channels, ``nchw``, device and dtype; see ``visionattn.layers.norms.create_norm``."""

    def norm(dim: int, nchw: bool = False, device=None, dtype=None) -> nn.Module:
        return create_norm(kind, dim, eps, nchw, device=device, dtype=dtype, **(norm_args or {}))

    return norm


def mixers(
    mixer: MixerLike | None,
    mixer_depths: Sequence[int | None] | None,
    mixer_args: MixerArgs | None,
    depths: Sequence[int],
    told: Sequence[str] = (),
) -> list[list[Factory | None]]:
    """What makes the mixer of every block of every stage; None where the host's own attention stays.

    Args:
        mixer: A ``Mixer`` or its class path; None for none at all.
        mixer_depths: How many blocks of each stage have it, from the first; None for all of a stage or of all stages.
        mixer_args: Arguments of the mixer, for all stages or one mapping a stage.
        depths: Blocks of each stage.
        told: Names of arguments that the caller will give every mixer.

    Raises:
        ValueError: If there is no such mixer, it does not take what it will be told, or a number does not fit the
            stages.
    """
    if mixer is None:
        return [[None] * depth for depth in depths]
    cls = find_mixer(mixer)
    parameters = signature(cls).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        missing = [name for name in told if name not in {p.name for p in parameters}]
        if missing:
            raise ValueError(
                f"mixer {mixer!r} does not fit this host, whose mixers take {', '.join(told)}: it has no "
                f"{', '.join(missing)}; subclasses of visionattn.attention.Mixer have them"
            )
    counts = [None] * len(depths) if mixer_depths is None else list(mixer_depths)
    shared = mixer_args is None or isinstance(mixer_args, Mapping)
    args = [mixer_args or {}] * len(depths) if shared else list(mixer_args)
    if len(counts) != len(depths) or len(args) != len(depths):
        raise ValueError(
            f"mixer_depths and mixer_args must have one entry a stage, {len(depths)}, got {mixer_depths!r} and "
            f"{mixer_args!r}"
        )
    made: list[list[Factory | None]] = []
    for depth, count, kwargs in zip(depths, counts, args, strict=True):
        count = depth if count is None else count
        if not 0 <= count <= depth:
            raise ValueError(f"mixer_depths must be 0 to {depth} in a stage of {depth} blocks, got {count}")
        made.append([partial(cls, **kwargs)] * count + [None] * (depth - count))
    return made
