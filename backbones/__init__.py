"""One file per architecture; importing this package registers every model with timm."""

import timm

from visionattn.backbones import (
    agent,
    anyvit,
    biformer,
    dinat,
    flatten,
    flowformer,
    inline,
    litv2,
    mavit,
    nat,
    ravlt,
    slab,
    van,
)

__all__ = [
    "agent",
    "anyvit",
    "biformer",
    "dinat",
    "flatten",
    "flowformer",
    "inline",
    "list_models",
    "litv2",
    "mavit",
    "nat",
    "ravlt",
    "slab",
    "van",
]

_MODULES = (
    agent,
    anyvit,
    biformer,
    dinat,
    flatten,
    flowformer,
    inline,
    litv2,
    mavit,
    nat,
    ravlt,
    slab,
    van,
)


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models this package adds to timm.

    Args:
        filter: Wildcard such as ``"van_b*"``; empty for all.
        pretrained: Keep only models with published weights, named with their tag (``"van_b0.in1k"``).
    """
    ours = {name for module in _MODULES for name in module.__all__}
    names = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if name.split(".")[0] in ours]
