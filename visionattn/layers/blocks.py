"""Pieces that blocks of several families share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_function
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from visionattn.kernels import (
    autocasting,
    crop_map,
    depthwise_conv2d,
    depthwise_conv2d_gelu,
    eager,
    is_channels_last,
    linear,
    linear_gelu,
    pad_map,
)
from visionattn.layers.intact import hooked, intact, pointwise, same_size_depthwise
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = [
    "DepthwiseConv",
    "DepthwiseMlp",
    "Linear",
    "Mlp",
    "PreNormBlock",
    "ScaledResidual",
    "activated",
    "crop",
    "in_slices",
    "pad_to_multiple",
    "Unused",
    "resize_table",
]

# A share of the third-level cache. Measured on VAN at 224 px, batch 8, two threads: 1.8 times (B0) and 1.4 times (B2)
# the speed of whole batches, whose maps above 32 MiB the allocator returns to the system after every operator and gets
# back page by page. 4 MiB is as good, 16 a little worse.
SLICE_BYTES = 8 * 2**20
# How many times its size a table is stretched to by matrix products: 16 times (7x7 to 28x28) in 0.4 of the time of
# F.interpolate, 64 times in 0.3, 4 times in 1.1. Measured on an AMD EPYC, one thread.
STRETCH = 16


@register_notrace_function  # whether it pads depends on the size
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros after the last row and column, so that ``multiple`` divides the sides of the map. [B, H, W, C]"""
    if multiple == 1:
        return x
    height = (x.shape[1] + multiple - 1) // multiple * multiple
    width = (x.shape[2] + multiple - 1) // multiple * multiple
    return pad_map(x, height, width)


crop = register_notrace_function(crop_map)


