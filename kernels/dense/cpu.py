"""The linear map on a CPU: the same matrix product by MKL, and by oneDNN as a product or as a 1x1 convolution.

Either may take twice the time of the other, depending on the processor, the versions and the shape; a :class:`Choice`
tells. C channels in, D channels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.common import twice
from visionattn.kernels.common.flops import flop_formula
from visionattn.kernels.common.machine import capability
from visionattn.kernels.common.tuning import Choice

__all__ = ["covers", "gradients", "product", "product_gelu", "trained"]

ONEDNN = torch.backends.mkldnn.is_available()
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def covers(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there is more than one form to choose from; oneDNN's looks at nothing that it is given."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or not ONEDNN:
        return False
    if x.dim() < 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.device.type != "cpu":
        return False
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1] or bias.device != x.device):
        return False
    return not torch.is_autocast_enabled("cpu")


def trained(x: Tensor, weight: Tensor) -> bool:
    """Whether gradients will be asked for."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


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


_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _pointwise(x, weight, bias, "none", [], "")


class _Multiplied(torch.autograd.Function):
    """oneDNN's product, which has no gradient in PyTorch; in its gradient the sums over positions are MKL's."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _multiplied(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if twice.wanted(grad):
            return twice.gradients(F.linear, grad, (x, weight, bias))
        return _multiplied_gradients(grad, x, weight, ctx.needs_input_grad)


def _convolved_gradients(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> Gradients:
    samples, zeros = _samples(x)
    if not samples:
        return _gradients(grad, x, weight, needed)
    maps = _maps(grad, samples, zeros), _maps(x, samples, zeros), weight[:, :, None, None]
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, groups
    dx, dw, db = torch.ops.aten.convolution_backward(*maps, [len(weight)], *geometry, list(needed))
    return (
        _positions(dx, x) if needed[0] else None,
        dw.reshape(weight.shape) if needed[1] else None,
        db if needed[2] else None,
    )


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], multiply: Callable = torch.matmul
) -> Gradients:
    """By matrix products.

    Args:
        multiply: Multiplies the gradient, [N, D], by the weight, [D, C].
    """
    rows = grad.reshape(-1, len(weight))
    return (
        multiply(rows, weight).view(x.shape) if needed[0] else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
        rows.sum(0) if needed[2] else None,
    )


_multiplied_gradients = partial(_gradients, multiply=lambda rows, weight: _multiplied(rows, weight.t(), None))

# By name: the product alone, the product to be differentiated, and its gradients.
FORMS = {"mkl": F.linear, "convolution": _convolved}
TRAINED = dict(FORMS)
GRADIENTS = {"mkl": _gradients, "convolution": _convolved_gradients}
if ONEDNN and _pointwise is not None:
    FORMS["onednn"], TRAINED["onednn"], GRADIENTS["onednn"] = _multiplied, _Multiplied.apply, _multiplied_gradients

    @flop_formula("mkldnn._linear_pointwise")
    def _flops_pointwise(x_shape, weight_shape, *args, **kwargs) -> int:
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of tensors that :func:`covers` allows, with a gradient if one will be asked for."""
    if trained(x, weight):
        return TRAINED[_form(x, weight, "training")](x, weight, bias)
    return FORMS[_form(x, weight, "inference")](x, weight, bias)


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of the product, without a gradient."""
    return _activated(_form(x, weight, "inference+gelu"), x, weight, bias)


def _activated(form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if form == "onednn":
        return _pointwise(x, weight, bias, "gelu", [], "none")
    return torch.ops.aten.gelu_(FORMS[form](x, weight, bias))


def gradients(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> Gradients:
    """The gradients of x, weight and bias, None where not needed, for the backward pass of a compiled graph."""
    return GRADIENTS[_form(x, weight, "gradients")](grad, x, weight, needed)


def _form(x: Tensor, weight: Tensor, use: str) -> str:
    """Name of a form.

    Args:
        x: [..., C]
        weight: [D, C]
        use: ``"inference"``, ``"inference+gelu"``, ``"training"`` (the product and its gradients) or ``"gradients"``.
    """
    D, C = weight.shape
    positions = x.numel() // C if C else 0
    if positions == 0 or D == 0:
        return "mkl"
    # Sizes between two powers of two are one kind, and tokens that fill no maps without padding are another.
    return FORM.pick(positions.bit_length(), int(positions % 16 == 0), C, D, use)


def _expected(threads: int, bits: int, even: int, C: int, D: int, use: str) -> str:
    # Times over MKL's on an AMD EPYC, one thread, PyTorch 2.14. oneDNN's product: 0.8 to 1.0 with AVX-512, 0.85 to 0.9
    # with GELU; 0.9 to 1.05 with AVX2, 1.0 to 1.2 with GELU. Its product with the weight in the gradient: 0.76 to 0.93
    # and 0.87 to 1.12. Convolutions with their gradients: 0.95 to 1.2 with AVX-512, 1.2 to 1.7 with AVX2; with PyTorch
    # 2.15 and AVX-512 it was 0.5 to 0.8.
    if not capability().startswith("AVX512"):
        return "mkl"
    return "onednn" if "onednn" in FORMS else "convolution" if TORCH >= (2, 15) else "mkl"


def _trial(bits: int, even: int, C: int, D: int, use: str) -> dict[str, Callable[[], object]]:
    positions = 3 << max(bits - 2, 0)
    while positions > 64 and 2 * positions * C * D > 2**28:  # some milliseconds
        positions //= 2
    x = torch.full((1, max(1, positions // 16 * 16 + (0 if even else 1)), C), 0.5)
    weight, bias = torch.full((D, C), 0.5), torch.zeros(D)
    if use == "inference":
        return {name: torch.no_grad()(partial(form, x, weight, bias)) for name, form in FORMS.items()}
    if use == "inference+gelu":
        return {name: torch.no_grad()(partial(_activated, name, x, weight, bias)) for name in FORMS}
    grad = torch.full((*x.shape[:-1], D), 0.5)
    if use == "gradients":
        return {name: partial(form, grad, x, weight, [True] * 3) for name, form in GRADIENTS.items()}
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    return {
        name: (lambda form=form: torch.autograd.grad(form(*leaves), leaves, grad)) for name, form in TRAINED.items()
    }


FIELDS = ("bits of positions", "multiple of 16", "C", "D", "use")
FORM = Choice("dense product", tuple(FORMS), FIELDS, _expected, _trial)
