"""Linear attention as one writes it with PyTorch alone. B batch, N positions, h heads, D head dim."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["einsum", "framed", "matmul", "softmax"]


def einsum(q: Tensor, k: Tensor, v: Tensor, layout: str) -> Tensor:
    """The plain composition, in either order of heads and tokens."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if layout == "bhnd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    state = torch.einsum(f"{layout},{layout[:-1]}e->bhde", k, v)
    total = torch.einsum(f"{layout},bhd->{layout[:-1]}", q, k.sum(layout.index("n"))) + 1e-6
    out = torch.einsum(f"{layout},bhde->{layout[:-1]}e", q, state) / total[..., None]
    return out if layout == "bnhd" else out.transpose(1, 2)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by matrix products of every head."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # B h N d
    total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    return (q @ (k.mT @ v) / total).transpose(1, 2)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention between all positions."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def framed(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator of ``plain/ravlt.py`` with the values as local encoding, and the gate."""

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (t.repeat_interleave(2, -1) for t in tables)
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)), sin, cos).transpose(1, 2)
        return (y + v) * gate

    return run
