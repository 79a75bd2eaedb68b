"""natten's modules and functions on this library's operator: replace ``from natten import ...`` by this module.

Arguments, layouts and parameter names are natten's: maps [B, *spatial, heads, head dim]; a map shorter than
``kernel_size * dilation`` raises, as in natten since 0.17. Runs on any device, and still has the relative position
bias that natten dropped in 0.20: ``rpb=`` of the functions, ``rel_pos_bias=`` of the modules.

Not offered: ``stride`` above 1, and ``additional_keys`` and ``additional_values``, tokens that every query sees besides
its window. No published model has them, and each kernel would need another loop, forward and backward, for keys without
a place on the map; ``visionattn.attention.CircularWindowAttention`` takes such tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.attention import NeighborhoodAttention
from visionattn.kernels import neighborhood_attention

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "na1d", "na2d", "na3d"]


def _na(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool] | None,
    scale: float | None,
    rpb: Tensor | None,
    backend: str | None,
) -> Tensor:
    if query.dim() != axes + 3:
        raise ValueError(f"query must be [B, *spatial, heads, head dim] with {axes} spatial axes, got {query.dim()}-D")
    _check_stride(stride)
    causal = False if is_causal is None else is_causal
    return neighborhood_attention(query, key, value, kernel_size, dilation, rpb, causal, scale, backend)


def _check_stride(stride: int | Sequence[int]) -> None:
    if any(s != 1 for s in (stride if isinstance(stride, (tuple, list)) else (stride,))):
        raise ValueError(f"stride must be 1, got {stride!r}: queries that share a window are not implemented")


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """1-D neighborhood attention.

    Args:
        query: Queries. [B, L, heads, D]
        key: Keys, shaped as ``query``.
        value: Values, shaped as ``query``.
        kernel_size: Window side, for all axes or one per axis.
        stride: 1; other strides of natten's are not implemented.
        dilation: Distance between the keys of a window.
        is_causal: Whether a query sees only itself and earlier positions.
        scale: Factor of the logits; None stands for D ** -0.5.
        rpb: Relative position bias or None. [heads, 2 * kernel_size - 1 per axis]
        backend: A backend of this library, ``"natten"`` for the installed natten, or None for the automatic choice.

    Returns:
        The attended values, shaped as ``query``.

    Raises:
        ValueError: If shapes do not fit together, an axis is too short, or ``stride`` is not 1.
        BackendError: If the backend that was asked for cannot run this call.
    """
    return _na(1, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb, backend)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D neighborhood attention of maps [B, H, W, heads, D]; see :func:`na1d`."""
    return _na(2, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb, backend)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """3-D neighborhood attention of maps [B, T, H, W, heads, D]; see :func:`na1d`."""
    return _na(3, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb, backend)


class NeighborhoodAttention1D(NeighborhoodAttention):
    """1-D neighborhood attention between its projections. [B, L, embed_dim] in and out

    Args:
        embed_dim: Channels.
        num_heads: Attention heads.
        kernel_size: Window side, for all axes or one per axis.
        stride: 1; other strides of natten's are not implemented.
        dilation: Distance between the keys of a window.
        is_causal: Whether a position sees only itself and earlier ones.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        qk_scale: Factor of the logits; None stands for head dim ** -0.5.
        proj_drop: Dropout of the output.
        rel_pos_bias: Learn a relative position bias ``rpb``, as natten did until 0.17.
        attn_drop: Dropout of attention weights, as natten had until 0.17.
        small_maps: ``"error"``, as natten since 0.17, ``"pad"``, as natten until 0.15, or ``"shrink"``.

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    axes = 1

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        small_maps: str = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_stride(stride)
        super().__init__(
            embed_dim,
            num_heads,
            kernel_size,
            dilation,
            axes=type(self).axes,
            is_causal=is_causal,
            qkv_bias=qkv_bias,
            scale=qk_scale,
            position="bias" if rel_pos_bias else "none",
            small_maps=small_maps,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )


class NeighborhoodAttention2D(NeighborhoodAttention1D):
    """2-D neighborhood attention between its projections, [B, H, W, embed_dim]; see NeighborhoodAttention1D."""

    axes = 2


class NeighborhoodAttention3D(NeighborhoodAttention1D):
    """3-D neighborhood attention between its projections, [B, T, H, W, embed_dim]; see NeighborhoodAttention1D."""

    axes = 3
