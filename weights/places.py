"""Where files lie on this machine, by names that are no paths."""

import re
from pathlib import Path

from visionattn.weights.errors import WeightsError
from visionattn.weights.options import settings

__all__ = ["added_file", "inside"]


def added_file(name: str) -> Path:
    """Where ``visionattn weights add`` puts the weights of ``name``, ``arch.tag``."""
    return inside(settings.folder() / "visionattn", f"{name}.safetensors")


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder``, and nowhere else.

    Raises:
        WeightsError: If ``name`` is no plain file name.
    """
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,200}", name) or name.startswith("."):
        raise WeightsError(
            f"{name[:80]!r} is no name of a file in {folder}: names and tags have no / and no leading dot"
        )
    return folder / name
