"""Window attention of Swin. B batch, H rows, W columns, C channels, h heads, D head dim."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.attention.mixer import Mixer, unknown_size
from visionattn.kernels import window_attention, window_attention_export
from visionattn.kernels.window import MASKED
from visionattn.layers.blocks import Linear, crop, pad_to_multiple
from visionattn.layers.checks import check_map, declared
from visionattn.layers.intact import intact
from visionattn.layers.norms import check_foldable
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = ["WindowAttention"]


@opaque  # whether it pads and shifts depends on the size of the map
@declared
class WindowAttention(Mixer):
    """Softmax attention within windows, with a learned bias per distance (Swin, arXiv 2103.14030).

    Maps that are no multiple of the window are padded with zeros, right and below, which are keys and values like any
    token. A window larger than ``input_size`` shrinks to it and is not shifted.

    Args:
        window_size: Side of a window.
        shift: Whether windows are shifted by half a window, around the borders; tokens that meet there do not see
            each other.
        shift_small_maps: Whether a map not larger than a window is shifted, too, as in the authors' detectors and
            unlike in their classifiers. None: only maps of another size than ``input_size``.

    Raises:
        ValueError: If ``window_size`` is not positive.
    """

    short_name = "window"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        shift: bool = False,
        shift_small_maps: bool | None = None,
        input_size: tuple[int, int] = (56, 56),
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, input_size, qkv_bias=qkv_bias, **dd)
        self.window_size = min(window_size, input_size[0], input_size[1])
        self.masked = MASKED
        self.exportable = built_for_export()
        self.shift = shift
        self.shift_small_maps = shift_small_maps
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * self.window_size - 1) ** 2, num_heads, **dd))
        self.register_buffer("padding", None)  # what fold_input leaves of a padded token
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation of the bias table; the projections keep theirs."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, stream: Tensor | None = None) -> Tensor:
        check_map(x)
        H, W = x.shape[1], x.shape[2]
        h, D = self.num_heads, self.head_dim
        bias = self.padding
        called = bias is None
        if bias is None:
            if not torch.jit.is_scripting():
                if intact(self.qkv, Linear):
                    bias = self.qkv.bias  # zeros in front of the projection are its bias behind it
                    called = False
        if called:
            x = pad_to_multiple(x, self.window_size)
        qkv = self.qkv(x).unflatten(-1, [3, h, D])
        padding = None if bias is None else bias.view(3, h, D)
        window = [self.window_size, self.window_size]
        if torch.jit.is_scripting():
            shift = self.window_size // 2 if self.shift and self.shifted(H, W) else 0
            table = self.relative_position_bias_table
            shifts, scale = [shift, shift], self.scale
            y = window_attention_export(qkv, window, shifts, table, padding, self.masked, scale)
        else:
            y = self._fused(qkv, H, W, window, padding)
        y = y.flatten(3)
        return self.proj_drop(self.proj(crop(y, H, W) if called else y))

    @torch.jit.unused
    def _fused(self, qkv: Tensor, H: int, W: int, window: list[int], padding: Tensor | None) -> Tensor:
        shift = self.window_size // 2 if self.shift else 0
        arguments = self.relative_position_bias_table, padding, self.masked, self.scale
        if unknown_size():
            shifted = self._shifted_any_size(H, W, qkv.device) if shift else None
            return window_attention_export(qkv, window, [shift, shift], *arguments, True, shifted)
        shift = shift if self.shifted(H, W) else 0
        return window_attention(qkv, window, shift, *arguments, "torch" if self.exportable else None)

    def shifted(self, H: int, W: int) -> bool:
        """Whether windows of a map of some size are shifted, if those of the module are."""
        small = self.shift_small_maps
        if small is None:
            small = H != self.input_size[0] or W != self.input_size[1]
        return small or min(H, W) > self.window_size

    @torch.jit.unused
    def _shifted_any_size(self, H: int, W: int, device: torch.device) -> Tensor:
        """``shifted`` as a number 0 or 1, by operators that keep sizes open."""
        rows, columns = torch.scalar_tensor(H, device=device), torch.scalar_tensor(W, device=device)
        large = (rows > self.window_size) & (columns > self.window_size)
        if self.shift_small_maps is None:
            return (large | (rows != self.input_size[0]) | (columns != self.input_size[1])).long()
        return torch.ones_like(rows).long() if self.shift_small_maps else large.long()

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        check_foldable(self.qkv)
        if self.qkv.bias is not None:
            self.padding = self.qkv.bias.clone() if self.padding is None else self.padding
        else:
            self.padding = torch.zeros_like(self.qkv.weight[:, 0])
        super().fold_input(scale, shift)
