"""What a file of ours says about the model whose weights it holds, and that model from it.

A card has ``name``, ``model_args``, ``num_classes``, ``class_names`` and ``preprocess``; that of a segmenter or
detector also has a ``task``. It lies in the metadata of a safetensors file, or beside the weights in a checkpoint.

Whoever made the file wrote its card. So a card names models that are installed and no other place to look, holds
nothing but text and numbers (:mod:`visionattn.weights.limits`), and asks for no more parameters than its file has room
for; all of that is known before anything is built.
"""

import difflib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.models import load_model_config_from_hf, parse_model_name
from torch import nn

from visionattn.errors import one_line, some
from visionattn.weights.errors import WeightsError
from visionattn.weights.limits import check_sizes, limited
from visionattn.weights.read import local_file, read_checkpoint

__all__ = [
    "CARD",
    "build",
    "check_model_name",
    "checked",
    "complete",
    "parameters",
    "read_card",
    "read_metadata",
    "run_settings",
    "settled",
]

CARD = "visionattn"
"""Key under which a file of ours has its card."""
ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
# What a card may say about images; all of it goes to timm's create_transform, to a data set or into a cfg.
PREPROCESS = {
    *("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode", "crop_border_pixels"),
    *("short_side", "long_side"),
}
KINDS = dict(name=str, model_args=dict, num_classes=int, class_names=list | tuple, preprocess=dict)
SPARE = 1_000_000
"""Parameters and buffers that a model may have beyond the bytes of its file, such as masks made anew."""


def read_metadata(path: str | Path, count: bool = True) -> dict[str, Any] | None:
    """The card of a safetensors file; None if it has none.

    Args:
        path: The file.
        count: Whether its model is to be built from the card, so that its parameters have to be counted before.

    Raises:
        WeightsError: If it is no such file, or its card says what no file may.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(CARD)
        card = None if text is None else json.loads(text)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the description in {path} is damaged ({one_line(error)}): fetch the file again") from error
    return None if card is None else checked(card, str(path), count)


def read_card(path: str) -> dict[str, Any]:
    """The card of a file that ``train.py`` wrote.

    Args:
        path: A checkpoint or a safetensors file.

    Raises:
        WeightsError: If there is no such file, no card in it, or one that says what no file may.
    """
    path = local_file(path)
    if path.endswith(".safetensors"):
        card = read_metadata(path)
    elif (card := read_checkpoint(path).get(CARD)) is not None:
        card = checked(card, path)
    if card is None:
        raise WeightsError(f"{path} does not say which model it holds: use a checkpoint written by train.py")
    return card


def run_settings(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The hyper-parameters in the checkpoint of a run, without what Lightning keeps there for itself.

    Raises:
        WeightsError: If they say what no file may.
    """
    settings = content.get("hyper_parameters", {})
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} has a {type(settings).__name__} as hyper-parameters: it is of no run of train.py")
    settings = {key: value for key, value in settings.items() if not str(key).startswith("_")}
    settings = limited(settings, f"the hyper-parameters in {path}")
    for key, value in settings.items():
        if key.endswith("_args") and isinstance(value, dict):
            check_sizes(value, path)
    if not str(settings.get("name", "")).startswith(ELSEWHERE):  # the command line asks the user about those
        checked({key: settings[key] for key in ("name", "model_args") if settings.get(key)}, path)
    return settings


def checked(card: Any, path: str, count: bool = True) -> dict[str, Any]:
    """``card``, if the file ``path`` may say that.

    Args:
        card: As it was read.
        path: The file; a model with more parameters than its bytes is not in it.
        count: Whether to count them.

    Raises:
        WeightsError: Saying what no file may.
    """
    card = limited(card, f"the description in {path}", most=300_000)  # ImageNet-22k has as many names
    if not isinstance(card, dict):
        raise WeightsError(f"{path} describes its model by a {type(card).__name__}: use a checkpoint of train.py")
    if wrong := [key for key, kind in KINDS.items() if key in card and not isinstance(card[key], kind)]:
        raise WeightsError(f"{path} describes {some(wrong)} by something else than it is: use a checkpoint of train.py")
    if card.get("task") not in (None, "segment", "detect"):
        raise WeightsError(
            f"{path} is for the task {card['task']!r}: only segment, detect and classification are known"
        )
    if unknown := card.get("preprocess", {}).keys() - PREPROCESS:
        raise WeightsError(f"{path} says {some(sorted(unknown))} about images, which no file may: do not use it")
    check_sizes({key: value for key, value in card.items() if key not in ("category_ids", "palette")}, path)
    if "name" not in card:
        return card
    name = card["name"]
    if name.startswith(ELSEWHERE) or "/" in name:
        raise WeightsError(f"{path} looks for its model at {name!r}, which only you may: give --model {name} yourself")
    check_model_name(name)
    if not count:
        return card
    wanted = parameters(name, card.get("model_args", {}), card.get("num_classes"))
    room = os.path.getsize(path) + SPARE
    if wanted > room:
        raise WeightsError(
            f"{path} describes a {name} of {wanted} parameters, but has room for {room}: it is damaged, do not use it"
        )
    return card


def parameters(name: str, model_args: dict[str, Any], num_classes: int | None = None) -> int:
    """How many parameters and buffers a model has, counted without making room for them; 0 where that fails."""
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        with torch.device("meta"):
            net = timm.create_model(name, **classes, **model_args)
    except Exception:  # what building it raises is for build() to say, and not every model can be built so
        return 0
    return sum(tensor.numel() for tensor in (*net.parameters(), *net.buffers()))


def settled(card: dict[str, Any]) -> dict[str, Any]:
    """``card`` with the registered model and its arguments in place of a hub or folder that the user named."""
    source, place = parse_model_name(card["name"])
    if source not in ("hf-hub", "local-dir"):
        return card
    if source == "hf-hub":
        _, name, arguments = load_model_config_from_hf(place)
    else:
        config = json.loads(Path(place, "config.json").read_text(encoding="utf-8"))
        name, arguments = config["architecture"], config.get("model_args")
    return card | dict(name=name, model_args={**(arguments or {}), **card.get("model_args", {})})


def build(card: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """The model that ``card`` describes, without its weights unless ``pretrained``.

    Raises:
        WeightsError: If there is no such model, it does not take these arguments, or its weights cannot be had.
    """
    complete(card, "name", "num_classes", "model_args")
    check_model_name(card["name"])
    try:
        return timm.create_model(
            card["name"], pretrained=pretrained, num_classes=card["num_classes"], **card["model_args"]
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"{card['name']} does not take model.model_args {card['model_args']}: {one_line(error)}"
        ) from error


def complete(card: dict[str, Any], *keys: str) -> None:
    """Raise ``WeightsError`` if ``card`` lacks one of ``keys``."""
    if missing := [key for key in keys if key not in card]:
        raise WeightsError(f"the description of the model lacks {some(missing)}: use a checkpoint written by train.py")


def check_model_name(name: str) -> None:
    """Refuse a model that timm does not know, naming the closest ones it does.

    Args:
        name: A timm model name, with or without a tag, or a ``hf-hub:``/``local-dir:`` source.

    Raises:
        WeightsError: If there is no such model.
    """
    if name.startswith(ELSEWHERE) or timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names."
    raise WeightsError(f"unknown model {name!r}: {hint}")
