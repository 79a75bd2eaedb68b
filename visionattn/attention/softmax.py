"""Softmax attention of every position to every other: what the other mixers are compared with."""

import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.blocks import Linear

__all__ = ["SoftmaxAttention"]


class SoftmaxAttention(nn.Module):
    """``proj(softmax(q k^T / sqrt(D)) v)`` over all positions of a map ("Attention Is All You Need", 1706.03762).

    Args:
        dim: Channels. [B, ..., dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_drop: float = 0.0, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, -2)).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # B N h D
        return self.proj_drop(self.proj(y.reshape(x.shape)))
