"""timm's blocks, calling their attention as the hosts of this library call a mixer.

A block of timm becomes one of these by its class: parameters, names, stochastic depth and MLP are those it had.
"""

from collections.abc import Mapping

import torch
from timm.layers import register_notrace_function, resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from visionattn.attention import WindowAttention
from visionattn.attention.mixer import unknown_size
from visionattn.layers.blocks import crop, pad_to_multiple

__all__ = ["GridBlock", "MapBlock", "MapSize", "TokenBlock", "WindowBlock", "window_arguments"]


class MapSize:
    """Rows and columns of the map that the tokens of a ViT are; one for all its blocks, no part of its state.

    A model of one image size has the grid of its patch embedding, also after ``set_input_size``. A model of any size
    has that of the images last embedded, which a hook notes. Activation checkpointing asks again in the backward pass,
    when other images may have been embedded since; what it was then is told by the number of tokens.

    Args:
        patch_embed: Patch embedding of timm.
    """

    def __init__(self, patch_embed: nn.Module) -> None:
        self.patch_embed = patch_embed
        self.any_size = not getattr(patch_embed, "strict_img_size", True)
        self.last: tuple[int, int] | None = None
        self.waiting: set[tuple[int, int]] = set()  # sizes since the last backward pass
        self.backward = False
        if self.any_size:
            patch_embed.register_forward_hook(self.note)

    def __getstate__(self) -> dict:
        return dict(self.__dict__, last=None, waiting=set(), backward=False)

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the patch embedding."""
        rows, columns = module.dynamic_feat_size((inputs[0].shape[-2], inputs[0].shape[-1]))
        self.last = (rows, columns)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.waiting = {self.last} if self.backward else {*self.waiting, self.last}
        self.backward = False

    def of(self, positions: int) -> tuple[int, int]:
        """Rows and columns of a map of so many positions.

        Raises:
            RuntimeError: If activations are computed again and maps of several shapes have that many.
        """
        if not self.any_size:
            return self.patch_embed.grid_size
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self.backward = True
            fitting = [size for size in self.waiting if size[0] * size[1] == positions]
            if len(fitting) != 1:
                raise RuntimeError(
                    f"gradient checkpointing cannot tell which of the maps {sorted(fitting)} it computes again; run "
                    "the backward pass after every forward pass"
                )
            return fitting[0]
        return self.last


@register_notrace_function  # it compares sizes
def checked(x: Tensor, prefix: int, rows: int, columns: int) -> Tensor:
    """The tokens, if they are a prefix and a map of that size."""
    if x.shape[1] != prefix + rows * columns:
        raise ValueError(f"expected {prefix} + {rows} * {columns} tokens, got {x.shape[1]}: the map's size is unknown")
    return x


@register_notrace_function  # a traced graph has masks as inputs
def unmasked(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """The tokens, if there is no mask."""
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported by a mixer, which sees every token")
    return x


class TokenBlock(Block):
    """timm's ViT block with a mixer that takes prefix tokens and map as one sequence. Made by ``become``."""

    @classmethod
    def become(cls, block: Block, mixer: nn.Module, num_prefix_tokens: int, sizes: MapSize | None) -> None:
        """Turn a block into this class, in place.

        Args:
            block: Whose attention is replaced.
            mixer: What takes its place.
            num_prefix_tokens: Tokens before the map.
            sizes: Where the size of the map is known; None for mixers that need none.
        """
        block.__class__ = cls
        block.attn = mixer
        block.num_prefix_tokens = num_prefix_tokens
        block.sizes = sizes
        block.rows = block.columns = 0

    def __prepare_scriptable__(self) -> nn.Module:
        if self.sizes is not None:
            if self.sizes.any_size:
                raise ValueError("TorchScript needs a model of one image size, got one built with dynamic_img_size")
            self.rows, self.columns = self.sizes.of(0)
        return self

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, P + H * W, dim] to tokens.

        Raises:
            ValueError: If there is a mask, or the tokens are not those of the map.
        """
        x = unmasked(x, attn_mask, is_causal)
        x = x + self.drop_path1(self.ls1(self.mix(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def mix(self, x: Tensor) -> Tensor:
        """The mixer on tokens [B, P + H * W, dim]."""
        rows, columns = self.size(x)
        return self.attn(x, (rows, columns))

    def size(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the map behind the prefix tokens."""
        if torch.jit.is_scripting():
            if self.rows == 0:
                return 1, x.shape[1] - self.num_prefix_tokens
            x = checked(x, self.num_prefix_tokens, self.rows, self.columns)
            return self.rows, self.columns
        else:
            return self._size(x)

    @torch.jit.unused
    def _size(self, x: Tensor) -> tuple[int, int]:
        if self.sizes is None:
            return 1, x.shape[1] - self.num_prefix_tokens
        rows, columns = self.sizes.of(x.shape[1] - self.num_prefix_tokens)
        if not unknown_size():
            checked(x, self.num_prefix_tokens, rows, columns)
        return rows, columns