def in_slices(branch: Callable[[Tensor], Tensor], x: Tensor, widest: int, channels: int | None = None) -> Tensor:
    """``branch(x)``, a few samples at a time where that keeps its widest map in the CPU's cache.

    Only inference on a CPU is sliced: training keeps every map anyway, and compilers and exporters get the whole batch.
    So do hooks of the modules in ``branch``.

    Args:
        branch: Function of each sample alone, such as an MLP: a module, or a method of one.
        x: Batch of maps, [B, C, H, W] or with the channels elsewhere.
        widest: Channels of the widest map inside ``branch``, at the resolution of ``x``.
        channels: Channels of ``x``, if they are not its axis 1.
    """
    whole = type(x) is not Tensor or x.device.type != "cpu" or torch.is_grad_enabled()
    if whole or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return branch(x)
    positions = x.shape[1:].numel() // (channels or x.shape[1] or 1)
    samples = max(1, SLICE_BYTES // max(1, widest * positions * x.element_size()))
    if samples >= len(x):
        return branch(x)
    owner = getattr(branch, "__self__", branch)
    if _has_any_global_hook() or any(hooked(module) for module in owner.modules()):
        return branch(x)
    return torch.cat([branch(part) for part in x.split(samples)])


class _AsLinear(type):
    """Makes ``Linear``, not its subclasses, equal to ``nn.Linear`` as a class: ``Linear == nn.Linear``.

    torch.ao and others find layers to replace by class, in tables and lists that hold ``nn.Linear``. A subclass would
    be passed over without a word, though what ``Linear`` computes is what they expect.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is nn.Linear and cls.__base__ is nn.Linear)

    def __hash__(cls) -> int:
        return type.__hash__(nn.Linear if cls.__base__ is nn.Linear else cls)


@opaque  # which operator runs depends on the tensor
class Linear(nn.Linear, metaclass=_AsLinear):
    """``nn.Linear`` that float32 on a CPU runs in the library which is the fastest there, see ``kernels/dense``.

    As a class it equals ``nn.Linear``, so that ``quantize_dynamic(model, {nn.Linear})`` replaces it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        else:
            return self._fastest(x)

    @torch.jit.unused
    def _fastest(self, x: Tensor) -> Tensor:
        if not plain(self.weight):
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def plain(weight: object) -> bool:
    """Whether a weight is neither quantized nor distributed: what such a tensor knows is ``F.linear``."""
    return type(weight) in (nn.Parameter, Tensor)


@torch.jit.unused
def activated(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """``act(layer(x))``; in inference on a CPU GELU is part of a product or a convolution. Not for TorchScript."""
    usual = not torch.is_grad_enabled() and intact(act, nn.GELU) and act.approximate == "none"
    if not usual or not plain(getattr(layer, "weight", None)):
        return act(layer(x))
    if intact(layer, Linear):
        return linear_gelu(x, layer.weight, layer.bias)
    if not isinstance(x, Tensor) or x.device.type != "cpu" or not eager(x):  # others know the layers as they are
        return act(layer(x))
    if intact(layer, DepthwiseConv) and layer.usual:
        return depthwise_conv2d_gelu(x.permute(0, 3, 1, 2), layer.weight, layer.bias).permute(0, 2, 3, 1)
    if same_size_depthwise(layer) and layer.dilation == (1, 1):
        return depthwise_conv2d_gelu(x, layer.weight, layer.bias)
    if pointwise(layer) and x.dim() == 4 and is_channels_last(x):
        return linear_gelu(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)
    return act(layer(x))


@opaque  # which operator runs depends on the tensor
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution with bias that keeps the size of maps with the channels last. [B, H, W, dim]

    Args:
        dim: Channels.
        kernel_size: Side of the kernel, odd.
        *adapter: Kernel size, stride and so on of ``nn.Conv2d``, whose arguments may be given instead: adapters (LoRA)
            make their layers of the class that they adapt. Such a layer is any convolution of maps of this layout.
        **settings: Further arguments of ``nn.Conv2d``.
    """

    def __init__(self, dim: int, kernel_size: int, *adapter: Any, device=None, dtype=None, **settings: Any) -> None:
        usual = not adapter and not settings
        if usual:
            same = dict(padding=kernel_size // 2, groups=dim)
            super().__init__(dim, dim, kernel_size, device=device, dtype=dtype, **same)
        else:
            super().__init__(dim, kernel_size, *adapter, device=device, dtype=dtype, **settings)
        self.usual, self.exportable = usual, built_for_export()

    def forward(self, x: Tensor) -> Tensor:
        if not self.usual:
            return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with other weights, of which there may be more and of another odd side."""
        x = x.permute(0, 3, 1, 2)
        if torch.jit.is_scripting() or self.exportable:
            x = F.conv2d(x, weight, bias, padding=[weight.shape[2] // 2] * 2, groups=weight.shape[0])
        else:
            x = self._fused(x, weight, bias)
        return x.permute(0, 2, 3, 1)

    @torch.jit.unused
    def _fused(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return depthwise_conv2d(x, weight, bias)


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` on [B, ..., dim], a few samples at a time where that keeps the hidden layer in the cache.

    Args:
        dim: Channels in and out.
        hidden: Channels between the two layers.
        drop: Dropout after each layer.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.hidden = hidden
        self.fc1 = Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._mlp(x)
        else:
            return self._sliced(x)

    def _mlp(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.act(self.fc1(x))
        else:
            x = activated(self.fc1, self.act, x)
        return self.drop(self.fc2(self.drop(x)))

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mlp, x, self.hidden, x.shape[-1])


class DepthwiseMlp(Mlp):
    """``fc2(gelu(dwconv(fc1(x))))`` with a depthwise 3x3 in the middle, on [B, H, W, dim]. Arguments as of ``Mlp``."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__(dim, hidden, drop, device=device, dtype=dtype)
        self.dwconv = DepthwiseConv(hidden, 3, device=device, dtype=dtype)

    def _mlp(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(self.dwconv(x)) if torch.jit.is_scripting() else activated(self.dwconv, self.act, x)
        return self.drop(self.fc2(self.drop(x)))


class ScaledResidual(nn.Module):
    """``x + drop_path(gamma * branch)``, in one pass over memory where no path is dropped.

    Args:
        dim: Channels; ``gamma`` is the learned layer scale of each.
        init_value: What ``gamma`` starts at; None for no layer scale, ``x + drop_path(branch)``.
        drop_path: Probability of leaving the branch out of a training sample.
        nchw: Whether the channels are axis 1 of maps [B, C, H, W] instead of the last axis.
    """

    def __init__(
        self,
        dim: int,
        init_value: float | None = None,
        drop_path: float = 0.0,
        nchw: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.init_value = init_value
        self.drop_prob = drop_path
        self.nchw = nchw
        gamma = None if init_value is None else nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.register_parameter("gamma", gamma)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Shortcut and branch, of the same shape, to their sum."""
        gamma = self.gamma
        if gamma is None:
            return x + self.drop_path(branch)
        if self.nchw:
            gamma = gamma[:, None, None]
        if self.training and self.drop_prob > 0.0:
            return x + self.drop_path(branch * gamma)
        return torch.addcmul(x, branch, gamma)


class PreNormBlock(nn.Module):
    """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``, on a grid [B, H, W, dim].

    Args:
        dim: Channels.
        mixer: The attention, from grid to grid.
        mlp_ratio: Hidden over outer width of the MLP.
        layer_scale: Initial scale of each branch, or those of attention and MLP; None for unscaled branches.
        proj_drop: Dropout inside the MLP.
        drop_path: Stochastic depth of both branches.
        eps: Of both layer norms.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None | tuple[float | None, float | None] = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        scale1, scale2 = layer_scale if isinstance(layer_scale, tuple) else (layer_scale, layer_scale)
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = mixer
        self.residual1 = ScaledResidual(dim, scale1, drop_path, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.residual2 = ScaledResidual(dim, scale2, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(x, self.attn(self.norm1(x)))
        return self.residual2(x, self.mlp(self.norm2(x)))


def resize_table(table: Tensor, H: int, W: int, mode: str) -> Tensor:
    """A table of positions at the size of a map, by the centres of its cells; the table itself if it fits.

    Args:
        table: [n, C, H', W']
        H: Rows of the map.
        W: Columns of the map.
        mode: ``"bilinear"`` or ``"bicubic"``.
    """
    known = True
    if not torch.jit.is_scripting():
        # While a graph is exported for any size the numbers are symbols, of which nothing must be asked.
        known = type(H) is int and type(W) is int
    if known and table.shape[2] == H and table.shape[3] == W:
        return table
    precise = table.float() if table.dtype in (torch.float16, torch.bfloat16) else table
    if not torch.jit.is_scripting():
        stretches = known and table.device.type == "cpu" and H * W >= STRETCH * table.shape[2:].numel()
        if stretches and eager(table) and not autocasting(table):
            return _stretched(precise, H, W, mode).to(table.dtype)
    # Of a table with its channels last, export asks how the strides of the result compare.
    return F.interpolate(precise.contiguous(), size=[H, W], mode=mode, align_corners=False).to(table.dtype)


def _stretched(table: Tensor, H: int, W: int, mode: str) -> Tensor:
    """``F.interpolate`` of a table [n, C, H', W'] as products with the weights of its rows and of its columns."""
    rows, columns = table.shape[2:]
    unit = [torch.eye(n, dtype=table.dtype)[None, None] for n in (rows, columns)]
    down = F.interpolate(unit[0], size=[H, rows], mode=mode, align_corners=False)[0, 0]
    across = F.interpolate(unit[1], size=[columns, W], mode=mode, align_corners=False)[0, 0]
    return down @ (table.reshape(-1, columns) @ across).view(*table.shape[:3], W)


@opaque  # a traced graph would keep the mode it was traced in
class Unused(nn.Module):
    """Parameters that a release holds and its forward pass leaves out, so that checkpoints stay whole.

    The module returns its input. In training the parameters get gradients of zero, since data-parallel training and
    timm's clients expect one of every parameter.

    Args:
        shapes: Shape of each parameter by name.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device=None, dtype=None) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return x
        else:
            return self._counted(x) if self.training else x

    @torch.jit.unused
    def _counted(self, x: Tensor) -> Tensor:
        for parameter in self.parameters():
            x = x + 0.0 * parameter.sum().to(x.dtype)
        return x
