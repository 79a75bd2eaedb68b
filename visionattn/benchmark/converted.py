"""Models of timm with the library's form of the attention that they have: same parameters, same results."""

from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from visionattn.convert import replace_attention

__all__ = ["CONVERTED", "convert"]

# Candidate -> whether the layers outside of attention are the library's, too; None for the model as timm has it.
CONVERTED = {"timm": None, "converted": False, "converted_linear": True}


def convert(model: nn.Module, candidate: str) -> nn.Module:
    """The model that a candidate stands for, changed in place.

    Raises:
        ValueError: If the model has no attention that can be replaced.
    """
    linear = CONVERTED[candidate]
    if linear is not None:
        swin = any(isinstance(module, SwinTransformerBlock) for module in model.modules())
        replace_attention(model, "window" if swin else "softmax", linear=linear)
    return model
