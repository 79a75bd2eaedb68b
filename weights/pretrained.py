"""How ``timm.create_model(name, pretrained=True)`` comes to our downloader and our reader."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import create_model, get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from visionattn.errors import one_line, some
from visionattn.weights.card import parameters, read_metadata
from visionattn.weights.errors import WeightsError
from visionattn.weights.families import Filter, release_filter
from visionattn.weights.limits import check_sizes, limited
from visionattn.weights.load import classifiers, refuse_unusable
from visionattn.weights.locate import added_file, locate
from visionattn.weights.manifest import checkpoints
from visionattn.weights.options import settings
from visionattn.weights.read import fitting_weights
from visionattn.weights.seen import note_seen

__all__ = ["with_weights"]

SOURCES = ("url", "file", "state_dict", "hf_hub_id")

MOST_PARAMETERS = 4 * 10**9  # that a hub's configuration may ask for; the largest models of timm have 2 * 10^9

_logger = logging.getLogger(__name__)


def with_weights(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> tuple[Filter | None, dict]:
    """Arguments of ``timm.models.build_model_with_cfg`` that make it load what we have fetched and read.

    timm resolves the cfg and adapts stem and classifier as ever. Only where it would open a URL or a file itself, it is
    handed a note instead, which the returned filter replaces by the tensors. Hubs and folders stay with timm.

    Args:
        variant: Registered name.
        pretrained: Whether weights are wanted.
        kwargs: Arguments of the model and of ``build_model_with_cfg``.

    Returns:
        The filter and the arguments to pass on.

    Raises:
        WeightsError: If the weights cannot be had.
    """
    refuse_greed(variant, kwargs)
    rename = release_filter(variant)
    cfg, overlay = kwargs.get("pretrained_cfg"), dict(kwargs.get("pretrained_cfg_overlay") or {})
    chosen = cfg if isinstance(cfg, dict) else {}
    if not any({**chosen, **overlay}.get(key) for key in SOURCES):
        tag = cfg if isinstance(cfg, str) else chosen.get("tag") or getattr(get_pretrained_cfg(variant), "tag", None)
        if tag and (file := added_file(f"{variant}.{tag}")).is_file():
            cfg = kwargs["pretrained_cfg"] = added_cfg(variant, tag, file)
    if not pretrained:
        return rename, kwargs
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    if resolved.source in ("hf-hub", "local-dir") or resolved.state_dict or (resolved.hf_hub_id and not resolved.file):
        return partial(computable, variant, rename), kwargs
    name = f"{variant}.{resolved.tag}" if resolved.tag else variant
    row = {key: value for key, value in dataclasses.asdict(resolved).items() if value is not None}
    there = locate(name, published(name) | row, kwargs.get("cache_dir"), download=False)
    path = there or locate(name, published(name) | row, kwargs.get("cache_dir"))

    fetched = not row.get("file") and path.parent == Path(kwargs.get("cache_dir") or settings.folder())

    def read_and_rename(note: dict, model: nn.Module) -> dict[str, Tensor]:
        model.pretrained_cfg.pop("state_dict", None)  # the note; the cfg stays as it was
        try:
            state = fitting(name, path, rename, model)
        except WeightsError as error:
            if not fetched:
                raise
            if there is None and not row.get("sha256") and not belongs(path, variant, rename):
                path.unlink(missing_ok=True)
                raise WeightsError(f"{error}. Nor does it fit as it is registered: the download was removed") from error
            raise WeightsError(f"{error}. If the file itself is wrong, remove {path} to download it again") from error
        if fetched:
            note_seen(path)
        return state

    return read_and_rename, kwargs | {"pretrained_cfg_overlay": overlay | {"state_dict": {"file": str(path)}}}


def belongs(path: Path, variant: str, rename: Filter | None) -> bool:
    """Whether a file fits a model as it is registered, so that only this call's arguments are in its way."""
    model = create_model(variant, device="meta")
    try:
        fitting(variant, path, rename, model)
    except WeightsError:
        return False
    return True


