"""Focused linear attention of FLatten and simplified linear attention of SLAB: a sum over keys, then a sum over D."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.mixer import LinearMixer
from visionattn.layers.blocks import DepthwiseConv, Unused, resize_table
from visionattn.layers.checks import declared
from visionattn.layers.intact import intact
from visionattn.layers.tracing import opaque

__all__ = ["FocusedLinearAttention", "PositionedMixer", "SimplifiedLinearAttention"]

KERNEL = 5  # side of the depthwise convolution


class PositionedMixer(LinearMixer):
    """Base of mixers with positions added to the keys, and a depthwise convolution of the values that all heads share.

    Args: those of ``Mixer``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        input_size: tuple[int, int] = (14, 14),
        num_prefix_tokens: int = 0,
        lepe: bool = False,
        device=None,
        dtype=None,
        **host,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        known = dict(input_size=input_size, num_prefix_tokens=num_prefix_tokens, lepe=lepe)
        super().__init__(dim, num_heads, **known, **host, **dd)
        self.dwc = DepthwiseConv(self.head_dim, KERNEL, **dd)
        self.get_v = DepthwiseConv(dim, 3, **dd) if lepe else None
        self.positional_encoding = nn.Parameter(torch.empty(1, *input_size, dim, **dd))
        P = num_prefix_tokens
        self.prefix_encoding = nn.Parameter(torch.empty(1, P, dim, **dd)) if P else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions start at zero, as the authors' do."""
        nn.init.zeros_(self.positional_encoding)
        if self.prefix_encoding is not None:
            nn.init.zeros_(self.prefix_encoding)

    def positions(self, H: int, W: int) -> Tensor:
        """What is added to the keys, resized bicubically to the map. [1, N, C]"""
        table = resize_table(self.positional_encoding.permute(0, 3, 1, 2), H, W, "bicubic")
        table = table.permute(0, 2, 3, 1).flatten(1, 2)
        return table if self.prefix_encoding is None else torch.cat([self.prefix_encoding, table], 1)

    def local(self, v: Tensor, H: int, W: int) -> Tensor:
        """The convolutions of the values. [B, N, C] -> [B, H, W, C]"""
        if not torch.jit.is_scripting():
            if not intact(self.dwc, DepthwiseConv) or not (self.get_v is None or intact(self.get_v, DepthwiseConv)):
                return self._called(self.map(v, H, W))
        # Repeated for every head, filters of one convolution of the whole map; the one of the host joins in.
        weight, bias = self.dwc.weight.repeat(self.num_heads, 1, 1, 1), self.dwc.bias
        if bias is not None:
            bias = bias.repeat(self.num_heads)
        if self.get_v is not None:
            weight = weight + F.pad(self.get_v.weight, [1, 1, 1, 1])  # 3x3 to 5x5
            extra = self.get_v.bias
            if bias is not None and extra is not None:
                bias = bias + extra
        return self.dwc.convolve(self.map(v, H, W), weight, bias)

    @torch.jit.unused
    def _called(self, x: Tensor) -> Tensor:
        """The convolutions one after the other, as modules. [B, H, W, C]"""
        B, heads = x.shape[0], [self.num_heads, self.head_dim]
        y = self.dwc(x.unflatten(3, heads).permute(0, 3, 1, 2, 4).flatten(0, 1))  # B * h H W D
        y = y.unflatten(0, [B, self.num_heads]).permute(0, 2, 3, 1, 4).flatten(3)
        return y if self.get_v is None else y + self.get_v(x)


@opaque  # whether positions are resized depends on the size of the map
class FocusedLinearAttention(PositionedMixer):
    """``phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)) + dwc(v)`` (FLatten, arXiv 2308.00442).

    phi cubes ``relu(x) / softplus(scale)`` and restores the norm of the whole token, which sharpens its direction.

    Args: those of ``Mixer``.
    """

    short_name = "flatten"

    def __init__(self, dim: int, num_heads: int, *, device=None, dtype=None, **host) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, **host, **dd)
        self.temperature = nn.Parameter(torch.zeros(1, 1, dim, **dd))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "temperature"):
            nn.init.zeros_(self.temperature)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        return self.mix(q, k + self.positions(H, W), v, self.local(v, H, W), "focused", "mean", self.temperature)


@opaque  # whether positions are resized depends on the size of the map
@declared
class SimplifiedLinearAttention(PositionedMixer):
    """``relu(q) (relu(k)^T v) / (relu(q) . sum relu(k)) + dwc(v)`` (SLAB, arXiv 2405.11582).

    Args:
        unused_scale: Hold the ``scale`` of the authors' CSwin, which its forward pass leaves out.
        host: Arguments of ``Mixer``.
    """

    short_name = "slab"

    def __init__(
        self, dim: int, num_heads: int, unused_scale: bool = False, *, device=None, dtype=None, **host
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, **host, **dd)
        self.unused = Unused(dict(scale=(1, 1, dim)), **dd) if unused_scale else nn.Identity()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        y = self.mix(q, k + self.positions(H, W), v, self.local(v, H, W), "relu", "sum")
        return self.unused(y)