class GridBlock(TokenBlock):
    """timm's ViT block without prefix tokens and with a mixer that takes maps only."""

    def mix(self, x: Tensor) -> Tensor:
        rows, columns = self.size(x)
        return self.attn(x.unflatten(1, [rows, columns])).flatten(1, 2)


class MapBlock(SwinTransformerBlock):
    """timm's Swin block with a mixer that takes the whole map, of any size."""

    @classmethod
    def become(cls, block: SwinTransformerBlock, mixer: nn.Module) -> None:
        """Turn a block into this class, in place."""
        block.__class__ = cls
        block.attn = mixer
        block._init_buffers()

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def _init_buffers(self) -> None:
        self.register_buffer("attn_mask", None, persistent=False)

    @torch.jit.ignore
    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Note the size, for code that asks the block; the mixer follows the map that it gets."""
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        self.window_size, self.shift_size = self._calc_window_shift(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]


class WindowBlock(MapBlock):
    """timm's Swin block with ``WindowAttention``.

    timm shifts a map before it pads it, the authors and ``WindowAttention`` after: a map that is no multiple of the
    window comes to it padded by the block, with the zeros where they are in timm once it has shifted them.
    """

    def _attn(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        x = pad_shifted(x, self.window_size[0], self.shift_size[0])
        return crop_shifted(self.attn(x), H, W, self.shift_size[0])

    @torch.jit.ignore
    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Resample the table of biases for another window, as timm does.

        Raises:
            ValueError: If windows would not be squares shifted along both axes, which ``WindowAttention`` has.
        """
        super().set_input_size(feat_size, window_size, always_partition)
        arguments = window_arguments(self)
        self.attn.shift = arguments["shift"]
        _resize_window(self.attn, arguments["window_size"])


def _fits(H: int, W: int, side: int) -> bool:
    return not unknown_size() and H % side == 0 and W % side == 0


@torch.fx.wrap  # whether it pads depends on the size; timm's own register sees functions called by forward itself
def pad_shifted(x: Tensor, side: int, shift: int) -> Tensor:
    """A map whose padding to a multiple of ``side`` is behind its last row and column once it is shifted."""
    if shift == 0 or _fits(x.shape[1], x.shape[2], side):
        return x
    return pad_to_multiple(x.roll([-shift, -shift], [1, 2]), side).roll([shift, shift], [1, 2])


@torch.fx.wrap
def crop_shifted(x: Tensor, H: int, W: int, shift: int) -> Tensor:
    """The map that ``pad_shifted`` has padded."""
    if shift == 0 or (not unknown_size() and x.shape[1] == H and x.shape[2] == W):
        return x
    return crop(x.roll([-shift, -shift], [1, 2]), H, W).roll([shift, shift], [1, 2])


def window_arguments(block: SwinTransformerBlock) -> Mapping[str, object]:
    """Arguments of ``WindowAttention`` for the windows of a Swin block of timm.

    Raises:
        ValueError: If they are not squares, or shifted by another distance than half their side.
    """
    side = block.window_size[0]
    if tuple(block.window_size) != (side, side) or tuple(block.shift_size) not in ((0, 0), (side // 2, side // 2)):
        raise ValueError(
            f"windows of {tuple(block.window_size)} shifted by {tuple(block.shift_size)} on a map of "
            f"{tuple(block.input_resolution)}: window attention has squares, shifted by half their side along both "
            "axes or not at all; leave the block out with blocks=, or set another window_size"
        )
    # timm decides once for all maps whether windows are shifted.
    return dict(window_size=side, shift=any(block.shift_size), shift_small_maps=True)


@torch.no_grad()
def _resize_window(attn: WindowAttention, side: int) -> None:
    if side == attn.window_size:
        return
    table, old = attn.relative_position_bias_table, attn.window_size
    shape = ((2 * side - 1) ** 2, attn.num_heads)
    resized = resize_rel_pos_bias_table(table, (side, side), shape, (old, old))
    attn.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
    attn.window_size = side
