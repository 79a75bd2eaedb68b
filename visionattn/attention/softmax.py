"""Softmax attention of every position to every other, and the frame it shares with its relatives.

B batch, N positions, h heads, D head dim.
"""

from torch import Tensor, nn

from visionattn.attention.mixer import Mixer
from visionattn.kernels import attend
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import check_heads, declared

__all__ = ["SelfAttention", "SoftmaxAttention", "SoftmaxMixer"]


@declared
class SelfAttention(nn.Module):
    """The frame: ``proj(attend(q, k, v))`` on maps or sequences, with q, k and v from one projection.

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
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Mix a map or a sequence; ``size``, which a ``Mixer`` is told with a sequence, makes no difference."""
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        q, k, v = self.qkv(tokens).unflatten(-1, [3, self.num_heads, -1]).unbind(2)
        return self.proj_drop(self.proj(self.attend(q, k, v, tokens).reshape(x.shape)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Mix the values. [B, N, h, D] three times, and the input that they come from [B, N, dim]"""
        raise NotImplementedError


class SoftmaxAttention(SelfAttention):
    """``proj(softmax(q k^T / sqrt(D)) v)``, what the other mixers are compared with (arXiv 1706.03762).

    Args:
        dim: Channels. [B, ..., dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout of the output.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2)


class SoftmaxMixer(Mixer):
    """``SoftmaxAttention`` as a host calls it, with prefix tokens and norms folded into it. Arguments of ``Mixer``."""

    short_name = "softmax"
    uses_map = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        return attend(self.heads(q), self.heads(k), self.heads(v)).transpose(1, 2).flatten(2)
