"""From the releases' checkpoints of any host with any mixer to ours; every family uses this one function."""

import math
import re

import torch
from torch import Tensor, nn

from visionattn.layers.patch_embed import resize_position_embedding
from visionattn.weights.rename import Rule, rename_checkpoint, resize_axes, resize_tokens

__all__ = ["checkpoint_filter_fn", "fit_table"]

# What all four hosts share; a host adds its own in front.
RULES: tuple[Rule, ...] = (
    (r"relative_position_index$|attn_mask$", None),
    (r"^head\.", "head.fc."),
    (r"\.scale$", ".temperature"),
)
GRIDS = ("positional_encoding", "pos_embed")
SIDES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}  # the axis that lies along the map
COUNTERS = ("warm", "iter", "total_step", "num_batches_tracked")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of a release and fit its tables of positions to the model's image size.

    Args:
        state_dict: Checkpoint of a classifier or of the backbone of a detector, or our own state dict, which is
            returned as it is if everything fits.
        model: The host that it is for.
    """
    own = model.state_dict()
    state = rename_checkpoint(state_dict, (*model.release_rules, *RULES))
    state = _split_positions(state, own)
    fitted = {name: fit_table(name, value, own[name]) if name in own else value for name, value in state.items()}
    _split_gate(fitted, own)
    _join_qkv(fitted, own)
    _rename_lepe(fitted, own)
    _keep_unused_scale(fitted, own)
    _start_counters(fitted, own)
    if hasattr(model.stem, "grid_size"):
        fitted = resize_position_embedding(fitted, model.stem)
    changed = fitted.keys() != state.keys() or any(fitted[name] is not state[name] for name in state)
    return fitted if changed else state


def fit_table(name: str, value: Tensor, like: Tensor) -> Tensor:
    """``value``, resized to the shape of ``like`` if it is a table of positions; anything else as it is.

    Args:
        name: Parameter name, whose last part says what kind of table it is.
        value: The released parameter.
        like: The model's own one.
    """
    leaf = name.rpartition(".")[2]
    if not isinstance(value, Tensor) or value.shape == like.shape:
        return value
    if leaf in GRIDS and like.dim() == 4:
        if value.dim() == 3:
            size = like.shape[1:3]
            fits = value.shape[1] == size.numel()
            return resize_tokens(value, size, old=size if fits else None, name=name).unflatten(1, size)
        return resize_axes(value, like.shape[1:3], (1, 2), name=name)
    if leaf in SIDES and value.dim() == 5:
        return resize_axes(value, [like.shape[SIDES[leaf]]], [SIDES[leaf]], "linear", name)
    if leaf == "relative_position_bias_table":
        return resize_tokens(value, (math.isqrt(len(like)),) * 2, name=name)
    return value


def _split_positions(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row of the class token stands before those of the map in PVT's last table."""
    for token in [name for name in own if name.endswith(".cls_embed") and name not in state]:
        table = token.removesuffix("cls_embed") + "pos_embed"
        if table in state and state[table].dim() == 3:
            state = {**state, token: state[table][:, :1], table: state[table][:, 1:]}
    return state


def _join_qkv(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """PVT projects to queries and to keys and values apart; mixers have one projection."""
    for name in own:
        match = re.fullmatch(r"(.+)\.qkv\.(weight|bias)", name)
        parts = [f"{match[1]}.{part}.{match[2]}" for part in ("q", "kv")] if match else []
        if parts and all(part in state for part in parts):
            state[name] = torch.cat([state.pop(part) for part in parts])


def _split_gate(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """PolaFormer makes its gate beside queries, keys and values in Swin, beside queries alone in PVT."""
    for name in own:
        match = re.fullmatch(r"(.+)\.gate\.(weight|bias)", name)
        for theirs, ours in (("qkvg", "qkv"), ("qg", "q")) if match else ():
            joint = state.pop(f"{match[1]}.{theirs}.{match[2]}", None)
            if joint is not None:
                state[f"{match[1]}.{ours}.{match[2]}"], state[name] = joint.tensor_split([-len(own[name])])


def _rename_lepe(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """CSwin has one depthwise convolution a branch; a mixer has one branch, and may use it as its own."""
    for name in [name for name in state if ".branches.0.get_v." in name and name not in own]:
        for ours in (".get_v.", ".dwc."):
            target = name.replace(".branches.0.get_v.", ours)
            if target in own and target not in state:
                state[target] = state.pop(name)
                break


def _keep_unused_scale(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """A ``scale`` is a temperature where a mixer has one; SLAB's in CSwin is only there to be stored."""
    for name in [name for name in state if name.endswith(".temperature") and name not in own]:
        target = name.removesuffix("temperature") + "unused.scale"
        if target in own and target not in state:
            state[target] = state.pop(name)


def _start_counters(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Counters that a trained checkpoint lacks: its norms have reached the end of their schedule."""
    for name, value in own.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in COUNTERS and name not in state and any(key.startswith(owner + ".") for key in state):
            state[name] = value.clone() if leaf == "total_step" else torch.zeros_like(value)
