"""What a file of ours says about the model whose weights it holds, and that model from it.

A card has ``name``, ``model_args``, ``num_classes``, ``class_names`` and ``preprocess``; that of a segmenter or
detector also has a ``task``. It lies in the metadata of a safetensors file, or beside the weights in a checkpoint.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import safetensors
import timm
from torch import nn

from visionattn.weights.errors import WeightsError
from visionattn.weights.read import local_file, read_checkpoint

__all__ = ["CARD", "build", "check_model_name", "read_card", "read_metadata"]

CARD = "visionattn"
"""Key under which a file of ours has its card."""


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The card of a safetensors file; None if it has none.

    Raises:
        WeightsError: If it is no such file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(CARD, "null"))
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error


def read_card(path: str) -> dict[str, Any]:
    """The card of a file that ``train.py`` wrote.

    Args:
        path: A checkpoint or a safetensors file.

    Raises:
        WeightsError: If there is no such file, or no card in it.
    """
    path = local_file(path)
    card = read_metadata(path) if path.endswith(".safetensors") else read_checkpoint(path).get(CARD)
    if card is None:
        raise WeightsError(f"{path} does not say which model it holds: use a checkpoint written by train.py")
    return card


def build(card: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """The model that ``card`` describes, without its weights unless ``pretrained``.

    Raises:
        WeightsError: If there is no such model, it does not take these arguments, or its weights cannot be had.
    """
    check_model_name(card["name"])
    try:
        return timm.create_model(
            card["name"], pretrained=pretrained, num_classes=card["num_classes"], **card["model_args"]
        )
    except TypeError as error:
        raise WeightsError(f"{card['name']} does not take model.model_args {card['model_args']}: {error}") from error


def check_model_name(name: str) -> None:
    """Refuse a model that timm does not know, naming the closest ones it does.

    Args:
        name: A timm model name, with or without a tag, or a ``hf-hub:``/``local-dir:`` source.

    Raises:
        WeightsError: If there is no such model.
    """
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names."
    raise WeightsError(f"unknown model {name!r}: {hint}")
