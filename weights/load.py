"""How ``timm.create_model(name, pretrained=True)`` comes to our downloader and our reader."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from timm.models import get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from visionattn.weights.errors import WeightsError, some
from visionattn.weights.locate import added_file, locate
from visionattn.weights.manifest import checkpoints
from visionattn.weights.read import read_weights

__all__ = ["CARD", "read_metadata", "with_weights"]

CARD = "visionattn"
"""Key under which a file of ours describes its model: name, arguments, classes, preprocessing."""
SOURCES = ("url", "file", "state_dict", "hf_hub_id")

_logger = logging.getLogger(__name__)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The description that a safetensors file of ours carries."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(CARD, "null"))
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error


def with_weights(variant: str, pretrained: bool, filter_fn: Callable, kwargs: dict[str, Any]) -> tuple[Callable, dict]:
    """Arguments of ``timm.models.build_model_with_cfg`` that make it load what we have fetched and read.

    timm resolves the cfg and adapts stem and classifier as ever. Only where it would open a URL or a file itself, it is
    handed a note instead, which the returned filter replaces by the tensors. Hubs and folders stay with timm.

    Args:
        variant: Registered name.
        pretrained: Whether weights are wanted.
        filter_fn: The family's ``checkpoint_filter_fn``.
        kwargs: Arguments of the model and of ``build_model_with_cfg``.

    Returns:
        The filter and the arguments to pass on.

    Raises:
        WeightsError: If the weights cannot be had.
    """
    cfg, overlay = kwargs.get("pretrained_cfg"), dict(kwargs.get("pretrained_cfg_overlay") or {})
    chosen = cfg if isinstance(cfg, dict) else {}
    if not any({**chosen, **overlay}.get(key) for key in SOURCES):
        tag = cfg if isinstance(cfg, str) else chosen.get("tag") or getattr(get_pretrained_cfg(variant), "tag", None)
        if tag and (file := added_file(f"{variant}.{tag}")).is_file():
            cfg = kwargs["pretrained_cfg"] = added_cfg(variant, tag, file)
    if not pretrained:
        return filter_fn, kwargs
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    if resolved.source in ("hf-hub", "local-dir") or resolved.state_dict or (resolved.hf_hub_id and not resolved.file):
        return filter_fn, kwargs
    name = f"{variant}.{resolved.tag}" if resolved.tag else variant
    row = {key: value for key, value in dataclasses.asdict(resolved).items() if value is not None}
    path = locate(name, published(name) | row, kwargs.get("cache_dir"))

    def read_and_convert(note: dict, model: nn.Module) -> dict[str, Tensor]:
        model.pretrained_cfg.pop("state_dict", None)  # the note; the cfg stays as it was
        state = filter_fn(read_weights(path), model)
        report(name, path, state, model)
        return state

    return read_and_convert, kwargs | {"pretrained_cfg_overlay": overlay | {"state_dict": {"file": str(path)}}}


def added_cfg(variant: str, tag: str, file: Path) -> dict[str, Any]:
    """The cfg of weights that were added by hand."""
    card = read_metadata(file) or {}
    base = get_pretrained_cfg(variant).to_dict()
    base = {key: value for key, value in base.items() if key not in SOURCES}
    own = {key: tuple(v) if isinstance(v, list) else v for key, v in card.get("preprocess", {}).items()}
    if (classes := card.get("num_classes")) is not None:
        own["num_classes"] = classes
    if own.get("input_size", base["input_size"]) != base["input_size"]:
        base.pop("pool_size", None)
    return base | own | dict(tag=tag, architecture=variant, file=str(file))


def report(name: str, path: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Log what will not be loaded as it is, and refuse a file that lacks a part of the network.

    timm stops being strict as soon as the number of classes differs, so a file with half of the blocks would pass.
    """
    own, cfg = model.state_dict(), model.pretrained_cfg
    heads = cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    _logger.info("%s: %d tensors from %s", name, len(state), path)
    for head in heads:
        weight = state.get(head + ".weight")
        if weight is not None and model.num_classes != cfg.get("num_classes"):
            fate = f"starts anew with {model.num_classes} classes" if head + ".weight" in own else "is left out"
            _logger.info("%s: classifier %s of %d classes %s", name, head, len(weight), fate)
    # Detectors and segmenters come without what lies behind the last stage.
    parts = ("stem.", *(f"{info['module']}." for info in model.feature_info))
    trunk = [key for key in own if key.startswith(parts) and not key.endswith("num_batches_tracked")]
    missing = [key for key in trunk if key not in state]
    if missing:
        raise WeightsError(
            f"{path} does not fit {name}. Missing key(s): {some(missing)} of {len(trunk)} in the file's {len(state)} "
            "tensors. Build the model with the arguments it was trained with, or give the file of this model"
        )


def published(name: str) -> dict[str, Any]:
    """What the manifest says of ``name`` beyond timm's cfg."""
    return {key: value for key, value in checkpoints().get(name, {}).items() if key == "by_hand"}
