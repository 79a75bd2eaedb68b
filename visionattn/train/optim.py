"""Parameter groups whose learning rates are final, and the schedule that scales them step by step."""

import math
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def param_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """timm's parameter groups, divided further by the learning rates that layers ask for.

    For ``timm.optim.create_optimizer_v2(model, param_group_fn=param_groups, ...)``. Every group has its factor in
    ``lr_scale``, which timm's schedulers read; other schedulers do not.

    Args:
        model: Gives parameters, ``no_weight_decay`` and ``group_matcher``; any layer of it may have ``lr_scales()``:
            wildcards of its parameters' names, each with a factor of the common rate.
        weight_decay: Weight decay of matrices and kernels.
        layer_decay: Factor from each layer's learning rate to that of the layer before it; None for equal rates.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, weight_decay, exempt, layer_decay=layer_decay)
    scales = _lr_scales(model)
    own = {
        parameter: math.prod(scale for pattern, scale in scales.items() if fnmatch(name, pattern))
        for name, parameter in model.named_parameters()
    }
    divided = []
    for group in groups:
        for scale in dict.fromkeys(own[parameter] for parameter in group["params"]):
            params = [parameter for parameter in group["params"] if own[parameter] == scale]
            divided.append({**group, "params": params, "lr_scale": group.get("lr_scale", 1.0) * scale})
    return divided


def _lr_scales(model: nn.Module) -> dict[str, float]:
    """What the layers of a network ask for, by wildcards of the network's parameter names."""
    return {
        f"{prefix}.{pattern}" if prefix else pattern: scale
        for prefix, layer in model.named_modules()
        if hasattr(layer, "lr_scales")
        for pattern, scale in layer.lr_scales().items()
    }


def create_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, layer_decay: float | None = None, **arguments
) -> torch.optim.Optimizer:
    """timm's optimizer, without weight decay on biases, norms and what the model exempts.

    timm leaves the factors of layer-wise decay in ``lr_scale``, which only its own schedulers read: with any other
    every layer would learn equally fast. Here they are folded into each group's ``lr``, as are the model's own.

    Args:
        model: Gives parameters, ``no_weight_decay`` and ``group_matcher``; its layers ``lr_scales``.
        name: One of ``timm.optim.list_optimizers()``.
        lr: Learning rate of the last layer.
        weight_decay: Weight decay of matrices and kernels.
        layer_decay: Factor from each layer's learning rate to that of the layer before it; None for equal rates.
        **arguments: Passed to the optimizer.
    """
    if _lr_scales(model):
        arguments["param_group_fn"] = partial(param_groups, weight_decay=weight_decay, layer_decay=layer_decay)
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
