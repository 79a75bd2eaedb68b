"""Neighborhood attention by the installed natten, for those who want its kernels or compare with them."""

from __future__ import annotations

import importlib

from torch import Tensor

from visionattn.kernels.common.backend import BackendError

__all__ = ["neighborhood_attention_natten"]

CANNOT = "neighborhood_attention: backend 'natten' cannot run this call: "


def neighborhood_attention_natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    bias: Tensor | None,
    is_causal: tuple[bool, ...],
    scale: float,
) -> Tensor:
    """Arguments as in :func:`neighborhood_attention`, one value per axis.

    Raises:
        BackendError: If natten is not installed or cannot run this call: it has no bias, and its own rules for dtype,
            head dim and device.
    """
    if bias is not None:
        raise BackendError(CANNOT + "natten has no relative position bias since 0.20")
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        raise BackendError(f"{CANNOT}{error}") from error
    function = getattr(natten, f"na{len(kernel_size)}d")
    try:
        # Its kernels read contiguous tensors.
        q, k, v = (t.contiguous() for t in (q, k, v))
        return function(q, k, v, kernel_size, dilation=dilation, is_causal=is_causal, scale=scale)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise BackendError(f"{CANNOT}{error}") from error
