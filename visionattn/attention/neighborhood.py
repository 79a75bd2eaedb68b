"""Neighborhood attention: every position attends to the K nearest per axis. B batch, h heads, D head dim, K window."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import exporting, neighborhood_attention, neighborhood_attention_export
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import LARGEST, check_heads, check_tensor, declared
from visionattn.layers.patch_embed import shortfall
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = ["NeighborhoodAttention"]

POSITIONS = ("bias", "rope", "none")
SMALL_MAPS = ("pad", "shrink", "error")


@opaque  # which path runs depends on the size of the map
@declared
class NeighborhoodAttention(nn.Module):
    """``proj(softmax(scale * q k^T + rpb) v)`` over each position's window (arXiv 2204.07143, dilated 2209.15001).

    Args:
        dim: Channels of the map. [B, *spatial, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        kernel_size: Window side K, for all axes or one per axis.
        dilation: Distance between the keys of a window, for all axes or one per axis.
        axes: Number of spatial axes, 1 to 3.
        is_causal: Whether a position sees only itself and earlier ones on the axis, for all axes or one per axis.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        scale: Factor of the logits; None stands for D ** -0.5.
        position: ``"bias"`` for the learned table ``rpb`` [h, 2 * K - 1, ...], indexed by key - query + K - 1;
            ``"rope"`` for axial rotary embedding of queries and keys; ``"none"``.
        small_maps: What happens on an axis of length L < kernel_size * dilation. ``"pad"``: zeros after the end, which
            are projected and attended to like any position (natten up to 0.15, hence all published checkpoints).
            ``"shrink"``: dilation at most L // K, then the largest odd window that fits, with the middle of the bias
            table. ``"error"``: ValueError (natten since 0.17).
        attn_drop: Dropout of attention weights; above 0, training takes a slower path.
        proj_drop: Dropout of the output.
        rope_theta: Longest wavelength of ``"rope"``, over 2 pi positions.

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    short_name = "neighborhood"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        axes: int = 2,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        position: str = "bias",
        small_maps: str = "pad",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rope_theta: float = 100.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        if isinstance(axes, bool) or axes not in (1, 2, 3):
            raise ValueError(f"axes must be 1, 2 or 3, got {axes!r}")
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if small_maps not in SMALL_MAPS:
            raise ValueError(f"small_maps must be one of {', '.join(SMALL_MAPS)}, got {small_maps!r}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = _per_axis("kernel_size", kernel_size, axes)
        self.dilation = _per_axis("dilation", dilation, axes)
        self.is_causal = [bool(causal) for causal in _per_axis("is_causal", is_causal, axes)]
        if min(self.kernel_size) < 1 or min(self.dilation) < 1:
            raise ValueError(f"kernel_size and dilation must be at least 1, got {kernel_size!r} and {dilation!r}")
        padded = self.dilation if small_maps == "pad" else [1] * axes
        if math.prod(K * d for K, d in zip(self.kernel_size, padded, strict=True)) > LARGEST**2:
            raise ValueError(
                f"kernel_size * dilation must span at most {LARGEST**2} positions, got {kernel_size!r} and {dilation!r}"
            )
        if position == "rope" and self.head_dim % (2 * axes):
            raise ValueError(f"position 'rope' needs a head dim divisible by {2 * axes}, got {self.head_dim}")
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.position = position
        self.small_maps = small_maps
        self.rope_theta = rope_theta
        self.exportable = built_for_export()
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        if position == "bias":
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * K - 1 for K in self.kernel_size), **dd))
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation of the bias table; the projections keep theirs."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}, position={self.position!r}, small_maps={self.small_maps!r}"
        )

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_tensor(x, "[B, *spatial, C]")
        if x.dim() != len(self.kernel_size) + 2:
            raise ValueError(f"x must be [B, *spatial, C] with {len(self.kernel_size)} spatial axes, got {x.dim() - 2}")
        spatial = x.shape[1:-1]
        kernel_size, dilation, rpb = self._window(spatial)
        if self.small_maps == "pad":
            x = self._pad(x)
        # Views of the fused projection, never copies: the operator reads them by their strides.
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).unbind(-3)  # each B *spatial h D
        if self.position == "rope":
            cos, sin = _rotation(x.shape[1:-1], self.head_dim, self.rope_theta, q)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        drop = self.attn_drop.p if self.training else 0.0
        if torch.jit.is_scripting() or self.exportable or drop > 0.0:
            y = neighborhood_attention_export(q, k, v, kernel_size, dilation, rpb, self.is_causal, self.scale, drop)
        else:
            y = self._fused(q, k, v, kernel_size, dilation, rpb)
        y = y.flatten(-2)
        if self.small_maps == "pad":
            y = self._crop(y, spatial)
        return self.proj_drop(self.proj(y))

    @torch.jit.unused
    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, kernel_size: list[int], dilation: list[int], rpb: Tensor | None
    ) -> Tensor:
        return neighborhood_attention(q, k, v, kernel_size, dilation, rpb, self.is_causal, self.scale)

    def _pad(self, x: Tensor) -> Tensor:
        pads = [0, 0]
        short = False
        for i in range(len(self.kernel_size) - 1, -1, -1):
            L, needed = x.shape[i + 1], self.kernel_size[i] * self.dilation[i]
            if torch.jit.is_scripting():
                missing = max(needed - L, 0)
                short = short or missing > 0
            else:
                exported = exporting()  # where a comparison would fix the size
                missing = shortfall(L, needed) if exported else max(needed - L, 0)
                short = short or exported or missing > 0
            pads += [0, missing]
        return F.pad(x, pads) if short else x

    def _crop(self, y: Tensor, spatial: list[int]) -> Tensor:
        if torch.jit.is_scripting():
            for i in range(len(spatial)):
                y = y.narrow(i + 1, 0, spatial[i])
        else:
            copied = exporting()  # there, a view would ask whether it is contiguous, which fixes the size
            for i in range(len(spatial)):
                length = spatial[i]
                y = (
                    y.index_select(i + 1, torch.arange(length, device=y.device))
                    if copied
                    else y.narrow(i + 1, 0, length)
                )
        return y

    def _window(self, spatial: list[int]) -> tuple[list[int], list[int], Tensor | None]:
        """Window sides, dilations and bias table for a map of this size."""
        kernel_size, dilation, rpb = self.kernel_size[:], self.dilation[:], self.rpb
        if self.small_maps != "pad":
            for i in range(len(spatial)):
                L, K, d = spatial[i], kernel_size[i], dilation[i]
                if K * d > L:
                    if self.small_maps == "error":
                        raise ValueError(
                            f"spatial axis {i} of x has length {L}, less than kernel_size * dilation = {K * d}; "
                            "small_maps='pad' or 'shrink' allow that"
                        )
                    dilation[i] = min(d, max(L // K, 1))
                    kernel_size[i] = min(K, L - (1 - L % 2))
                    if rpb is not None:
                        rpb = rpb.narrow(i + 1, K - kernel_size[i], 2 * kernel_size[i] - 1)
        return kernel_size, dilation, rpb


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * axes
    flags = name == "is_causal"
    if len(values) != axes or not all(isinstance(v, int) and isinstance(v, bool) == flags for v in values):
        raise ValueError(f"{name} must be one value or {axes}, one per spatial axis, got {value!r}")
    return values


def _rotation(spatial: list[int], head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of every position; each axis has its share of the pairs. [*spatial, 1, D / 2]"""
    axes = len(spatial)
    pairs = head_dim // (2 * axes)
    speeds = theta ** (-torch.arange(pairs, device=like.device, dtype=torch.float32) / pairs)
    angles: list[Tensor] = []
    for i in range(axes):
        angle = torch.arange(spatial[i], device=like.device, dtype=torch.float32)[:, None] * speeds
        shape = [1] * axes + [1, pairs]
        shape[i] = spatial[i]
        whole = list(spatial) + [1, pairs]
        angles.append(angle.reshape(shape).expand(whole))
    angle = torch.cat(angles, -1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of the last axis."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
