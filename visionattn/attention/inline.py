"""InLine attention: linear attention whose weights add up to one by subtraction, and an input-made convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.mixer import LinearMixer
from visionattn.kernels import exporting
from visionattn.layers.blocks import DepthwiseConv
from visionattn.layers.intact import intact
from visionattn.layers.norms import check_foldable
from visionattn.layers.tracing import opaque

__all__ = ["InLineAttention"]

SIDE = 3  # of the dynamic convolution


@opaque  # which path runs depends on the tensor
class InLineAttention(LinearMixer):
    """``mean(v) + s q (k^T v / N - mean(k) mean(v)^T) + conv(v)``, with a filter made from mean(x) (arXiv 2412.06590).

    Args: those of ``Mixer``.
    """

    short_name = "inline"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lepe: bool = False,
        device=None,
        dtype=None,
        **host,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, lepe=lepe, **host, **dd)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, SIDE * SIDE * dim, 1, groups=num_heads, **dd),
        )
        self.get_v = DepthwiseConv(dim, SIDE, **dd) if lepe else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        filters = self.residual(context.mean(1)[:, :, None]).reshape(q.shape[0], q.shape[2], 1, 3, 3)  # B C 1 3 3
        bias: Tensor | None = None
        if not torch.jit.is_scripting():
            if self.get_v is not None and not intact(self.get_v, DepthwiseConv):
                maps = self.map(v, H, W)
                local = self._convolve(maps, filters.to(v.dtype), None) + self.get_v(maps)
                return self.mix(q, k, v, local, "identity", "inline")
        if self.get_v is not None:
            filters, bias = filters + self.get_v.weight, self.get_v.bias
        local = self._convolve(self.map(v, H, W), filters.to(v.dtype), bias)
        return self.mix(q, k, v, local, "identity", "inline")

    def _convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        """Depthwise convolution of every sample with its own filters. [B, H, W, C], [B, C, 1, 3, 3]"""
        if not torch.jit.is_scripting():
            eager = type(x) is Tensor and not (torch.compiler.is_compiling() or exporting())
            if eager and x.device.type == "cpu":
                return self._one_by_one(x, filters, bias)
            if torch.jit.is_tracing():
                return self._tap_by_tap(x, filters, bias)
        B, H, W, C = x.shape
        y = x.permute(0, 3, 1, 2).reshape(1, B * C, H, W)
        y = F.conv2d(y, filters.flatten(0, 1), padding=1, groups=B * C).reshape(B, C, H, W).permute(0, 2, 3, 1)
        return y if bias is None else y + bias

    @torch.jit.unused
    def _one_by_one(self, x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        # One convolution of B * C channels would need the map in the layout that is slow on a CPU.
        maps = x.permute(0, 3, 1, 2)
        pairs = zip(maps, filters, strict=True)
        parts = [F.conv2d(m[None], f, bias, padding=SIDE // 2, groups=len(f)) for m, f in pairs]
        return torch.cat(parts).permute(0, 2, 3, 1) if parts else torch.empty_like(x)

    @torch.jit.unused
    def _tap_by_tap(self, x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
        # The number of groups of a convolution would be a constant of the traced graph, and with it that of samples.
        H, W = x.shape[1], x.shape[2]
        x = F.pad(x, [0, 0, 1, 1, 1, 1])
        taps = filters.flatten(2).permute(2, 0, 1)[:, :, None, None]  # 9 B 1 1 C
        y = sum(x[:, i // SIDE : i // SIDE + H, i % SIDE : i % SIDE + W] * taps[i] for i in range(SIDE * SIDE))
        return y if bias is None else y + bias

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        check_foldable(self.qkv, *([] if self.stream else [self.residual[0]]))
        super().fold_input(scale, shift)
        if not self.stream:  # the filters are made from the input, too
            first = self.residual[0]
            groups = self.num_heads
            bias = (first.weight[:, :, 0].unflatten(0, (groups, -1)) * shift.view(groups, 1, -1)).sum(-1).flatten()
            weight = first.weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, 1)
            first.weight = nn.Parameter(weight.flatten(0, 1))
            first.bias = nn.Parameter(first.bias + bias)
