"""One file per architecture; importing this package registers every model with timm."""

from importlib import import_module
from pkgutil import iter_modules

import timm

__all__ = ["list_models"]

_MODULES = tuple(import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models this package adds to timm.

    Args:
        filter: Wildcard such as ``"van_b*"``; empty for all.
        pretrained: Keep only models with published weights, named with their tag (``"van_b0.in1k"``).
    """
    ours = {name for module in _MODULES for name in module.__all__}
    names = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if name.split(".")[0] in ours]
