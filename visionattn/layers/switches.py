"""What timm's switches ask of a layer while it is being built."""

from timm.layers import is_exportable, is_scriptable

__all__ = ["built_for_export"]


def built_for_export() -> bool:
    """Whether a layer made now must be one that TorchScript and exporters can follow.

    It must under timm's switches ``exportable`` and ``scriptable``, as in ``timm.create_model(..., exportable=True)``:
    such a layer calls PyTorch's own operators and never asks which kernel is the fastest for its input.
    """
    return is_exportable() or is_scriptable()
