"""Loading a file into a network that is there already, completely or not at all."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visionattn.errors import some
from visionattn.weights.errors import WeightsError
from visionattn.weights.families import release_filter
from visionattn.weights.read import fitting_weights, local_file

__all__ = ["classifiers", "load_weights", "refuse_unusable", "unusable"]


def load_weights(net: nn.Module, path: str, reset_head: bool = False) -> None:
    """Load ``path`` into ``net``, completely or not at all.

    Args:
        net: A timm model.
        path: See :func:`fitting_weights`; an original release is renamed by the model's ``checkpoint_filter_fn``.
        reset_head: Leave a classifier of another size as it is, instead of refusing.

    Raises:
        WeightsError: Naming what is missing, unexpected or of another shape.
    """
    cfg = getattr(net, "pretrained_cfg", {})
    rename = release_filter(cfg.get("architecture", ""), net)
    own = net.state_dict()

    def fits(state: dict[str, Tensor]) -> bool:
        try:
            state = state if rename is None else rename(dict(state), net)
        except Exception:  # rules meet the names and shapes of another model
            return False
        heads = classifiers(cfg) if reset_head else ()
        same = (state[key].shape == own[key].shape or (heads and key.startswith(heads)) for key in own if key in state)
        return state.keys() == own.keys() and all(same)

    state, stripped = fitting_weights(local_file(path), fits)
    if stripped:
        print(f"{path}: took the weights behind {stripped}")
    if rename is not None:
        state = rename(state, net)
    heads = classifiers(cfg)
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
        raise WeightsError(f"{path} does not fit the model: {'; '.join(parts)}. Fix: {fix}")
    refuse_unusable(path, state, own)
    net.load_state_dict(state)


def unusable(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """The parameters in ``state`` that no model can compute with, each with the reason.

    Args:
        state: Tensors by our names.
        own: The model's own ones; where one of them is infinite before it is loaded, as masks are, a file's may be.
    """
    found = []
    for name, value in state.items():
        if name not in own:
            continue
        if own[name].is_floating_point() and not value.is_floating_point():
            found.append(f"{name} has numbers of type {str(value.dtype).removeprefix('torch.')}")
        elif not _finite(value) and (own[name].is_meta or _finite(own[name]) or value.isnan().any()):
            found.append(f"{name} has values that are NaN or infinite")
    return found


def refuse_unusable(path: str | Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ``WeightsError`` with the first of the tensors of ``path`` that no model can compute with."""
    if broken := unusable(state, own):
        raise WeightsError(f"{path} is damaged, or no weights: {some(broken)}. Fetch it again, or take an earlier one")


def _finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return bool((value.float() if value.element_size() == 1 else value).isfinite().all())


def classifiers(cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classifier in a cfg of timm, which has one, several or none."""
    heads = cfg.get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)
