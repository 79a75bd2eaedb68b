"""Depthwise convolution of a map, dilated or not. Shapes: B batch, C channels, H rows, W columns, K kernel side.

    out[b, c, y, x] = bias[c] + sum_ij weight[c, i, j] * x[b, c, y + (i - K // 2) * d, x + (j - K // 2) * d]

for dilation d, with zeros outside the map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.backend import choose
from visionattn.kernels.common.checks import (
    check_extent,
    check_filled,
    check_floating,
    check_integer,
    check_same,
    check_tensors,
    unsupported_map,
)
from visionattn.kernels.common.custom_op import custom_op
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.jit import jit, tl
from visionattn.kernels.common.launch import Launch, pointer
from visionattn.kernels.common.layout import channels_last, is_channels_last
from visionattn.kernels.common.mode import (
    autocast,
    autocasting,
    compiling,
    eager,
    exporting,
    forward_mode,
    within_transform,
)
from visionattn.kernels.common.precision import accumulator, precise_dtype

__all__ = ["depthwise_conv2d", "depthwise_conv2d_gelu"]


TRITON_SIDES = (3, 5, 7)
WEIGHT_GRAD_STEPS = 16
_CHANNELS_LAST = torch.channels_last
_onednn = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if torch.backends.mkldnn.is_available() else None


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """PyTorch's own convolution. Arguments as in :func:`depthwise_conv2d`."""
    padding = [dilation * (side // 2) for side in weight.shape[2:]]
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def depthwise_conv2d_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """The fastest form known in operators of PyTorch. Arguments as in :func:`depthwise_conv2d`.

    It differs from the reference on the CPU only, where oneDNN has fast kernels for a few depthwise convolutions and
    for fewer of their gradients; the others are put in terms of those.
    """
    if x.device.type != "cpu" or exporting():  # an exported graph holds one convolution node
        return depthwise_conv2d_reference(x, weight, bias, dilation)
    x, weight, bias = autocast(x, weight, bias)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if compiling():
        out = _depthwise_cpu(x, weight, bias, dilation)
    elif trained and _slow_gradient(x, weight, dilation) and not forward_mode():
        out = _DepthwiseCPU.apply(x, weight, bias, dilation)
    else:
        out = _convolve(x, weight, bias, dilation)
    return out if is_channels_last(x) else out.contiguous()


def _slow_gradient(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Whether PyTorch's gradient is slower than one of several calls; on small maps the calls cost more."""
    return (weight.shape[-1] > 3 or dilation > 1) and x.numel() >= 2**14


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, d: int) -> Tensor:
    """Convolve the map, or its phases: the d * d smaller maps of pixels d apart, which a dilated kernel never mixes."""
    padding = d * (weight.shape[-1] // 2)
    # Measured with oneDNN 3.10 and 3.13: dilated kernels are fast up to a padding of 6 in maps that are not smaller.
    # This rule, and the one for gradients above, were the fastest at 48 of 48 sizes timed with AVX-512, 47 with AVX2.
    if d == 1 or padding <= min(6, x.shape[3] - 2):
        return depthwise_conv2d_reference(x, weight, bias, d)
    B, C, H, W = x.shape
    h, w = -(-H // d), -(-W // d)
    x = depthwise_conv2d_reference(_phases(x, d), weight, bias).permute(0, 2, 3, 1)
    x = x.reshape(B, d, d, h, w, C).permute(0, 3, 1, 4, 2, 5).reshape(B, h * d, w * d, C)
    return x[:, :H, :W].contiguous().permute(0, 3, 1, 2)


def _phases(x: Tensor, d: int, margin: int = 0) -> Tensor:
    """Gather the phases, zero-padded to one size and by a margin. [B, C, H, W] -> [B * d * d, C, H / d, W / d]

    In channels_last, whatever the format of ``x``.
    """
    x = x.permute(0, 2, 3, 1)
    B, H, W, C = x.shape
    h, w = -(-H // d) + 2 * margin, -(-W // d) + 2 * margin
    before = margin * d
    x = F.pad(x, (0, 0, before, w * d - W - before, before, h * d - H - before))
    x = x.reshape(B, h, d, w, d, C).permute(0, 2, 4, 1, 3, 5)  # B d d h w C
    return x.reshape(B * d * d, h, w, C).contiguous().permute(0, 3, 1, 2)


class _DepthwiseCPU(torch.autograd.Function):
    """The convolution with gradients made of operators that oneDNN runs fast; differentiable again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, dilation):
        return _convolve(x, weight, bias, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(grad, *ctx.saved_tensors, ctx.dilation, ctx.needs_input_grad), None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, d: int, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Those of x, weight and bias that are needed, by operators that oneDNN runs fast."""
    grad = channels_last(grad)
    return (
        _convolve(grad, weight.flip(2, 3), None, d) if needed[0] else None,
        _weight_grad(grad, x, weight, d) if needed[1] else None,
        grad.sum((0, 2, 3)) if needed[2] else None,
    )


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, d: int) -> Tensor:
    """Gradient of the kernel by phases, three of its columns at a time.

    oneDNN's fast depthwise kernel for this gradient (jit_dw) takes undilated kernels of at most three columns and wants
    the padding inside the map. A whole 7x7 at once takes 1.4 to 5 times as long.
    """
    C, _, K, _ = weight.shape
    grad, x = _phases(grad, d), _phases(x, d, margin=K // 2)
    columns = []
    for first in range(0, K, 3):
        width = min(3, K - first)
        part, kernel = x[..., first : first + grad.shape[3] + width - 1], weight[..., :width]
        columns.append(
            torch.ops.aten.convolution_backward(
                grad, part, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], C, [False, True, False]
            )[1]
        )
    return torch.cat(columns, 3)


# On a CPU a compiled graph holds the convolution as one operator, too: inductor would mix the two memory formats, and
# the gradient of a contiguous map takes twice the time.


@torch.library.custom_op("visionattn::depthwise_conv2d_cpu", mutates_args=())
def _depthwise_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Returns channels_last, whatever the format of x."""
    return channels_last(_convolve(channels_last(x), weight, bias, dilation))


@torch.library.custom_op("visionattn::depthwise_conv2d_cpu_backward", mutates_args=())
def _depthwise_cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in channels_last, weight and bias, each empty if not needed."""
    x, grad = channels_last(x), channels_last(grad)
    if _slow_gradient(x, weight, dilation):
        found = _gradients(grad, x, weight, dilation, needed)
    else:
        padding, steps = [dilation * (weight.shape[-1] // 2)] * 2, [dilation] * 2
        geometry = ([1, 1], padding, steps, False, [0, 0], len(weight))  # stride, ..., transposed, ..., groups
        found = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *geometry, needed)
    dx, dw, db = (x.new_empty(0) if g is None or not wanted else g for g, wanted in zip(found, needed, strict=True))
    return channels_last(dx) if needed[0] else dx, dw.contiguous(), db.contiguous()


@_depthwise_cpu_backward.register_fake
def _(grad, x, weight, dilation, needed):
    dx = torch.empty_like(x, memory_format=_CHANNELS_LAST) if needed[0] else x.new_empty(0)
    dw, db = weight.shape if needed[1] else (0,), weight.shape[:1] if needed[2] else (0,)
    return dx, x.new_empty(dw), x.new_empty(db)


def _backward_cpu(ctx, grad):
    if twice.wanted(grad):
        form = partial(depthwise_conv2d_reference, dilation=ctx.dilation)
        return *twice.gradients(form, grad, ctx.saved_tensors), None
    needed = list(ctx.needs_input_grad[:3])
    found = _depthwise_cpu_backward(grad, *ctx.saved_tensors[:2], ctx.dilation, needed)
    return *(g if wanted else None for g, wanted in zip(found, needed, strict=True)), None


@jit
def _run_start(run, runs_per_row, dilation, RUN: tl.constexpr):
    """Split the index of a run, RUN outputs of one row that lie `dilation` apart, into map row and first column."""
    row = run // runs_per_row
    rest = run % runs_per_row
    return row, rest // dilation * (RUN * dilation) + rest % dilation


@jit
def depthwise_fwd(
    x, weight, bias, out, n_runs, runs_per_row, C, H, W, dilation,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, RUN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_R runs of BLOCK_C channels; a pixel, once loaded, serves up to RUN outputs. weight is [K * K, C]."""
    run = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_in = c < C
    row, col = _run_start(run, runs_per_row, dilation, RUN)
    y = row % H
    total = ()
    for _ in tl.static_range(RUN):
        if HAS_BIAS:
            total = total + (tl.zeros([BLOCK_R, BLOCK_C], ACC) + tl.load(bias + c, c_in, other=0.0).to(ACC)[None, :],)
        else:
            total = total + (tl.zeros([BLOCK_R, BLOCK_C], ACC),)
    i = 0
    while i < K + tl.minimum(n_runs, 0):  # a bound the compiler cannot see: unrolled, it takes all registers on AMD
        shift = (i - K // 2) * dilation
        row_in = (run < n_runs) & (y + shift >= 0) & (y + shift < H)
        line = x + (row + shift).to(tl.int64)[:, None] * W * C + c[None, :]
        taps = ()
        for j in tl.static_range(K):
            taps = taps + (tl.load(weight + (i * K + j) * C + c, c_in, other=0.0).to(ACC)[None, :],)
        for s in tl.static_range(RUN + K - 1):
            at = col + (s - K // 2) * dilation
            inside = (row_in & (at >= 0) & (at < W))[:, None] & c_in[None, :]
            pixel = tl.load(line + (at * C)[:, None], inside, other=0.0).to(ACC)
            sums = ()
            for t in tl.static_range(RUN):
                if s - t >= 0 and s - t < K:
                    sums = sums + (total[t] + pixel * taps[s - t],)
                else:
                    sums = sums + (total[t],)
            total = sums
        i += 1
    line = out + row.to(tl.int64)[:, None] * W * C + c[None, :]
    for t in tl.static_range(RUN):
        at = col + t * dilation
        inside = ((run < n_runs) & (at < W))[:, None] & c_in[None, :]
        tl.store(line + (at * C)[:, None], total[t].to(out.dtype.element_ty), inside)


@jit
def depthwise_bwd_weight(
    grad, x, out, n_runs, runs_per_row, C, H, W, dilation,
    K: tl.constexpr, RUN: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One kernel row's gradient over STEPS * BLOCK_R runs. out is [splits, K * K + 1, C], the bias gradient last."""
    split, i = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_in = c < C
    shift = (i - K // 2) * dilation
    total = ()
    for _ in tl.static_range(K):
        total = total + (tl.zeros([BLOCK_R, BLOCK_C], ACC),)
    total_bias = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for step in range(STEPS):
        run = (split * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        row, col = _run_start(run, runs_per_row, dilation, RUN)
        y = row % H
        line = grad + row.to(tl.int64)[:, None] * W * C + c[None, :]
        grads = ()
        for t in tl.static_range(RUN):
            at = col + t * dilation
            inside = ((run < n_runs) & (at < W))[:, None] & c_in[None, :]
            grads = grads + (tl.load(line + (at * C)[:, None], inside, other=0.0).to(ACC),)
            total_bias += grads[t]
        row_in = (run < n_runs) & (y + shift >= 0) & (y + shift < H)
        line = x + (row + shift).to(tl.int64)[:, None] * W * C + c[None, :]
        for s in tl.static_range(RUN + K - 1):
            at = col + (s - K // 2) * dilation
            inside = (row_in & (at >= 0) & (at < W))[:, None] & c_in[None, :]
            pixel = tl.load(line + (at * C)[:, None], inside, other=0.0).to(ACC)
            sums = ()
            for j in tl.static_range(K):
                if s - j >= 0 and s - j < RUN:
                    sums = sums + (total[j] + pixel * grads[s - j],)
                else:
                    sums = sums + (total[j],)
            total = sums
    part = out + split.to(tl.int64) * (K * K + 1) * C + c
    for j in tl.static_range(K):
        tl.store(part + (i * K + j) * C, tl.sum(total[j], 0), c_in)
    if i == 0:
        tl.store(part + K * K * C, tl.sum(total_bias, 0), c_in)


def launch_config(C: int, K: int, W: int, dilation: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of one launch. Few on purpose: each is compiled anew, and all of them ahead of time in the tests."""
    # Loads of 16 bytes need strides divisible by 16; without them, or in float64, a tile of 1024 values spills.
    wide = C % 16 == 0 and dtype.itemsize <= 4
    channels = 64 if wide and C % 64 == 0 else 32
    computed = {run: -(-W // (run * dilation)) * run for run in (4, 5)}  # columns per phase, some beyond the map
    run = 4 if computed[4] <= computed[5] else 5
    return {"K": K, "RUN": run, "BLOCK_R": (1024 if wide else 256) // channels, "BLOCK_C": channels, "num_warps": 4}


def launches(dtype: torch.dtype, hip: bool) -> Iterator[Launch]:
    """What is compiled ahead of time: every result of :func:`launch_config` for a dtype."""
    x, sums = pointer(dtype), pointer(precise_dtype(dtype))
    for C in (32, 64, 33) if dtype.itemsize <= 4 else (32,):
        sizes = dict.fromkeys(("n_runs", "runs_per_row", "H", "W", "dilation"), "i32")
        sizes["C"] = "i32:16" if C % 16 == 0 else "i32"
        for K, W in itertools.product(TRITON_SIDES, (8, 5)):  # widths: a multiple of 4, a multiple of 5
            config = launch_config(C, K, W, 1, dtype) | {"ACC": accumulator(dtype)}
            typical = (K, W) == (7, 5)
            constants, arguments = config | {"STEPS": WEIGHT_GRAD_STEPS}, {"grad": x, "x": x, "out": sums}
            yield Launch(depthwise_bwd_weight, constants, arguments | sizes, typical)
            arguments = {"x": x, "weight": x, "bias": x, "out": x}
            for bias in (True, False):  # without: the gradient of the input
                yield Launch(depthwise_fwd, config | {"HAS_BIAS": bias}, arguments | sizes, typical and bias)


def _launch(x: Tensor, kernel_side: int, dilation: int) -> tuple[dict, tuple, int]:
    """Keyword arguments, the size arguments shared by the kernels, and the number of runs, for a map ``x``."""
    B, C, H, W = x.shape
    config = launch_config(C, kernel_side, W, dilation, x.dtype)
    runs_per_row = -(-W // (config["RUN"] * dilation)) * dilation
    config["ACC"] = accumulator(x.dtype)
    return config, (B * H * runs_per_row, runs_per_row, C, H, W, dilation), -(-C // config["BLOCK_C"])


@custom_op("depthwise_conv2d")
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Returns channels_last, whatever the format of x."""
    out = torch.empty_like(x, memory_format=_CHANNELS_LAST)
    if x.numel() == 0:
        return out
    x, bias = channels_last(x), None if bias is None else bias.contiguous()
    K = weight.shape[-1]
    config, sizes, c_blocks = _launch(x, K, dilation)
    taps = weight.reshape(-1, K * K).t().contiguous()  # neighbouring channels side by side, as in the map
    grid = (-(-sizes[0] // config["BLOCK_R"]), c_blocks)
    depthwise_fwd[grid](x, taps, taps if bias is None else bias, out, *sizes, HAS_BIAS=bias is not None, **config)
    return out


@_depthwise_cpu.register_fake
@_depthwise.register_fake
def _(x, weight, bias, dilation):
    return torch.empty_like(x, memory_format=_CHANNELS_LAST)


@custom_op("depthwise_conv2d_weight_grad")
def _depthwise_weight_grad(grad: Tensor, x: Tensor, kernel_side: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias: partial sums first, then their sum, without atomics."""
    K, C = kernel_side, x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(C, 1, K, K), x.new_zeros(C)
    config, sizes, c_blocks = _launch(x, K, dilation)
    config["STEPS"] = WEIGHT_GRAD_STEPS
    splits = -(-sizes[0] // (config["BLOCK_R"] * WEIGHT_GRAD_STEPS))
    parts = torch.empty(splits, K * K + 1, C, device=x.device, dtype=precise_dtype(x.dtype))
    grad, x = channels_last(grad), channels_last(x)
    depthwise_bwd_weight[(splits, K, c_blocks)](grad, x, parts, *sizes, **config)
    total = parts.sum(0).to(x.dtype)
    return total[:-1].t().reshape(C, 1, K, K).contiguous(), total[-1].clone()


@_depthwise_weight_grad.register_fake
def _(grad, x, kernel_side, dilation):
    return x.new_empty(x.shape[1], 1, kernel_side, kernel_side), x.new_empty(x.shape[1])


def _save(ctx, inputs, output):
    *tensors, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    if within_transform(grad):  # of which the operators below, though they can be differentiated, know nothing
        form = partial(depthwise_conv2d_reference, dilation=ctx.dilation)
        return *twice.gradients(form, grad, ctx.saved_tensors), None
    x, weight, _ = ctx.saved_tensors
    grad = channels_last(grad)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _depthwise(grad, weight.flip(2, 3), None, ctx.dilation)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _depthwise_weight_grad(grad, x, weight.shape[-1], ctx.dilation)
    return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


_depthwise.register_autograd(_backward, setup_context=_save)
_depthwise_cpu.register_autograd(_backward_cpu, setup_context=_save)


def _save_weight_grad(ctx, inputs, output):
    grad, x, _, ctx.dilation = inputs
    ctx.save_for_backward(grad, x)


def _backward_weight_grad(ctx, grad_weight, grad_bias):
    grad, x = ctx.saved_tensors
    convolve = depthwise_conv2d_reference if within_transform(grad_weight) else _depthwise
    grad_grad = convolve(x, grad_weight, grad_bias, ctx.dilation) if ctx.needs_input_grad[0] else None
    grad_x = convolve(grad, grad_weight.flip(2, 3), None, ctx.dilation) if ctx.needs_input_grad[1] else None
    return grad_grad, grad_x, None, None


_depthwise_weight_grad.register_autograd(_backward_weight_grad, setup_context=_save_weight_grad)


@flop_formula("depthwise_conv2d")
@flop_formula("depthwise_conv2d_cpu")
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


@flop_formula("depthwise_conv2d_cpu_backward")
def _flops_cpu_backward(grad_shape, x_shape, weight_shape, dilation, needed, *args, **kwargs) -> int:
    return _flops(x_shape, weight_shape) * sum(needed[:2])


@flop_formula("depthwise_conv2d_weight_grad")
def _flops_weight_grad(grad_shape, x_shape, kernel_side, *args, **kwargs) -> int:
    return 2 * math.prod(x_shape) * kernel_side**2


def depthwise_conv2d_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """The Triton kernels. Arguments as in :func:`depthwise_conv2d`."""
    x, weight, bias = autocast(x, weight, bias)
    out = _depthwise(channels_last(x), weight, bias, dilation)
    return out if is_channels_last(x) else out.contiguous()


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, backend: str | None = None
) -> Tensor:
    """Convolve every channel with its own odd, square kernel; stride 1, zero padding that keeps the size.

    Args:
        x: Input map; channels_last is the fast memory format. [B, C, H, W]
        weight: One kernel per channel, ``K`` odd. [C, 1, K, K]
        bias: Added to every position, or ``None``. [C]
        dilation: Distance between neighbouring taps.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` for the setting or the automatic choice.

    Returns:
        A map of the shape, dtype and memory format of ``x``; under autocast, of its dtype, as a convolution returns.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or ``backend`` is unknown.
        BackendError: If the backend that was asked for cannot run this call.
    """
    if not torch.jit.is_tracing():  # which warns of every comparison
        _check(x, weight, bias, dilation)
    chosen = choose("depthwise_conv2d", x, backend, lambda: _unsupported(x, weight))
    return _IMPLEMENTATIONS[chosen](x, weight, bias, dilation)


def depthwise_conv2d_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.gelu(depthwise_conv2d(x, weight, bias))``, in inference on a CPU without another pass over the map.

    Args:
        x: Input map; channels_last is the fast memory format. [B, C, H, W]
        weight: One kernel per channel, ``K`` odd. [C, 1, K, K]
        bias: Added before GELU, or ``None``. [C]

    Returns:
        A map of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if not _joins_gelu(x, weight, bias):
        return F.gelu(depthwise_conv2d(x, weight, bias))
    _check(x, weight, bias, 1)
    padding = [weight.shape[2] // 2] * 2
    return _onednn(x, weight, bias, padding, [1, 1], [1, 1], len(weight), "gelu", [], "none")


def _joins_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN convolves and activates at once: it did in 0.7 to 0.8 of the time at every size timed."""
    if _onednn is None or not isinstance(x, Tensor) or not isinstance(weight, Tensor) or torch.is_grad_enabled():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.device != x.device:
        return False
    return eager(x) and eager(weight) and not autocasting(x) and x.dim() == 4 and is_channels_last(x) and x.numel() > 0


if _onednn is not None:

    @flop_formula("mkldnn._convolution_pointwise")
    def _flops_joined(x_shape, weight_shape, *args, **kwargs) -> int:
        return _flops(x_shape, weight_shape)


_IMPLEMENTATIONS = {
    "triton": depthwise_conv2d_triton,
    "torch": depthwise_conv2d_torch,
    "reference": depthwise_conv2d_reference,
}


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    if weight.shape[-1] not in TRITON_SIDES:
        return f"the kernel side is {weight.shape[-1]}, the kernels cover {', '.join(map(str, TRITON_SIDES))}"
    return unsupported_map(x)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    check_tensors(x=x, weight=weight)
    check_tensors(True, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    C = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != C or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be [C, 1, K, K] with C = {C} as in x, got shape {tuple(weight.shape)}")
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f"weight must have an odd kernel side, got {weight.shape[-1]}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must be [C] with C = {C} as in x, got shape {tuple(bias.shape)}")
    check_floating(True, x=x)  # PyTorch convolves complex maps, too
    check_filled("x", x, channel=1)
    check_integer("dilation", dilation, least=1)
    check_extent("dilation", (dilation, dilation), x.shape[2:])
    check_same(x, weight=weight, bias=bias)
