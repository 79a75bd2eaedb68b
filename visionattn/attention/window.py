"""Window attention of Swin. B batch, H rows, W columns, C channels, h heads, D head dim, w window side, n windows."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from visionattn.attention.mixer import Mixer, unknown_size

__all__ = ["WindowAttention"]

MASKED = -100.0  # what the authors add to the logits of tokens that were not neighbours before the shift


@register_notrace_module  # whether it pads and shifts depends on the size of the map
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
        if window_size < 1:
            raise ValueError(f"window_size must be positive, got {window_size}")
        self.window_size = min(window_size, input_size[0], input_size[1])
        self.masked = MASKED
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
        B, H, W, C = x.shape
        w, h = self.window_size, self.num_heads
        rows, columns = (H + w - 1) // w, (W + w - 1) // w
        qkv = self.qkv(x)
        padded = unknown_size() or rows * w != H or columns * w != W
        if padded:
            # Zeros in front of the projection are its bias behind it.
            bias = self.padding if self.padding is not None else self.qkv.bias
            if bias is not None:
                qkv = qkv - bias
            qkv = F.pad(qkv, [0, 0, 0, columns * w - W, 0, rows * w - H])
            if bias is not None:
                qkv = qkv + bias
        shift = w // 2 if self.shift and (unknown_size() or self.shifted(H, W)) else 0
        if shift > 0:
            qkv = self._roll(qkv, H, W, shift)
        qkv = qkv.reshape(B, rows, w, columns, w, 3, h, self.head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
        qkv = qkv.reshape(3, B, rows * columns * h, w * w, self.head_dim)
        bias = self.bias()[None]
        if shift > 0:
            mask = self.mask(rows, columns, shift, bias)
            if unknown_size():
                mask = mask * self._shifted_any_size(H, W, x.device)
            bias = (bias + mask[:, None]).flatten(0, 1)[None]  # 1 n*h w*w w*w
        else:
            qkv = qkv.reshape(3, B * rows * columns, h, w * w, self.head_dim)
        y = self._softmax(qkv[0], qkv[1], qkv[2], bias)
        y = y.reshape(B, rows, columns, h, w, w, self.head_dim).permute(0, 1, 4, 2, 5, 3, 6)
        y = y.reshape(B, rows * w, columns * w, C)
        if shift > 0:
            y = self._roll(y, H, W, -shift)
        if unknown_size():  # which would be asked of the strides of a slice
            y = y.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
        elif padded:
            y = y[:, :H, :W]
        return self.proj_drop(self.proj(y))

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

    def _roll(self, x: Tensor, H: int, W: int, shift: int) -> Tensor:
        if torch.jit.is_scripting():
            return x.roll([-shift, -shift], [1, 2])
        else:
            return self._roll_any_size(x, H, W, shift) if unknown_size() else x.roll([-shift, -shift], [1, 2])

    @torch.jit.unused
    def _roll_any_size(self, x: Tensor, H: int, W: int, shift: int) -> Tensor:
        by = self._shifted_any_size(H, W, x.device) * shift
        for axis in (1, 2):
            x = x.index_select(axis, (torch.arange(x.shape[axis], device=x.device) + by) % x.shape[axis])
        return x

    def bias(self) -> Tensor:
        """Bias of every query and key of a window. [h, w * w, w * w]"""
        w = self.window_size
        position = torch.arange(w, device=self.relative_position_bias_table.device)
        distance = position[:, None] - position + w - 1
        index = distance[:, None, :, None] * (2 * w - 1) + distance[None, :, None, :]
        return self.relative_position_bias_table[index.reshape(-1)].reshape(w * w, w * w, -1).permute(2, 0, 1)

    def mask(self, rows: int, columns: int, shift: int, like: Tensor) -> Tensor:
        """What separates tokens from the two ends of a shifted map. [n, w * w, w * w]"""
        w = self.window_size
        late = torch.arange(w, device=like.device) >= w - shift
        apart = late[:, None] != late  # w w
        last_row = torch.arange(rows, device=like.device) == rows - 1
        last_column = torch.arange(columns, device=like.device) == columns - 1
        by_row = (last_row[:, None, None] & apart)[:, None, :, None, :, None]
        by_column = (last_column[:, None, None] & apart)[None, :, None, :, None, :]
        mask = (by_row | by_column).expand(rows, columns, w, w, w, w).reshape(rows * columns, w * w, w * w)
        return mask.to(like.dtype) * self.masked

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if bias.requires_grad:  # for which PyTorch's fused attention has no fast path
            return ((q * self.scale) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        if self.qkv.bias is not None:
            self.padding = self.qkv.bias.clone() if self.padding is None else self.padding
        else:
            self.padding = torch.zeros_like(self.qkv.weight[:, 0])
        super().fold_input(scale, shift)
