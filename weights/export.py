"""Writing weights as a safetensors file that carries its card: one file is enough to build and load the model."""

import contextlib
import glob
import json
import os
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from visionattn.errors import one_line
from visionattn.weights.card import CARD, read_card
from visionattn.weights.errors import WeightsError
from visionattn.weights.read import read_bare_weights

__all__ = ["export_weights", "share", "write_weights"]

DAY = 86_400  # seconds; another machine may be writing to the same folder


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
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    tensors = {key: value.detach().contiguous().clone() for key, value in state.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_killed(target)
        save_file(tensors, part, metadata={"format": "pt", CARD: json.dumps(card)})
        share(part)
        part.replace(target)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write {target} ({one_line(error)}): free some space, or choose another") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder itself could not be made
            part.unlink(missing_ok=True)


def clear_killed(target: Path) -> None:
    """Remove what processes that were killed left half-written beside ``target``, a day ago or more."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if time.time() - part.stat().st_mtime > DAY:
            part.unlink(missing_ok=True)


def share(path: Path) -> None:
    """Give a file the rights that the user's umask leaves to new files; safetensors makes its own private."""
    os.umask(umask := os.umask(0o077))
    path.chmod(0o666 & ~umask)
