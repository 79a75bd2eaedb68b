"""Attention of TransNeXt: cosine attention with a learned query, a scale by length and continuous positions.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", Shi 2023, arXiv 2311.17132. B batch, H W
rows and columns, N = H * W, h heads, D head dim, P pooled positions, G the side of the map that was trained on.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import aggregated_attention, exporting, seen_neighbors
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import check_heads, check_map, declared
from visionattn.layers.tracing import opaque

__all__ = ["AggregatedAttention", "LengthScaledAttention"]

HIDDEN = 512  # of the MLP of positions
TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)  # whose softplus is 1 / 0.24


def averages(size: int, parts: int, like: Tensor) -> Tensor:
    """What adaptive average pooling of ``size`` positions to ``parts`` multiplies by. [parts, size]"""
    part = torch.arange(parts, device=like.device)[:, None]
    place = torch.arange(size, device=like.device)
    start, end = part * size // parts, ((part + 1) * size + parts - 1) // parts
    inside = ((place >= start) & (place < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class _Cosine(nn.Module):
    """What both share: the scale of the queries, their learned part, and the MLP from distances to a bias."""

    def __init__(self, dim: int, num_heads: int, trained_size: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.trained_size = trained_size
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.cpb_fc1 = nn.Linear(2, HIDDEN, **dd)
        self.cpb_fc2 = nn.Linear(HIDDEN, num_heads, **dd)
        self.proj = Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """The authors' initialisation of what is no layer."""
        nn.init.constant_(self.temperature, TEMPERATURE)
        trunc_normal_(self.query_embedding, std=0.02)

    def position_bias(self, height: int, width: int, rows: int, columns: int) -> Tensor:
        """The bias of every position of a map towards every one of the map pooled to ``rows``. [h, N, P]"""
        like = self.temperature  # of a linear layer in int8 the weight is no tensor
        y, at_y = self._distances(height, rows, like)
        x, at_x = self._distances(width, columns, like)
        pairs = torch.stack([y[:, None].expand(-1, x.shape[0]), x[None].expand(y.shape[0], -1)], -1)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(pairs)))  # distances, h
        bias = table[at_y[:, None, :, None], at_x[None, :, None, :]]  # H W rows columns h
        return bias.permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)

    def _distances(self, size: int, parts: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The distances that there are on an axis, compressed, and which is that of each position and part."""
        place = torch.arange(size, device=like.device)
        part = torch.arange(parts, device=like.device)
        if self._regular(size, parts):  # few distances: those of whole parts and what is between
            step = size // parts
            last = step * (parts - 1)
            found = torch.arange(last + size, device=like.device).to(like.dtype) - (last + (step - 1) / 2)
            index = place[:, None] - step * part + last
        else:
            keys = averages(size, parts, like) @ place.to(like.dtype)
            found = (place.to(like.dtype)[:, None] - keys).flatten()
            index = place[:, None] * parts + part
        scaled = found * (8 / max(self.trained_size - 1, 1))
        return scaled.sign() * (scaled.abs() + 1).log2() / 3, index

    def _regular(self, size: int, parts: int) -> bool:
        if torch.jit.is_scripting():
            return size % parts == 0
        else:
            return not exporting() and size % parts == 0  # an exported graph asks nothing of a size


@opaque  # how distances are found depends on the size of the map
@declared
class LengthScaledAttention(_Cosine):
    """Cosine attention of every position to every other, sharper the more there are (TransNeXt, arXiv 2311.17132).

    Args:
        dim: Channels. [B, H, W, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        trained_size: Side of the map that distances are measured by.
        qkv_bias: Whether the projection to queries, keys and values has a bias.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int, trained_size: int = 7, qkv_bias: bool = True, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, trained_size, **dd)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        H, W = x.shape[1], x.shape[2]
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, [3, self.num_heads, -1])
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B h N D
        bias = self.position_bias(H, W, H, W)
        scale = F.softplus(self.temperature) * bias.new_ones([H * W]).sum().log()
        q = (F.normalize(q, dim=-1) + self.query_embedding) * scale
        logits = q @ F.normalize(k, dim=-1).transpose(-2, -1) + bias
        y = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


@opaque  # how distances are found depends on the size of the map
@declared
class AggregatedAttention(_Cosine):
    """Cosine attention to the 3x3 neighbors and a pooled map in one softmax (TransNeXt, arXiv 2311.17132).

    Args:
        dim: Channels. [B, H, W, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
        sr_ratio: Reduction of the pooled map, which has at least one position.
        trained_size: Side of the map that distances are measured by.
        qkv_bias: Whether the projections to queries, keys and values have a bias.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim`` or ``sr_ratio`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 8,
        trained_size: int = 56,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, trained_size, **dd)
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, 9, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, 9, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, 9, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation of what is no layer."""
        super().reset_parameters()
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        H, W, h = x.shape[1], x.shape[2], self.num_heads
        rows, columns = self._pooled(H), self._pooled(W)
        q = F.normalize(self.q(x).unflatten(-1, [h, -1]), dim=-1)  # B H W h D
        k, v = self.kv(x).unflatten(-1, [2, h, -1]).unbind(3)
        pooled = F.gelu(self.sr(x.permute(0, 3, 1, 2)))  # B C H W
        pooled = averages(H, rows, pooled) @ (pooled @ averages(W, columns, pooled).t())
        pooled_k, pooled_v = self.kv(self.norm(pooled.flatten(2).transpose(1, 2))).unflatten(-1, [2, h, -1]).unbind(2)
        bias = self.position_bias(H, W, rows, columns)
        length = (seen_neighbors(H, W, x.device) + rows * columns).to(bias.dtype).log()
        scale = F.softplus(self.temperature).flatten(1) * length[:, :, None, None]  # H W h 1
        add = torch.einsum("byxhd,hds->byxhs", q, self.learnable_tokens) + self.learnable_bias.squeeze(1)
        y = aggregated_attention(
            (q + self.query_embedding.squeeze(1)) * scale,
            F.normalize(k, dim=-1),
            v,
            F.normalize(pooled_k, dim=-1),
            pooled_v,
            self.relative_pos_bias_local,
            bias,
            add,
        )
        return self.proj(y.flatten(3).to(x.dtype))

    def _pooled(self, size: int) -> int:
        if torch.jit.is_scripting():
            return max(size // self.sr_ratio, 1)
        else:
            return size // self.sr_ratio if exporting() else max(size // self.sr_ratio, 1)
