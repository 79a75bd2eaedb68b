"""Linear attention on maps, RALA's, MALA's and NaLaFormer's among it, and softmax attention in the same frame."""

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from visionattn.kernels import attend, linear_attention, precise, rotary_tables
from visionattn.kernels.linear_attn import FEATURE_MAPS, NORMALIZERS, features, mix, rotate_pairs
from visionattn.layers.blocks import Linear, in_slices
from visionattn.layers.checks import check_heads, check_map, declared
from visionattn.layers.switches import built_for_export
from visionattn.layers.tracing import opaque

__all__ = [
    "LinearAttention",
    "MagnitudeAwareAttention",
    "NormAwareAttention",
    "RankAugmentedAttention",
    "RotaryAttention",
]


@declared
class MapAttention(nn.Module):
    """The frame: ``proj((attend(q, k, v) + lepe(v)) * o)`` on maps [B, H, W, dim], q, k, v and o from one projection.

    Args:
        dim: Channels of the map.
        num_heads: Attention heads; they divide ``dim``.
        rotary: Whether queries and keys are rotated by their place on the map; the head dim is then a multiple of 4.
        lepe_kernel: Side of the depthwise convolution of the values that is added; 0 for none.
        gate: Whether there is a gate ``o``.
        qkv_bias: Whether the projection to queries, keys, values and gate has a bias.
        scale: Factor of similarities; None stands for head dim ** -0.5.
        norm_gate: Whether a layer norm precedes the gate, which is then ``silu(o)`` (NaLaFormer, arXiv 2506.21137).

    Raises:
        ValueError: If an argument is not one of the allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rotary: bool = True,
        lepe_kernel: int = 5,
        gate: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        norm_gate: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        if rotary and dim // num_heads % 4:
            raise ValueError(f"rotary needs a head dim divisible by 4, got {dim} / {num_heads} = {dim // num_heads}")
        if lepe_kernel < 0 or (lepe_kernel > 0 and lepe_kernel % 2 == 0):
            raise ValueError(f"lepe_kernel must be odd, or 0 for none, got {lepe_kernel}")
        if norm_gate and not gate:
            raise ValueError("norm_gate=True needs gate=True, as it is the gate that it norms the input of")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.rotary = rotary
        self.gate = gate
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.exportable = built_for_export()
        self.qkv = Linear(dim, (4 if gate else 3) * dim, bias=qkv_bias, **dd)  # q, k, v and the gate
        if lepe_kernel:
            self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **dd)
        else:
            self.lepe = None
        self.ln = nn.LayerNorm(dim, eps=1e-5, **dd) if norm_gate else None
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        if torch.jit.is_scripting():
            return self._mixed(x)
        else:
            return self._sliced(x)

    @torch.jit.unused
    def _sliced(self, x: Tensor) -> Tensor:
        return in_slices(self._mixed, x, (4 if self.gate else 3) * self.dim, self.dim)

    def _mixed(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        parts = self.qkv(x).flatten(1, 2).unflatten(-1, [-1, self.num_heads, self.head_dim]).unbind(2)  # each B N h D
        q, k, v = parts[0], parts[1], parts[2]
        gate = parts[3] if self.gate else None
        residual: Tensor | None = None
        if self.lepe is not None:
            values = v.reshape(B, H, W, C).permute(0, 3, 1, 2)
            residual = self.lepe(values).permute(0, 2, 3, 1).reshape(v.shape)
        tables: tuple[Tensor, Tensor] | None = None
        if self.rotary:
            tables = rotary_tables(H, W, self.head_dim, device=x.device)
        if self.ln is not None and gate is not None:
            y = self.attend(q, k, v, tables, residual, None)
            return self.proj(self.ln(y.reshape(B, H, W, C)) * F.silu(gate.reshape(B, H, W, C)))
        y = self.attend(q, k, v, tables, residual, gate)
        return self.proj(y.reshape(B, H, W, C))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """Mix the values, then add and multiply. [B, N, h, D] each, the two tables of ``rotary`` [N, D / 2]"""
        raise NotImplementedError


@opaque  # which backend runs depends on the tensor it gets
@declared
class LinearAttention(MapAttention):
    """Linear attention with any named feature map and normalizer, rotary embedding, LePE and gate. [B, H, W, dim]

    Args:
        feature_map: Name of the map of queries and keys, see ``visionattn.kernels.linear_attention``.
        normalizer: How weights are normalized, see there.
        eps: Added to divisors.
        rank_augmented: Whether keys are weighted by their similarity to the mean query.

    The other arguments are those of the frame: dim, num_heads, rotary, lepe_kernel, gate, qkv_bias, scale.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_map: str = "elu+1",
        normalizer: str = "sum",
        eps: float = 1e-6,
        rank_augmented: bool = False,
        **frame,
    ) -> None:
        super().__init__(dim, num_heads, **frame)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps!r}")
        self.feature_map = feature_map
        self.normalizer = normalizer
        self.eps = eps
        self.rank_augmented = rank_augmented

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, feature_map={self.feature_map!r}, normalizer={self.normalizer!r}, "
            f"rotary={self.rotary}, gate={self.gate}, rank_augmented={self.rank_augmented}"
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(q, k, v, rotary, residual, gate)
        else:
            return self._fused(q, k, v, rotary, residual, gate)

    @torch.jit.unused
    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        backend = "torch" if self.exportable else None
        return linear_attention(
            q, k, v, self.feature_map, self.normalizer, self.scale, self.eps, rotary, None, self.rank_augmented,
            residual=residual, gate=gate, backend=backend,
        )  # fmt: skip

    def _scripted(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """What TorchScript compiles: sums in float32 here, too."""
        query, key, value = features(precise(q), self.feature_map), features(precise(k), self.feature_map), precise(v)
        y = mix(query, key, value, self.normalizer, self.scale, self.eps, rotary, None, self.rank_augmented)
        y = y.to(v.dtype)
        y = y if residual is None else y + residual
        return y if gate is None else y * gate


class RankAugmentedAttention(LinearAttention):
    """RALA: linear attention whose keys are weighted by their similarity to the mean query (arXiv 2411.07635).

    Args:
        dim: Channels of the map. [B, H, W, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, **frame) -> None:
        super().__init__(dim, num_heads, "elu+1", "sum", rank_augmented=True, **frame)


class MagnitudeAwareAttention(LinearAttention):
    """MALA: linear attention whose weights grow with the norm of the query (arXiv 2507.00698).

    Args:
        dim: Channels of the map. [B, H, W, dim] in and out
        num_heads: Attention heads; they divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, **frame) -> None:
        super().__init__(dim, num_heads, "elu+1", "magnitude", **frame)


