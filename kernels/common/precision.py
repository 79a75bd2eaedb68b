"""The dtype in which sums are formed."""

import torch
from torch import Tensor

__all__ = ["accumulator", "precise", "precise_dtype", "tf32_allowed"]


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are formed in: float64 for itself, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def precise(x: Tensor) -> Tensor:
    """``x`` in the dtype that its sums are formed in."""
    return x if x.dtype == torch.float64 else x.float()


def accumulator(dtype: torch.dtype):
    """:func:`precise_dtype` as Triton calls it: ``tl.float64`` or ``tl.float32``."""
    import triton.language

    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def tf32_allowed() -> bool:
    """Whether the user lets matrix products of float32 be formed in TF32, by today's switch of PyTorch or the old one.

    The old one raises where the two have been mixed; today's answers for both.
    """
    products = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):
        return products.fp32_precision == "tf32"
    return products.allow_tf32
