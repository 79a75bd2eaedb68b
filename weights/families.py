"""Which function renames a model's releases: each family declares its own once, by the name it has in the manifest."""

import sys
from collections.abc import Callable

import timm
from torch import Tensor, nn

from visionattn.weights.manifest import models_of

__all__ = ["FILTERS", "Filter", "declare_filter", "release_filter"]

Filter = Callable[[dict, nn.Module], dict[str, Tensor]]
FILTERS: dict[str, Filter] = {}
"""Of every registered model of ours, without a tag."""


def declare_filter(family: str, checkpoint_filter_fn: Filter) -> None:
    """Say how the releases of a family are renamed.

    Args:
        family: Table of the manifest; the function is for all models that it has rows of.
        checkpoint_filter_fn: From a release's parameter names, and the model they are for, to ours.
    """
    FILTERS.update(dict.fromkeys((name.partition(".")[0] for name in models_of(family)), checkpoint_filter_fn))


def release_filter(name: str, model: nn.Module | None = None) -> Filter | None:
    """The function that renames the releases of a model; None if its family has none.

    Args:
        name: Registered name, with or without a tag. timm declares nothing: the ``checkpoint_filter_fn`` of a family of
            its own lies beside the functions that it registers.
        model: Where the name is none of timm's registry, the function lies beside this one's class.
    """
    if (declared := FILTERS.get(name.partition(".")[0])) is not None:
        return declared
    owner = timm.models.model_entrypoint(name) if timm.is_model(name) else type(model)
    return getattr(sys.modules[owner.__module__], "checkpoint_filter_fn", None)
