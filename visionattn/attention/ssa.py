"""Selective self-attention: every token sets the temperature of its query and of its value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.softmax import SelfAttention
from visionattn.kernels import attend
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import declared

__all__ = ["SelectiveAttention"]


class Temperature(nn.Module):
    """``1 + tanh(fc2(gelu(fc1(x))))`` of each token, between 0 and 2 and at first 1. [B, N, dim] to [B, N, 1]"""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = Linear(dim, hidden, **dd)
        self.fc2 = Linear(hidden, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return 1 + torch.tanh(self.fc2(F.gelu(self.fc1(x))))


@declared
class SelectiveAttention(SelfAttention):
    """``proj(softmax(t(x) q k^T / sqrt(D)) u(x) v)`` with learned temperatures t and u (SSA, arXiv 2411.12892).

    The paper is about language and adds a temperature of the position in the context to that of the token. A place on
    a map has no such meaning, so only the temperature of the token is here; it is shared by all heads, and its
    definition is this library's own. There is no code of the authors to compare with.

    Args:
        dim: Channels. [B, ..., dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        hidden: Width of the two temperatures' hidden layer; None stands for dim / 32, at least 4.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout of the output.
    """

    short_name = "selective"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_drop, **dd)
        hidden = max(4, dim // 32) if hidden is None else hidden
        self.query_temperature = Temperature(dim, hidden, **dd)
        self.value_temperature = Temperature(dim, hidden, **dd)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        q = q * self.query_temperature(x)[..., None]
        v = v * self.value_temperature(x)[..., None]
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2)
