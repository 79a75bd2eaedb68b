"""The library's networks in fewer bits, for inference on a CPU: images in and logits out are float32."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["REDUCED", "reduce"]


class _Half(nn.Module):
    """All weights and maps in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.bfloat16()).float()


def _int8(model: nn.Module) -> nn.Module:
    """All linear layers in int8: weights now, maps by the range that each turns out to have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a successor in a package of its own
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# Candidate -> what makes it of the library's network.
REDUCED: dict[str, Callable[[nn.Module], nn.Module]] = {"bfloat16": _Half, "int8": _int8}


def reduce(model: nn.Module, candidate: str, mode: str) -> nn.Module:
    """The network that a candidate stands for, a copy.

    Raises:
        ValueError: If ``mode`` is not inference.
    """
    if mode != "infer":
        raise ValueError(f"{candidate} is for inference, not {mode!r}")
    return REDUCED[candidate](model.eval())