@opaque  # which backend runs depends on the tensor it gets
@declared
class NormAwareAttention(MapAttention):
    """NaLaFormer's linear attention, sharper the longer the query (arXiv 2506.21137). [B, H, W, dim]

    ``phi(q) = [(relu(q) / n)^p | (relu(-q) / n)^p]`` with ``n = |q|`` and ``p = 3 (0.5 + tanh(n))``,
    ``phi(k) = [relu(k^3) | relu(-k^3)]``: the authors' code, not the cosines and sines that their abstract speaks of.

    Args:
        norm_eps: Added to n. The authors add nothing: with 0 a query of zeros makes NaN.
        eps: Added to divisors.

    The other arguments are those of the frame: dim, num_heads, rotary, lepe_kernel, gate, qkv_bias, scale, norm_gate.

    Raises:
        ValueError: If ``norm_eps`` is negative, or ``eps`` not positive.
    """

    def __init__(
        self, dim: int, num_heads: int, norm_eps: float = 0.0, eps: float = 1e-6, norm_gate: bool = True, **frame
    ) -> None:
        super().__init__(dim, num_heads, norm_gate=norm_gate, **frame)
        if not norm_eps >= 0:
            raise ValueError(f"norm_eps must be at least 0, got {norm_eps!r}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps!r}")
        self.norm_eps = norm_eps
        self.eps = eps

    def query_features(self, q: Tensor) -> Tensor:
        """[B, N, h, D] to [B, N, h, 2 * D], in float32 or float64"""
        q = precise(q)
        n = q.norm(2, -1, True)
        q = q / (n + self.norm_eps)
        q = q.abs().pow(3 * (0.5 + n.tanh())) * q.sign()
        return torch.cat([q, -q], -1).relu()

    def key_features(self, k: Tensor) -> Tensor:
        """[B, N, h, D] to [B, N, h, 2 * D], in float32 or float64: in half precision cubes would overflow at 40"""
        k = precise(k)
        k = k * k * k
        return torch.cat([k, -k], -1).relu()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        if rotary is not None:  # both signs of a feature turn alike
            rotary = (torch.cat([rotary[0], rotary[0]], -1), torch.cat([rotary[1], rotary[1]], -1))
        if torch.jit.is_scripting():
            query, key, value = self.query_features(q), self.key_features(k), precise(v)
            y = mix(query, key, value, "mean", self.scale, self.eps, rotary, None, False).to(v.dtype)
            y = y if residual is None else y + residual
            return y if gate is None else y * gate
        else:
            return self._fused(q, k, v, rotary, residual, gate)

    @torch.jit.unused
    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        maps = (self.query_features, self.key_features)
        options = dict(eps=self.eps, rotary=rotary, residual=residual, gate=gate)
        return linear_attention(q, k, v, maps, "mean", backend="torch" if self.exportable else None, **options)


@opaque
class RotaryAttention(MapAttention):
    """Softmax attention between all positions in the frame of the linear layers. [B, H, W, dim]

    The arguments are those of the frame: dim, num_heads, rotary, lepe_kernel, gate, qkv_bias, scale.
    """

    def __init__(self, dim: int, num_heads: int, **frame) -> None:
        super().__init__(dim, num_heads, **frame)
        self.fused_attn = use_fused_attn()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        if rotary is not None:
            q = rotate_pairs(q, rotary[0], rotary[1]).to(v.dtype)
            k = rotate_pairs(k, rotary[0], rotary[1]).to(v.dtype)
        q, k, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B h N D
        if self.fused_attn:
            y = attend(q, k, values, None, self.scale)
        else:
            y = ((q * self.scale) @ k.transpose(-1, -2)).softmax(-1) @ values
        y = y.transpose(1, 2)
        y = y if residual is None else y + residual
        return y if gate is None else y * gate
