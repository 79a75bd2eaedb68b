"""Writing weights as a safetensors file that carries its card: one file is enough to build and load the model."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from visionattn.weights.card import CARD, read_card
from visionattn.weights.read import read_bare_weights

__all__ = ["export_weights", "write_weights"]


def export_weights(checkpoint: str, path: str | Path) -> None:
    """Write the bare (averaged, if there is an average) weights of a run's checkpoint as safetensors.

    The file opens with ``timm.create_model(name, checkpoint_path=path)`` and with ``train.py predict``.

    Raises:
        WeightsError: If ``checkpoint`` is not one of a run.
    """
    write_weights(read_bare_weights(checkpoint), path, read_card(checkpoint))


def write_weights(state: dict[str, Tensor], target: str | Path, card: dict[str, Any]) -> None:
    """Write a safetensors file with its card; it appears under its name when it is complete."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    tensors = {key: value.detach().contiguous().clone() for key, value in state.items()}
    save_file(tensors, part, metadata={"format": "pt", CARD: json.dumps(card)})
    part.replace(target)
