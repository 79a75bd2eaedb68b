"""Whether weights that are on this machine are what they are said to be."""

import timm
import torch

from visionattn.errors import one_line
from visionattn.weights import checkpoints
from visionattn.weights.card import read_metadata
from visionattn.weights.download import sha256_of
from visionattn.weights.errors import WeightsError
from visionattn.weights.locate import added_file, weights_file

__all__ = ["verify"]


def verify(name: str, forward: bool = True) -> dict[str, str]:
    """Hash the file of a checkpoint again and run its model once.

    Args:
        name: ``arch.tag``.
        forward: Load the weights and run one image.

    Returns:
        ``file``, ``sha256``, ``hash`` (``matches``, ``DIFFERS`` or ``no published hash``), and ``forward``; or only
        ``file``, ``not on this machine``.

    Raises:
        WeightsError: If there is no such checkpoint.
    """
    path = weights_file(name, download=False)
    if path is None:
        return {"file": "not on this machine"}
    digest, row = sha256_of(path), checkpoints().get(name, {})
    found = digest
    if path == added_file(name):  # translated: the manifest has the hash of the original
        found = (read_metadata(path) or {}).get("source_sha256", digest)
    expected = row.get("sha256")
    state = "no published hash" if not expected else "matches" if found == expected else "DIFFERS"
    result = {"file": str(path), "sha256": digest, "hash": state}
    if forward and row.get("model", True):
        result["forward"] = _forward(name)
    return result


def _forward(name: str) -> str:
    try:
        model = timm.create_model(name, pretrained=True).eval()
        image = torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            logits = model(image)
    except (WeightsError, RuntimeError) as error:
        return f"FAILED: {one_line(error)}"
    if not logits.isfinite().all():
        return "FAILED: the output is not finite"
    return f"{list(logits.shape)}, standard deviation {logits.std().item():.3g}"
