"""Hedgehog: linear attention with learned feature maps that imitate softmax, and LoLCATs' losses to learn them.

B batch, N positions, h heads, D head dim, F features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.softmax import SelfAttention
from visionattn.kernels import linear_attention, precise
from visionattn.kernels.linear_attn import causal_sums, mix
from visionattn.layers.checks import declared
from visionattn.layers.tracing import opaque

__all__ = ["HedgehogAttention", "HedgehogFeatures", "attention_transfer_loss", "attention_weight_loss", "transfer"]

ACTIVATIONS = ("softmax_dim", "exp_dim", "pos_elu", "relu")
EPS = 1e-12


class HeadProjection(nn.Module):
    """``x W`` with a matrix for each head, plus a scalar for each head if ``bias``. [B, N, h, D] to [B, N, h, F]"""

    def __init__(
        self, heads: int, dim: int, features: int, bias: bool, zero_init: bool, skip: bool, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.zero_init, self.skip = zero_init, skip
        self.layer = nn.Parameter(torch.empty(heads, dim, features, **dd))
        self.register_parameter("bias", nn.Parameter(torch.empty(1, heads, 1, 1, **dd)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation; ``zero_init`` makes the map the identity, with a skip connection or without."""
        with torch.no_grad():
            if not self.zero_init:
                nn.init.kaiming_uniform_(self.layer)
            elif self.skip:
                self.layer.zero_()
            else:
                self.layer.copy_(torch.eye(self.layer.shape[1], self.layer.shape[2]).expand_as(self.layer))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        z = (x.transpose(1, 2) @ self.layer).transpose(1, 2)
        bias = self.bias
        return z if bias is None else z + bias.flatten(1)[..., None]


