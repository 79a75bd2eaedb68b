"""Parameter groups whose learning rates are final, and the schedule that scales them step by step."""

import math

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

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start + (1 - start) * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