def fitting(name: str, path: Path, rename: Filter | None, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``path`` under our names, of the only reading that fits ``model``."""
    own, heads = model.state_dict(), classifiers(model.pretrained_cfg)

    def fits(state: dict[str, Tensor]) -> bool:
        try:
            state = renamed(path, state, rename, model)
            refuse_partial(name, path, state, model)
        except Exception:  # rules meet the names and shapes of another model
            return False
        return all(key in own or (heads and key.startswith(heads)) for key in state)

    state, stripped = fitting_weights(path, fits)
    state = renamed(path, state, rename, model)
    if stripped:
        _logger.warning("%s: took the weights behind %s", path, stripped)
    report(name, path, state, model)
    return state


def renamed(path: Path, state: dict[str, Tensor], rename: Filter | None, model: nn.Module) -> dict[str, Tensor]:
    """The tensors ``state`` of ``path`` under our names."""
    try:
        return state if rename is None else rename(dict(state), model)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # rules meet names and shapes of another model
        raise WeightsError(f"{path} is not of this model: {one_line(error)}") from error


def computable(variant: str, rename: Filter | None, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What timm has read from a hub or folder, under our names, if all of it are numbers."""
    state = state if rename is None else rename(state, model)
    refuse_unusable(f"the weights of {variant}", state, model.state_dict())
    return state


def refuse_greed(variant: str, kwargs: dict[str, Any]) -> None:
    """Raise if the configuration in a hub or folder asks for what no file may; arguments of the user are free."""
    cfg, what = kwargs.get("pretrained_cfg"), f"the configuration of {variant}"
    if not isinstance(cfg, dict) or cfg.get("source") not in ("hf-hub", "local-dir"):
        return
    saved = limited(kwargs.get("pretrained_model_args") or {}, what)  # timm's name for what the file says
    check_sizes(saved | {key: cfg[key] for key in ("num_classes", "input_size") if cfg.get(key)}, what)
    if saved and (wanted := parameters(variant, saved)) > MOST_PARAMETERS:
        raise WeightsError(f"{what} asks for {wanted} parameters: files may ask for {MOST_PARAMETERS} at most")


def added_cfg(variant: str, tag: str, file: Path) -> dict[str, Any]:
    """The cfg of weights that were added by hand."""
    card = read_metadata(file, count=False) or {}  # the user says which model; counting would build it again
    base = get_pretrained_cfg(variant).to_dict()
    base = {key: value for key, value in base.items() if key not in SOURCES}
    own = {key: tuple(v) if isinstance(v, list) else v for key, v in card.get("preprocess", {}).items()}
    if (classes := card.get("num_classes")) is not None:
        own["num_classes"] = classes
    if own.get("input_size", base["input_size"]) != base["input_size"]:
        base.pop("pool_size", None)
    return base | own | dict(tag=tag, architecture=variant, file=str(file))


def report(name: str, path: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Log what will not be loaded as it is, and refuse a file that lacks a part of the network or is damaged."""
    own, cfg = model.state_dict(), model.pretrained_cfg
    _logger.info("%s: %d tensors from %s", name, len(state), path)
    for head in classifiers(cfg):
        weight = state.get(head + ".weight")
        if weight is not None and model.num_classes != cfg.get("num_classes"):
            fate = f"starts anew with {model.num_classes} classes" if head + ".weight" in own else "is left out"
            _logger.info("%s: classifier %s of %d classes %s", name, head, len(weight), fate)
    refuse_partial(name, path, state, model)
    refuse_unusable(path, state, own)


def refuse_partial(name: str, path: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Refuse a file that lacks a part of the network.

    timm stops being strict as soon as the number of classes differs, so a file with half of the blocks would pass.
    """
    own, cfg = model.state_dict(), model.pretrained_cfg
    # Detectors and segmenters come without what lies behind the last stage.
    parts = ("stem.", *(f"{info['module']}." for info in model.feature_info))
    trunk = [key for key in own if key.startswith(parts) and not key.endswith("num_batches_tracked")]
    missing = [key for key in trunk if key not in state]
    first = cfg.get("first_conv") or ()  # which timm adapts to other channels
    first = tuple(f"{name}." for name in ((first,) if isinstance(first, str) else first))
    wrong = [k for k in trunk if k in state and state[k].shape != own[k].shape and not k.startswith(first)]
    if wrong and not missing:
        described = some(f"{key}: {list(state[key].shape)}, here {list(own[key].shape)}" for key in wrong)
        raise WeightsError(
            f"{path} does not fit {name}: {len(wrong)} of another shape ({described}). Build the model with the "
            "arguments it was trained with, or give the file of this model"
        )
    if missing:
        foreign = [key for key in state if key not in own and not key.startswith(classifiers(cfg))]
        instead = f", of which the model has no {some(foreign)}" if foreign else ""
        raise WeightsError(
            f"{path} does not fit {name}. Missing key(s): {some(missing)} of {len(trunk)} in the file's {len(state)} "
            f"tensors{instead}. Build the model with the arguments it was trained with, or give the file of this model"
        )


def published(name: str) -> dict[str, Any]:
    """What the manifest says of ``name`` beyond timm's cfg."""
    return {key: value for key, value in checkpoints().get(name, {}).items() if key == "by_hand"}
