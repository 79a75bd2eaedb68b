"""Reading checkpoints safely, saying exactly what does not fit, and describing a model so that a file is enough."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

from visionattn.features import release_filter
from visionattn.train.errors import UserError, check_model_name, some
from visionattn.weights import read
from visionattn.weights.errors import WeightsError
from visionattn.weights.load import CARD, read_metadata

PREFIX = "net."
"""What the task puts before the names of the bare model's weights."""


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a ``.ckpt``/``.pth`` file on the CPU, never running code that it may hold.

    Raises:
        UserError: If there is no such file, or it is none that can be read safely.
    """
    return _read(read.read_checkpoint, path)


def read_weights(path: str) -> dict[str, Tensor]:
    """The bare model's weights from timm, plain, safetensors or Lightning files; the averaged ones where there are."""
    state = _read(read.read_weights, path)
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return {key.removeprefix("_orig_mod."): value for key, value in state.items()}


def _read(reader: Callable[[str], dict], path: str) -> dict:
    if "://" in path:
        raise UserError(f"{path} is a URL: download it first and give the file")
    if not Path(path).is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        return reader(path)
    except WeightsError as error:
        raise UserError(str(error)) from error


def load_weights(net: nn.Module, path: str, reset_head: bool = False) -> None:
    """Load ``path`` into ``net``, completely or not at all.

    Args:
        net: A timm model.
        path: See :func:`read_weights`; an original release is converted by the model's ``checkpoint_filter_fn``.
        reset_head: Leave a classifier of another size as it is, instead of refusing.

    Raises:
        UserError: Naming what is missing, unexpected or of another shape.
    """
    state = read_weights(path)
    convert = release_filter(getattr(net, "pretrained_cfg", {}).get("architecture", ""), net)
    if convert is not None:
        state = convert(state, net)
    own = net.state_dict()
    heads = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    head_shapes = [key for key in shapes if key.startswith(heads)] if heads else []
    if reset_head and head_shapes:
        print(f"{path} has other classes: {', '.join(head_shapes)} start anew")
        state |= {key: own[key] for key in head_shapes}
        shapes = [key for key in shapes if key not in head_shapes]
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or extra or shapes:
        parts = [f"{len(missing)} missing ({some(missing)})"] if missing else []
        parts += [f"{len(extra)} unexpected ({some(extra)})"] if extra else []
        described = (f"{key}: {list(state[key].shape)}, here {list(own[key].shape)}" for key in shapes)
        parts += [f"{len(shapes)} of another shape ({some(described)})"] if shapes else []
        fix = "set model.name and model.model_args as they were trained"
        if shapes and shapes == head_shapes and not missing and not extra:
            fix = "it was trained on other classes; add --model.reset_head true to start with a new classifier"
        raise UserError(f"{path} does not fit the model: {'; '.join(parts)}. Fix: {fix}")
    net.load_state_dict(state)


def read_card(path: str) -> dict[str, Any]:
    """How to build the model whose weights ``path`` holds.

    Returns:
        ``name``, ``model_args``, ``num_classes``, ``class_names`` and ``preprocess``.
    """
    if path.endswith(".safetensors") and Path(path).is_file():
        card = _read(read_metadata, path)
    else:
        card = read_checkpoint(path).get(CARD)
    if card is None:
        raise UserError(f"{path} does not say which model it holds: use a checkpoint written by train.py")
    return card


def export_weights(checkpoint: str, path: str) -> None:
    """Write the bare (averaged, if there is an average) weights of a run's checkpoint as safetensors.

    The file opens with ``timm.create_model(name, checkpoint_path=path)`` and with ``train.py predict``.
    """
    state = {key: value.contiguous().clone() for key, value in read_weights(checkpoint).items()}
    save_file(state, path, metadata={"format": "pt", CARD: json.dumps(read_card(checkpoint))})


def build(card: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """The model that ``card`` describes, without its weights unless ``pretrained``."""
    check_model_name(card["name"])
    try:
        return timm.create_model(
            card["name"], pretrained=pretrained, num_classes=card["num_classes"], **card["model_args"]
        )
    except WeightsError as error:
        raise UserError(str(error)) from error
    except TypeError as error:
        raise UserError(f"{card['name']} does not take model.model_args {card['model_args']}: {error}") from error
