"""Flow attention: sources compete, sinks allocate, no softmax over pairs. B batch, L N queries, S keys, h heads."""

import torch
from torch import Tensor, nn

from visionattn.attention.softmax import SelfAttention
from visionattn.kernels import flow_attention
from visionattn.kernels.flow import flow_attention_torch
from visionattn.layers.blocks import Linear, in_slices
from visionattn.layers.checks import check_heads, declared
from visionattn.layers.tracing import opaque

__all__ = ["CrossFlowAttention", "FlowAttention"]


@opaque  # how it runs depends on the tensor it gets
@declared
class FlowAttention(SelfAttention):
    """``proj(flow_attention(q, k, v))`` of every position with all others (Flowformer, arXiv 2202.06258).

    Args:
        dim: Channels. [B, ..., dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        causal: Whether a position sees only itself and those before it, row by row.
        proj_drop: Dropout of the output.
        eps: Added to both factors of every flow.
        flow_eps: Added to every flow; 1e-6 in the authors' vision model, 0 in their other code.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    short_name = "flow"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        causal: bool = False,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        flow_eps: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, proj_drop, device=device, dtype=dtype)
        self.causal, self.eps, self.flow_eps = causal, eps, flow_eps

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if torch.jit.is_scripting():
            return self._mix(x)
        else:
            return self._sliced(x)

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mix, x, 3 * x.shape[-1], x.shape[-1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return flow_attention_torch(q, k, v, self.causal, self.eps, self.flow_eps)
        else:
            return flow_attention(q, k, v, self.causal, self.eps, self.flow_eps)


@opaque
@declared
class CrossFlowAttention(nn.Module):
    """``out_projection(flow_attention(q(x), k(source), v(source)))``, the authors' general layer (arXiv 2202.06258).

    Args:
        dim: Channels of queries, keys and values.
        num_heads: Attention heads; they divide ``dim``.
        in_dim: Channels of the inputs; ``dim`` if not given.
        out_dim: Channels of the output; ``dim`` if not given.
        causal: Whether position i sees positions up to i only.
        drop: Dropout of the output (the authors have 0.05).
        eps: Added to both factors of every flow.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        in_dim: int | None = None,
        out_dim: int | None = None,
        causal: bool = False,
        drop: float = 0.0,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        in_dim, out_dim = in_dim or dim, out_dim or dim
        self.num_heads, self.causal, self.eps = num_heads, causal, eps
        self.query_projection = Linear(in_dim, dim, **dd)
        self.key_projection = Linear(in_dim, dim, **dd)
        self.value_projection = Linear(in_dim, dim, **dd)
        self.out_projection = Linear(dim, out_dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Mix ``source``, or ``x`` itself if there is none, into ``x``.

        Args:
            x: What asks. [B, L, in_dim]
            source: What is attended to. [B, S, in_dim]

        Returns:
            [B, L, out_dim]
        """
        source = x if source is None else source
        heads = [self.num_heads, -1]
        q = self.query_projection(x).unflatten(-1, heads)
        k = self.key_projection(source).unflatten(-1, heads)
        v = self.value_projection(source).unflatten(-1, heads)
        if torch.jit.is_scripting():
            y = flow_attention_torch(q, k, v, self.causal, self.eps)
        else:
            y = flow_attention(q, k, v, self.causal, self.eps)
        return self.drop(self.out_projection(y.flatten(2)))
