"""From the parameter names of a release to ours; every family's ``checkpoint_filter_fn`` is a list of rules."""

import logging
import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models import clean_state_dict
from torch import Tensor

__all__ = ["rename_checkpoint", "resize_axes", "resize_tokens", "unwrap"]

_logger = logging.getLogger(__name__)
Rule = tuple[str, str | Callable[[re.Match], str] | None]
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: averaged weights first
WRAPPERS = ("module.", "_orig_mod.")
NATIVE = ("stem.", "stages.")


def unwrap(state_dict: dict) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without the prefixes that DDP and ``torch.compile`` leave."""
    nest = next((key for key in NESTS if isinstance(state_dict.get(key), dict)), None)
    state_dict = state_dict if nest is None else state_dict[nest]
    return clean_state_dict(state_dict) if any(str(name).startswith(WRAPPERS) for name in state_dict) else state_dict


def rename_checkpoint(state_dict: dict, rules: Sequence[Rule], native: tuple[str, ...] = NATIVE) -> dict[str, Tensor]:
    """Unwrap and rename what the authors published; a state dict with our own names is returned as it is.

    Besides what :func:`unwrap` does, this takes the backbone out of a detector or segmenter.

    Args:
        state_dict: Parameters by name, or a checkpoint that holds them.
        rules: ``(pattern, replacement)`` pairs for ``re.sub``, applied in turn to every name; a replacement of None
            drops the parameters whose name the pattern is found in.
        native: How names begin in our state dicts only.
    """
    state_dict = unwrap(state_dict)
    if any(name.startswith(native) for name in state_dict):
        return state_dict
    inside = {name.removeprefix("backbone."): v for name, v in state_dict.items() if name.startswith("backbone.")}
    if any(name.startswith(native) for name in inside):
        return inside
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


def resize_axes(
    value: Tensor, size: Sequence[int], axes: Sequence[int], mode: str = "bicubic", name: str = "a table"
) -> Tensor:
    """Interpolate a learned table along one or two of its axes, as the authors do before they train at another size.

    Computed in float32 with ``align_corners=False`` and no smoothing, and reported in the log.

    Args:
        value: Any table, such as [heads, 2K-1, 2K-1].
        size: New lengths of ``axes``.
        axes: One axis (``mode="linear"``) or two.
        mode: As in ``torch.nn.functional.interpolate``.
        name: What the log calls it.

    Returns:
        ``value`` itself if it has that size.

    Raises:
        ValueError: If ``size`` and ``axes`` differ in length or are not one or two.
    """
    if len(size) != len(axes) or len(axes) not in (1, 2):
        raise ValueError(f"size and axes must name the same one or two axes, got {tuple(size)} and {tuple(axes)}")
    old = [value.shape[axis] for axis in axes]
    if old == list(size):
        return value
    last = tuple(range(-len(axes), 0))
    moved = value.movedim(tuple(axes), last)
    resized = F.interpolate(moved.float().reshape(1, -1, *old), size=tuple(size), mode=mode, align_corners=False)
    _logger.info("%s resized from %s to %s (%s)", name, "x".join(map(str, old)), "x".join(map(str, size)), mode)
    return resized.reshape(*moved.shape[: -len(axes)], *size).movedim(last, tuple(axes)).to(value.dtype)


def resize_tokens(
    value: Tensor,
    size: Sequence[int],
    prefix: int = 0,
    old: Sequence[int] | None = None,
    mode: str = "bicubic",
    name: str = "a table",
) -> Tensor:
    """Interpolate a table whose rows are the positions of a grid: position embeddings, relative bias tables.

    Args:
        value: [..., prefix + h * w, C]
        size: New height and width of the grid.
        prefix: Rows before the grid, such as the class token's, which are kept.
        old: Present height and width; a square if not given.
        mode: ``"bicubic"`` or ``"bilinear"``.
        name: What the log calls it.

    Returns:
        [..., prefix + H * W, C]

    Raises:
        ValueError: If the rows do not form such a grid.
    """
    rows = value.shape[-2] - prefix
    h, w = old if old is not None else (math.isqrt(max(rows, 0)),) * 2
    if h * w != rows or rows <= 0:
        raise ValueError(f"{name} has {value.shape[-2]} rows, which are not {prefix} and a grid of {h}x{w}")
    if (h, w) == tuple(size):
        return value
    first, grid = value[..., :prefix, :], value[..., prefix:, :]
    grid = resize_axes(grid.unflatten(-2, (h, w)), size, (-3, -2), mode, name).flatten(-3, -2)
    return grid if prefix == 0 else torch.cat([first, grid], dim=-2)
