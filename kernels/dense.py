"""Linear map of the last axis, on a CPU by the faster of two libraries. Shapes: C channels in, D channels out.

    y = x weight^T + bias

The same matrix product is ``F.linear``, which is MKL's, and oneDNN's, as a product, which has no gradient in PyTorch,
or as a 1x1 convolution. Either may take twice the time of the other, depending on the processor, the versions and the
shape; a :class:`Choice` tells.

To a compiler the product is one opaque operator: it is nothing that inductor would fuse with its neighbours either,
and its own lowering of such a convolution is several times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.checks import check_same, check_tensors
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.machine import capability
from visionattn.kernels.common.mode import eager, exporting, transformed
from visionattn.kernels.common.tuning import Choice

__all__ = ["linear", "linear_gelu"]

ONEDNN = torch.backends.mkldnn.is_available()
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in the fastest form known for device and dtype.

    Args:
        x: Features. [..., C]
        weight: One row per output. [D, C]
        bias: Added to the result, or ``None``. [D]

    Returns:
        The mapped features. [..., D]

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _fastest(x, weight, bias)
    try:
        return _fastest(x, weight, bias)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check(x, weight, bias)  # not before: it takes half as long as a small product
        raise


def _fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _covers(x, weight, bias):
        return F.linear(x, weight, bias)
    if eager(x):
        return _product(x, weight, bias)
    opaque = torch.compiler.is_compiling() and not exporting() and not transformed()
    return _linear(x, weight, bias) if opaque else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias))``, in inference on a CPU without another pass over the result.

    Args:
        x: Features. [..., C]
        weight: One row per output. [D, C]
        bias: Added before GELU, or ``None``. [D]

    Returns:
        The activated features. [..., D]
    """
    if _trained(x, weight) or not _covers(x, weight, bias) or not eager(x):
        return F.gelu(linear(x, weight, bias))
    form = _library(x, weight, "inference+gelu")
    if form == "onednn":
        return _pointwise(x, weight, bias, "gelu", [], "none")
    return torch.ops.aten.gelu_(FORMS[form](x, weight, bias))


def _covers(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is more than one form to choose from; oneDNN's looks at nothing that it is given."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or not ONEDNN:
        return False
    if x.dim() < 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.device.type != "cpu":
        return False
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1] or bias.device != x.device):
        return False
    return not torch.is_autocast_enabled("cpu")


