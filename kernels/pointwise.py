"""A 1x1 convolution whose result is gated. Shapes: B batch, C channels in, D channels out, H rows, W columns.

out[b, d, y, x] = gate[b, d, y, x] * (bias[d] + sum_c weight[d, c] * x[b, c, y, x])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import check_filled, check_floating, check_same, check_tensors, unsupported_map
from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.jit import jit, tl
from visionattn.kernels.common.launch import Launch, pointer
from visionattn.kernels.common.layout import channels_last, is_channels_last
from visionattn.kernels.common.mode import autocast, autocasting, within_transform
from visionattn.kernels.common.precision import accumulator, tf32_allowed

__all__ = ["gated_pointwise"]


_CHANNELS_LAST = torch.channels_last


def gated_pointwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The convolution and the product, one after the other. Arguments as in :func:`gated_pointwise`."""
    return F.conv2d(x, weight, bias) * gate


def gated_pointwise_torch(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The fastest form known in operators of PyTorch. Arguments as in :func:`gated_pointwise`.

    It is the reference: on the CPU ``F.linear``, ``addmm`` and an own backward measured no better on most maps.
    """
    return gated_pointwise_reference(x, weight, bias, gate)


@jit
def gated_pointwise_fwd(
    x, weight, bias, gate, out, M, D, C: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions by BLOCK_D channels out. x is [M, C], gate and out are [M, D], weight is [D, C]."""
    d_blocks = tl.cdiv(D, BLOCK_D)  # neighbouring programs share their rows of x
    m = tl.program_id(0) // d_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    m_in, d_in = m < M, d < D
    x += m.to(tl.int64)[:, None] * C
    weight += d[None, :] * C
    total = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for first in range(0, C, BLOCK_C):
        rows = tl.load(x + (first + c)[None, :], m_in[:, None] & (first + c < C)[None, :], other=0.0)
        columns = tl.load(weight + (first + c)[:, None], d_in[None, :] & (first + c < C)[:, None], other=0.0)
        total += tl.dot(rows, columns, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        total += tl.load(bias + d, d_in, other=0.0).to(ACC)[None, :]
    at = m.to(tl.int64)[:, None] * D + d[None, :]
    inside = m_in[:, None] & d_in[None, :]
    total *= tl.load(gate + at, inside, other=0.0).to(ACC)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def launch_config(C: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of one launch. Few on purpose: all of them are compiled ahead of time in the tests."""
    if C % 16 or D % 16 or dtype.itemsize > 2:  # narrow loads or full-width products: larger tiles spill
        return {"BLOCK_M": 64, "BLOCK_D": 32, "BLOCK_C": 32 if dtype.itemsize <= 4 else 16, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_D": 64 if D > 32 else 32, "BLOCK_C": 64 if C >= 64 else 32, "num_warps": 4}


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time: every result of :func:`launch_config` for a dtype."""
    x = pointer(dtype)
    counts = (32, 96, 33) if dtype.itemsize <= 2 else (96, 33)
    for C, D in itertools.product(counts, counts):
        if (C == 33) != (D == 33):
            continue
        arguments = dict.fromkeys(("x", "weight", "bias", "gate", "out"), x)
        arguments |= {"M": "i32", "D": "i32:16" if D % 16 == 0 else "i32"}
        config = launch_config(C, D, dtype) | {"C": C, "HAS_BIAS": True, "ACC": accumulator(dtype)}
        for precision in ("ieee", "tf32") if dtype == torch.float32 and not hip else ("ieee",):
            yield Launch(gated_pointwise_fwd, config | {"PRECISION": precision}, arguments, precision == "ieee")


@custom_op("gated_pointwise")
def _gated_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """Returns channels_last, whatever the format of x and gate."""
    out = _empty_result(x, gate)
    if out.numel() == 0:
        return out
    B, C, H, W = x.shape
    D, M = weight.shape[0], B * H * W
    config = launch_config(C, D, x.dtype)
    config |= {"ACC": accumulator(x.dtype), "PRECISION": _precision(x.dtype)}
    grid = (-(-M // config["BLOCK_M"]) * -(-D // config["BLOCK_D"]),)
    x, gate = channels_last(x), channels_last(gate)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    gated_pointwise_fwd[grid](
        x, weight, weight if bias is None else bias, gate, out, M, D, C=C, HAS_BIAS=bias is not None, **config
    )
    return out


def _empty_result(x: Tensor, gate: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, gate.dtype)  # they differ under autocast, where nothing casts the product
    return torch.empty_like(gate, dtype=dtype, memory_format=_CHANNELS_LAST)


def _precision(dtype: torch.dtype) -> str:
    """How products are formed: float32 in TF32 only where the user has allowed it for matrix products."""
    return "tf32" if dtype == torch.float32 and torch.version.hip is None and tf32_allowed() else "ieee"


@_gated_pointwise.register_fake
def _(x, weight, bias, gate):
    return _empty_result(x, gate)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    if within_transform(grad):  # of which the operator below knows nothing
        return twice.gradients(gated_pointwise_reference, grad, ctx.saved_tensors)
    x, weight, bias, gate = ctx.saved_tensors
    grad = channels_last(grad)
    grad_x = grad_weight = grad_bias = grad_gate = None
    needed = ctx.needs_input_grad
    if needed[3]:  # the convolution is computed again, which is cheaper than to store and load it
        grad_gate = _gated_pointwise(x, weight, bias, grad).to(gate.dtype)
    if any(needed[:3]):
        rows = (grad * gate).to(x.dtype).permute(0, 2, 3, 1).flatten(0, 2)  # B*H*W D
        matrix = weight.flatten(1)
        if needed[0]:
            B, C, H, W = x.shape
            grad_x = (rows @ matrix).view(B, H, W, C).permute(0, 3, 1, 2)
        if needed[1]:
            grad_weight = (rows.t() @ x.permute(0, 2, 3, 1).flatten(0, 2)).view(weight.shape)
        if needed[2]:
            grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, grad_gate


_gated_pointwise.register_autograd(_backward, setup_context=_save)


@flop_formula("gated_pointwise")
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    B, C, H, W = x_shape
    return 2 * B * H * W * C * weight_shape[0]


def gated_pointwise_triton(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The Triton kernels. Arguments as in :func:`gated_pointwise`."""
    x, weight, bias = autocast(x, weight, bias)
    out = _gated_pointwise(channels_last(x), weight, bias, channels_last(gate))
    return out if is_channels_last(x) else out.contiguous()


def gated_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, backend: str | None = None) -> Tensor:
    """Multiply the 1x1 convolution of ``x`` by ``gate``.

    Args:
        x: Input map; channels_last is the fast memory format. [B, C, H, W]
        weight: Convolution weight. [D, C, 1, 1]
        bias: Convolution bias, or ``None``. [D]
        gate: Factor of the result. [B, D, H, W]
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        The gated map in the memory format of ``x``. [B, D, H, W]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or ``backend`` is unknown.
        BackendError: If the backend that was asked for cannot run this call.
    """
    if not torch.jit.is_tracing():  # which warns of every comparison
        _check(x, weight, bias, gate)
    # Without tensor cores the product is bound by arithmetic, and cuBLAS is better at that than one kernel for all.
    tensor_cores = x.dtype.itemsize == 2 or autocasting(x)
    chosen = choose("gated_pointwise", x, backend, lambda: unsupported_map(x), prefer_triton=tensor_cores)
    return _IMPLEMENTATIONS[chosen](x, weight, bias, gate)


_IMPLEMENTATIONS = {
    "triton": gated_pointwise_triton,
    "torch": gated_pointwise_torch,
    "reference": gated_pointwise_reference,
}


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> None:
    check_tensors(x=x, weight=weight, gate=gate)
    check_tensors(True, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    B, C, H, W = x.shape
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (C, 1, 1):
        raise ValueError(f"weight must be [D, C, 1, 1] with C = {C} as in x, got shape {tuple(weight.shape)}")
    check_floating(True, x=x)  # PyTorch convolves complex maps, too
    check_filled("x", x, channel=1)
    check_filled("weight", weight, output=0)
    D = weight.shape[0]
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be [D] with D = {D} as in weight, got shape {tuple(bias.shape)}")
    if gate.shape != (B, D, H, W):
        raise ValueError(f"gate must be [B, D, H, W] = {(B, D, H, W)}, got shape {tuple(gate.shape)}")
    check_same(x, weight=weight, bias=bias, gate=gate)
