"""One file per architecture; importing this package registers every model with timm."""

import timm

from visionattn.backbones import anyvit, biformer, dinat, flowformer, litv2, mavit, nat, ravlt, van

__all__ = ["anyvit", "biformer", "dinat", "flowformer", "list_models", "litv2", "mavit", "nat", "ravlt", "van"]

_MODULES = (anyvit, biformer, dinat, flowformer, litv2, mavit, nat, ravlt, van)


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models this package adds to timm.

    Args:
        filter: Wildcard such as ``"van_b*"``; empty for all.
        pretrained: Keep only models with published weights, named with their tag (``"van_b0.in1k"``).
    """
    ours = {name for module in _MODULES for name in module.__all__}
    names = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if name.split(".")[0] in ours]
