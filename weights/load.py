"""Loading a file into a network that is there already, completely or not at all."""

from typing import Any

from torch import Tensor, nn

from visionattn.errors import some
from visionattn.weights.errors import WeightsError
from visionattn.weights.families import release_filter
from visionattn.weights.read import fitting_weights, local_file

__all__ = ["classifiers", "load_weights"]


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
    net.load_state_dict(state)


def classifiers(cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classifier in a cfg of timm, which has one, several or none."""
    heads = cfg.get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)