def _trained(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(x=x, weight=weight)
    check_tensors(True, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [D, C], got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., C] with C = {weight.shape[1]} as in weight, got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [D] with D = {weight.shape[0]} as in weight, got shape {tuple(bias.shape)}")
    check_same(x, weight=weight, bias=bias)


def _samples(x: Tensor) -> tuple[int, int]:
    """How many samples of maps the positions pass as, 0 where a convolution never pays, and how many zeros follow.

    On one thread PyTorch leaves convolutions of less than 16 samples to MKL; many small ones are slow. Where no number
    of samples fits, as with 196 patches and a class token, up to 15 zeros make 16 of them.
    """
    positions = x.shape[:-1].numel()
    samples = next((n for n in range(16, min(64, positions // 4) + 1) if positions % n == 0), len(x))
    if positions == 0 or samples >= 16 or torch.get_num_threads() > 1:
        return (samples if positions else 0), 0
    return (16, -positions % 16) if positions >= 96 else (0, 0)


def _maps(x: Tensor, samples: int, zeros: int) -> Tensor:
    """[..., C] as channels_last maps [samples, C, positions, 1]"""
    if zeros:
        x = F.pad(x.reshape(-1, x.shape[-1]), [0, 0, 0, zeros])
    return x.reshape(samples, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _positions(maps: Tensor, like: Tensor) -> Tensor:
    """The maps' positions in the order of ``like`` [..., C], without the zeros that follow."""
    rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])[: like.shape[:-1].numel()]
    return rows.reshape(*like.shape[:-1], maps.shape[1])


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    samples, zeros = _samples(x)
    if not samples:
        return F.linear(x, weight, bias)
    return _positions(F.conv2d(_maps(x, samples, zeros), weight[:, :, None, None], bias), x)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _pointwise(x, weight, bias, "none", [], "")


_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
FORMS = {"mkl": F.linear, "convolution": _convolved}
if ONEDNN and _pointwise is not None:
    FORMS["onednn"] = _multiplied


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return FORMS[_library(x, weight, "training" if _trained(x, weight) else "inference")](x, weight, bias)


def _library(x: Tensor, weight: Tensor, use: str) -> str:
    """Whose product runs: ``"mkl"``, ``"onednn"`` or, also oneDNN's, ``"convolution"``.

    Args:
        x: [..., C]
        weight: [D, C]
        use: ``"inference"``, ``"inference+gelu"``, ``"training"`` (the product and its gradients) or
            ``"gradients"`` (of a compiled graph).
    """
    D, C = weight.shape
    positions = x.numel() // C if C else 0
    if positions == 0:
        return "mkl"
    # Sizes between two powers of two are one kind, and tokens that fill no maps without padding are another.
    return LIBRARY.pick(positions.bit_length(), int(positions % 16 == 0), C, D, use)


def _expected(threads: int, bits: int, even: int, C: int, D: int, use: str) -> str:
    # Times over MKL's on an AMD EPYC, one thread, PyTorch 2.14. oneDNN's product: 0.8 to 1.0 with AVX-512, 0.85 to 0.9
    # with GELU; 0.9 to 1.05 with AVX2, 1.0 to 1.2 with GELU. Convolutions with their gradients: 0.95 to 1.2 with
    # AVX-512, 1.2 to 1.7 with AVX2; with PyTorch 2.15 and AVX-512 it was 0.5 to 0.8.
    if not capability().startswith("AVX512"):
        return "mkl"
    if use.startswith("inference") and "onednn" in FORMS:
        return "onednn"
    return "convolution" if TORCH >= (2, 15) else "mkl"


def _trial(bits: int, even: int, C: int, D: int, use: str) -> dict[str, Callable[[], object]]:
    positions = 3 << max(bits - 2, 0)
    while positions > 64 and 2 * positions * C * D > 2**28:  # some milliseconds
        positions //= 2
    x = torch.full((1, max(1, positions // 16 * 16 + (0 if even else 1)), C), 0.5)
    weight, bias = torch.full((D, C), 0.5), torch.zeros(D)
    if use == "inference":
        return {name: torch.no_grad()(partial(form, x, weight, bias)) for name, form in FORMS.items()}
    if use == "inference+gelu":
        calls = {name: (lambda form=form: torch.ops.aten.gelu_(form(x, weight, bias))) for name, form in FORMS.items()}
        if "onednn" in calls:
            calls["onednn"] = partial(_pointwise, x, weight, bias, "gelu", [], "none")
        return {name: torch.no_grad()(call) for name, call in calls.items()}
    grad = torch.full((*x.shape[:-1], D), 0.5)
    if use == "gradients":
        forms = {"mkl": _matrix_backward, "convolution": _convolved_backward}
        return {name: partial(form, grad, x, weight, [True] * 3) for name, form in forms.items()}
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    forms = {"mkl": F.linear, "convolution": _convolved}
    return {name: (lambda form=form: torch.autograd.grad(form(*leaves), leaves, grad)) for name, form in forms.items()}


FIELDS = ("bits of positions", "multiple of 16", "C", "D", "use")
LIBRARY = Choice("dense product", ("mkl", "convolution", "onednn"), FIELDS, _expected, _trial)


@torch.library.custom_op("visionattn::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias).contiguous()


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("visionattn::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, each empty if not needed."""
    if _library(x, weight, "gradients") == "mkl":
        return _matrix_backward(grad, x, weight, needed)
    return _convolved_backward(grad, x, weight, needed)


def _convolved_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    samples, zeros = _samples(x)
    if not samples:
        return _matrix_backward(grad, x, weight, needed)
    maps = _maps(grad, samples, zeros), _maps(x, samples, zeros), weight[:, :, None, None]
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, groups
    dx, dw, db = torch.ops.aten.convolution_backward(*maps, [len(weight)], *geometry, needed)
    return (
        _positions(dx, x).contiguous() if needed[0] else x.new_empty(0),
        dw.reshape(weight.shape).contiguous() if needed[1] else x.new_empty(0),
        db if needed[2] else x.new_empty(0),
    )


def _matrix_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad.reshape(-1, len(weight))
    return (
        (rows @ weight).view(x.shape) if needed[0] else x.new_empty(0),
        rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else x.new_empty(0),
        rows.sum(0) if needed[2] else x.new_empty(0),
    )


@_linear_backward.register_fake
def _(grad, x, weight, needed):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (x.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, needed, strict=True))
    return dx, dw, db


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    if torch.is_grad_enabled():  # somebody wants to differentiate this, too
        return twice.gradients(F.linear, grad, ctx.saved_tensors)
    needed = list(ctx.needs_input_grad)
    found = _linear_backward(grad, *ctx.saved_tensors[:2], needed)
    return tuple(g if wanted else None for g, wanted in zip(found, needed, strict=True))


_linear.register_autograd(_backward, setup_context=_save)


@flop_formula("linear")
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


if "onednn" in FORMS:

    @flop_formula("mkldnn._linear_pointwise")
    def _flops_pointwise(x_shape, weight_shape, *args, **kwargs) -> int:
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@flop_formula("linear_backward")
def _flops_backward(grad_shape, x_shape, weight_shape, needed, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0] * sum(needed[:2])
