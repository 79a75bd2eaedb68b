"""From the parameter names of a release to ours; every family's ``checkpoint_filter_fn`` is a list of rules."""

import re
from collections.abc import Callable, Sequence

from timm.models import clean_state_dict
from torch import Tensor

__all__ = ["rename_checkpoint"]

Rule = tuple[str, str | Callable[[re.Match], str] | None]
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: averaged weights first
NATIVE = ("stem.", "stages.")


def rename_checkpoint(state_dict: dict, rules: Sequence[Rule], native: tuple[str, ...] = NATIVE) -> dict[str, Tensor]:
    """Unwrap and rename what the authors published; a state dict with our own names is returned as it is.

    Unwrapping takes the tensors out of a training checkpoint, removes the prefixes that wrappers leave, and takes the
    backbone out of a detector or segmenter.

    Args:
        state_dict: Parameters by name, or a checkpoint that holds them.
        rules: ``(pattern, replacement)`` pairs for ``re.sub``, applied in turn to every name; a replacement of None
            drops the parameters whose name the pattern is found in.
        native: How names begin in our state dicts only.
    """
    nest = next((key for key in NESTS if isinstance(state_dict.get(key), dict)), None)
    state_dict = state_dict if nest is None else state_dict[nest]
    if any(name.startswith(native) for name in state_dict):
        return state_dict
    state_dict = clean_state_dict(state_dict)
    inside = {name.removeprefix("backbone."): v for name, v in state_dict.items() if name.startswith("backbone.")}
    renamed = {}
    for name, value in (inside or state_dict).items():
        for pattern, replacement in rules:
            if replacement is not None:
                name = re.sub(pattern, replacement, name)
            elif re.search(pattern, name):
                break
        else:
            renamed[name] = value
    return renamed
