"""Parameters and multiply-accumulates of models whose authors do not say."""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionattn.weights import checkpoints
from visionattn.weights.commands.translate import shadow
from visionattn.weights.errors import WeightsError

__all__ = ["count"]


def count(name: str) -> dict[str, float]:
    """Millions of parameters and 10^9 multiply-accumulates of one image, of products and convolutions.

    Nothing is loaded or computed; neighborhood attention counts what PyTorch's form of it computes, some per cent more
    than the products that it needs.

    Args:
        name: Checkpoint of the manifest: of a model of ours, or of one of timm's.

    Returns:
        ``params_m`` and ``gmacs`` as the manifest has them.

    Raises:
        WeightsError: If there is no such checkpoint, or it is of no model that can be built.
    """
    row = checkpoints().get(name)
    if row is None or not (row["model"] or "timm" in row):
        raise WeightsError(f"{name} is no checkpoint of a model that can be built here")
    if row["model"]:
        classes = row["num_classes"]
        arch = name.partition(".")[0]
        net = shadow(arch) if classes == 1000 else timm.create_model(arch, num_classes=classes, device="meta")
        size = row["input_size"]
    else:
        with torch.device("meta"):
            net = timm.create_model(row["timm"])
        size = net.pretrained_cfg["input_size"]
    training = net.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, *size, device="meta"))
    net.train(training)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return dict(params_m=float(f"{parameters / 1e6:.4g}"), gmacs=float(f"{counter.get_total_flops() / 2e9:.3g}"))
