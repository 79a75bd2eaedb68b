"""Softplus attention: weights that grow linearly, not exponentially, with similarity."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.attention.softmax import SelfAttention
from visionattn.layers.checks import declared

__all__ = ["SoftplusAttention"]


@declared
class SoftplusAttention(SelfAttention):
    """``proj(a v)``, ``a[i, j] = softplus(s q_i . k_j) / sum_j softplus(s q_i . k_j)`` (after arXiv 2501.13428).

    The first of the paper's two stages, a positive map and a division by the sum, without the sharpening that follows
    there. A query all of whose weights vanish in floating point gives zeros. There is no code of the authors to
    compare with.

    Args:
        dim: Channels. [B, ..., dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        length_scale: Whether the scale s = 1 / sqrt(D) is multiplied by log N, so that weights are as concentrated
            among many positions as among few.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout of the output.
    """

    short_name = "softplus"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        length_scale: bool = True,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, proj_drop, device=device, dtype=dtype)
        self.length_scale = length_scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        if self.length_scale:
            # Counted in a tensor and in float32, for graphs exported for any number of positions and for 16 bits.
            count = torch.ones_like(q[:, :, :1, :1], dtype=torch.float32).sum(1, keepdim=True)
            q = q * count.log().to(q.dtype)
        logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)  # B h N N
        weights = F.softplus(logits if logits.dtype == torch.float64 else logits.float())
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1.2e-38)  # float32's smallest
        return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)