@declared
class HedgehogFeatures(nn.Module):
    """The feature map ``phi(x W)`` (Hedgehog, arXiv 2402.04347). [B, N, h, D] to [B, N, h, F] or [B, N, h, 2 F]

    Args:
        num_heads: Heads, each with its own matrix.
        head_dim: D.
        features: F; None stands for D.
        activation: ``"softmax_dim"``, ``"exp_dim"`` (exponentials divided by the largest of the token), ``"pos_elu"``
            or ``"relu"``.
        full: Whether the first two append what they make of ``-x W``, which doubles the features.
        skip: Whether x is added to x W; F must then equal D.
        bias: Whether each head has a scalar bias.
        zero_init: Whether training starts from the identity.

    Raises:
        ValueError: If ``activation`` is not one of the four, or ``skip`` does not fit.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        features: int | None = None,
        activation: str = "softmax_dim",
        full: bool = True,
        skip: bool = False,
        bias: bool = False,
        zero_init: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        features = head_dim if features is None else features
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if features < 1 or (skip and features != head_dim):
            raise ValueError(f"features must be positive, and with skip the head dim {head_dim}, got {features}")
        self.activation, self.full, self.skip, self.eps = activation, full, skip, EPS
        self.mlp = HeadProjection(num_heads, head_dim, features, bias, zero_init, skip, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp(x)
        z = precise(x + z if self.skip else z)
        if self.activation == "softmax_dim":
            y = torch.cat([z.softmax(-1), (-z).softmax(-1)], -1) if self.full else z.softmax(-1)
        elif self.activation == "exp_dim":
            y = (z - z.amax(-1, keepdim=True)).exp()
            if self.full:
                y = torch.cat([y, (z.amin(-1, keepdim=True) - z).exp()], -1)
        elif self.activation == "pos_elu":
            y = 1 + F.elu(z)
        else:
            y = F.relu(z)
        return y.clamp(min=self.eps)


@opaque  # how it runs depends on the tensor it gets
@declared
class HedgehogAttention(SelfAttention):
    """Linear attention with Hedgehog's feature maps of queries and keys, optionally softmax within a causal window.

    The parameters of the projections are those of ``SoftmaxAttention``, whose state dict loads but for the maps; these
    are then learned from it by :func:`transfer`.

    Args:
        dim: Channels. [B, ..., dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        features: Features F of each half of the map; None stands for the head dim.
        activation: As in ``HedgehogFeatures``; so are full, skip, bias and zero_init.
        tied: Whether queries and keys have one map.
        causal: Whether a position sees only itself and those before it, row by row.
        window: Causal only: attention to the last ``window`` positions is softmax, over a common denominator with the
            linear attention to those before (LoLCATs, arXiv 2410.10254). 0 for none.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``, or ``window`` is negative or not causal.
    """

    short_name = "hedgehog"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        features: int | None = None,
        activation: str = "softmax_dim",
        full: bool = True,
        skip: bool = False,
        bias: bool = False,
        zero_init: bool = False,
        tied: bool = False,
        causal: bool = False,
        window: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_drop, **dd)
        if window < 0 or (window > 0 and not causal):
            raise ValueError(f"window must be 0, or positive with causal=True, got {window} with causal={causal}")
        self.causal, self.window, self.eps = causal, window, EPS
        arguments = (num_heads, dim // num_heads, features, activation, full, skip, bias, zero_init)
        self.feature_map_q = HedgehogFeatures(*arguments, **dd)
        self.feature_map_k = self.feature_map_q if tied else HedgehogFeatures(*arguments, **dd)
        factors = nn.Parameter(torch.empty(1, num_heads, 1, 1, **dd)) if window else None
        self.register_parameter("window_factors", factors)
        self.records: list[tuple[Tensor, Tensor]] | None = None
        self.with_weights = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A tenth for softmax within the window, as the authors start; projections and maps have their own."""
        if self.window_factors is not None:
            nn.init.constant_(self.window_factors, -2.197)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._student(q, k, v, True)
        elif self.records is None:
            return self._student(q, k, v, False)
        else:
            return self._record(q.detach(), k.detach(), v.detach())

    def _student(self, q: Tensor, k: Tensor, v: Tensor, scripted: bool) -> Tensor:
        query, key = self.feature_map_q(q), self.feature_map_k(k)
        factors = self.window_factors
        if factors is not None:
            return window_attention(q, k, v, query, key, factors, self.window)
        if scripted:
            if self.causal:
                total = causal_sums(query, key, torch.ones_like(query[..., :1]))
                return (causal_sums(query, key, precise(v)) / (total + self.eps)).to(v.dtype)
            return mix(query, key, precise(v), "sum", 1.0, self.eps, None, None, False).to(v.dtype)
        return self._fused(query, key, v)

    @torch.jit.unused
    def _fused(self, query: Tensor, key: Tensor, v: Tensor) -> Tensor:
        return linear_attention(query, key, precise(v), eps=self.eps, causal=self.causal).to(v.dtype)

    @torch.jit.unused
    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The weight of every pair, at a cost that grows with N * N. [B, N, h, D] twice to [B, h, N, N]"""
        query, key = self.feature_map_q(q).transpose(1, 2), self.feature_map_k(k).transpose(1, 2)
        linear = query @ key.transpose(2, 3)
        if self.window_factors is None:
            linear = linear.tril() if self.causal else linear
            return linear / (linear.sum(-1, keepdim=True) + self.eps)
        N = q.shape[1]
        near = torch.ones(N, N, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        logits = precise(q).transpose(1, 2) @ precise(k).permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~near, float("-inf"))
        local = torch.sigmoid(precise(self.window_factors)) * (logits - logits.amax(-1, keepdim=True)).exp()
        both = local + linear.tril(-self.window)
        return both / both.sum(-1, keepdim=True)

    @torch.jit.unused
    def teacher(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights of softmax attention, which the maps are to imitate. [B, N, h, D] twice to [B, h, N, N]"""
        logits = precise(q).transpose(1, 2) @ precise(k).permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        if self.causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(hidden, float("-inf"))
        return logits.softmax(-1)

    @torch.jit.unused
    def _record(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention, while both losses of the student with the same queries, keys and values are noted."""
        with torch.no_grad():
            wanted = self.teacher(q, k)
            out = (wanted @ precise(v).transpose(1, 2)).transpose(1, 2)
        student = self._student(q, k, v, False)
        weights = attention_weight_loss(self.weights(q, k), wanted) if self.with_weights else out.new_zeros(())
        self.records.append((weights, attention_transfer_loss(precise(student), out)))
        return out.to(v.dtype)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor, key: Tensor, factors: Tensor, window: int
) -> Tensor:
    """Softmax attention to the last ``window`` positions and linear attention before, at a cost that grows with N.

    Args:
        q: Queries. [B, N, h, D]
        k: Keys. [B, N, h, D]
        v: Values. [B, N, h, D]
        query: Features of the queries. [B, N, h, F]
        key: Features of the keys. [B, N, h, F]
        factors: Logits of the weight of the softmax part. [1, h, 1, 1]
        window: Its length.
    """
    N, scale = q.shape[1], q.shape[-1] ** -0.5
    pad = -N % window
    value = precise(v)
    rows = torch.arange(window, device=q.device)[:, None]
    columns = torch.arange(2 * window, device=q.device)[None]
    near = (columns > rows) & (columns <= rows + window)  # of a chunk of queries, among its keys and those before it
    q, k = precise(q), precise(k)
    blocks = F.pad(q, [0, 0, 0, 0, 0, pad]).unflatten(1, [-1, window]).transpose(2, 3)  # B n h window D
    keys = F.pad(k, [0, 0, 0, 0, window, pad]).unfold(1, 2 * window, window)  # B n h D 2*window
    values = F.pad(value, [0, 0, 0, 0, window, pad]).unfold(1, 2 * window, window).transpose(3, 4)
    logits = (blocks @ keys * scale).masked_fill(~near, float("-inf"))
    first = torch.where(torch.arange(keys.shape[1], device=q.device) == 0, window, 0)[:, None, None, None]
    logits = logits.masked_fill(columns < first, float("-inf"))  # the padding before the first chunk
    local = torch.sigmoid(precise(factors)) * (logits - logits.amax(-1, keepdim=True)).exp()
    total = local.sum(-1, keepdim=True).transpose(2, 3).flatten(1, 2)[:, :N]
    out = (local @ values).transpose(2, 3).flatten(1, 2)[:, :N]
    # Keys and values that arrive a window late leave the window out of the causal sums.
    late = F.pad(key, [0, 0, 0, 0, window, 0])[:, :N]
    out = out + causal_sums(query, late, F.pad(value, [0, 0, 0, 0, window, 0])[:, :N])
    return (out / (total + causal_sums(query, late, torch.ones_like(late[..., :1])))).to(v.dtype)


def attention_weight_loss(weights: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of attention weights to those of the teacher, the mean of all rows (Hedgehog, arXiv 2402.04347).

    Args:
        weights: Weights of the student; every row adds up to one. [..., N, M]
        wanted: Weights of the teacher. [..., N, M]
    """
    return F.cross_entropy(weights.clamp(min=EPS).log().flatten(0, -2), wanted.flatten(0, -2))


def attention_transfer_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of attention's output, before the projection, to the teacher's (LoLCATs, arXiv 2410.10254).

    Args:
        output: Of the student. Any shape
        wanted: Of the teacher. The same shape
    """
    return F.mse_loss(output, wanted)


@contextmanager
def _recording(layers: list[HedgehogAttention], with_weights: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    records: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        layer.records, layer.with_weights = records, with_weights
    try:
        yield records
    finally:
        for layer in layers:
            layer.records = None


def transfer(model: nn.Module, x: Tensor, weight_factor: float = 0.0, output_factor: float = 1000.0) -> Tensor:
    """The loss that teaches the feature maps of all ``HedgehogAttention`` layers of a model to imitate softmax.

    Every layer runs as softmax attention and passes that on, so each learns by itself from what the teacher would see.
    Only feature maps and window factors get gradients: give an optimizer those alone.

    Args:
        model: Whose other weights are those of a network trained with softmax attention.
        x: Its input.
        weight_factor: Of :func:`attention_weight_loss`, at a cost that grows with N * N; Hedgehog has 1.
        output_factor: Of :func:`attention_transfer_loss`; LoLCATs has 1000.

    Returns:
        The weighted sum of both losses, each the mean over layers. A scalar

    Raises:
        ValueError: If the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, HedgehogAttention)]
    if not layers:
        raise ValueError("model must have HedgehogAttention layers, got none")
    with _recording(layers, weight_factor != 0) as records:
        model(x)
    weights, outputs = (torch.stack(losses).mean() for losses in zip(*records, strict=True))
    return weight_factor * weights + output_factor * outputs
