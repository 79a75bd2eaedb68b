"""Floating point operations: what a model needs and what a GPU could do, for the utilisation in the log."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense 16-bit peak in operations per second, for GPUs that Lightning's own table lacks; from NVIDIA's data sheets.
PEAK_16_BIT = {"gb200": 2.5e15, "b200": 2.25e15, "h200": 9.89e14, "rtx 5090": 2.09e14}


def training_flops(net: nn.Module, images: torch.Tensor) -> int:
    """Operations of a training step on ``images``.

    The backward pass costs twice the forward. Counting it goes wrong, because torch's formula for the backward of
    grouped convolutions ignores the groups: a depthwise one counts as a dense one.
    """
    training = net.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(images)
    net.train(training)
    return 3 * counter.get_total_flops()


def peak_flops(device_name: str, dtype: torch.dtype) -> int | None:
    """Peak of a GPU by its name, in 16 bits; None where it is not known."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((int(peak) for chip, peak in PEAK_16_BIT.items() if chip in device_name.lower()), None)
