"""Parameter groups whose learning rates are final, and the schedule that scales them step by step."""

import math
from collections.abc import Callable

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def create_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, layer_decay: float | None = None, **arguments
) -> torch.optim.Optimizer:
    """timm's optimizer, without weight decay on biases, norms and what the model exempts.

    timm leaves the factors of layer-wise decay in ``lr_scale``, which only its own schedulers read: with any other
    every layer would learn equally fast. Here they are folded into each group's ``lr``.

    Args:
        model: Gives parameters, ``no_weight_decay`` and ``group_matcher``.
        name: One of ``timm.optim.list_optimizers()``.
        lr: Learning rate of the last layer.
        weight_decay: Weight decay of matrices and kernels.
        layer_decay: Factor from each layer's learning rate to that of the layer before it; None for equal rates.
        **arguments: Passed to the optimizer.
    """
    optimizer = create_optimizer_v2(
        model, opt=name, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **arguments
    )
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr * group.pop("lr_scale", 1.0)
    return optimizer


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, start: float, end: float
) -> LambdaLR:
    """Linear warm-up, then half a cosine, set at every step; groups keep their ratios throughout.

    Args:
        optimizer: Its groups hold the peak learning rates.
        warmup_steps: Steps until the peak.
        total_steps: Steps until ``end``.
        start: First learning rate, relative to the peak.
        end: Last learning rate, relative to the peak.
    """

    def cosine(step: int) -> float:
        return end + (1 - end) * (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps))) / 2

    return _warmup(optimizer, warmup_steps, start, cosine)


def warmup_poly(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, start: float, end: float, power: float
) -> LambdaLR:
    """Linear warm-up, then a polynomial; arguments as those of :func:`warmup_cosine`, and its exponent ``power``."""

    def poly(step: int) -> float:
        return end + (1 - end) * (1 - _progress(step, warmup_steps, total_steps)) ** power

    return _warmup(optimizer, warmup_steps, start, poly)


def warmup_step_decay(
    optimizer: torch.optim.Optimizer, warmup_steps: int, milestones: list[int], start: float
) -> LambdaLR:
    """Linear warm-up, then a tenth at each of the steps ``milestones``; other arguments as :func:`warmup_cosine`."""
    return _warmup(optimizer, warmup_steps, start, lambda step: 0.1 ** sum(step >= n for n in milestones))


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def _warmup(optimizer: torch.optim.Optimizer, steps: int, start: float, then: Callable[[int], float]) -> LambdaLR:
    def factor(step: int) -> float:
        return start + (1 - start) * step / steps if step < steps else then(step)

    return LambdaLR(optimizer, factor)
