"""How many samples a CPU takes at a time, so that what it makes of them stays in its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.common.mode import eager

__all__ = ["runs_in_slices", "samples_at_a_time", "samples_in_cache"]

# Features of a slice of the batch, 4 MiB of them. Measured on an AMD EPYC at the stages of Swin and PVT, batch 8, with
# one and two threads: mostly within 10 % of the best of five sizes. The memory of larger ones comes back page by page.
SLICE_ELEMENTS = 2**20


def runs_in_slices(q: Tensor) -> bool:
    """Whether this is inference on a CPU, which takes a few samples at a time."""
    return q.device.type == "cpu" and not torch.is_grad_enabled() and eager(q) and q.numel() > 0


def samples_at_a_time(q: Tensor) -> int:
    """How many samples are taken at a time."""
    return samples_in_cache(q) if runs_in_slices(q) else q.shape[0]


def samples_in_cache(q: Tensor) -> int:
    """How many samples are worth taking at a time."""
    return max(1, SLICE_ELEMENTS // max(1, q.shape[1:].numel()))
