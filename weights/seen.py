"""What a download was when it was first of use; afterwards it has to be the same file.

Most of the published links come with neither hash nor size. The first time that a model has loaded from a download, a
note beside it keeps both.
"""

import contextlib
import json
from pathlib import Path

from visionattn.errors import amount
from visionattn.weights.download import sha256_of
from visionattn.weights.errors import WeightsError

__all__ = ["check_seen", "note_seen"]


def note_seen(path: Path) -> None:
    """Keep size and hash of a file that has just been of use, unless they are kept already."""
    note = _note(path)
    if note.exists():
        return
    found = {"size": path.stat().st_size, "sha256": sha256_of(path), "time": path.stat().st_mtime_ns}
    try:
        note.write_text(json.dumps(found), encoding="utf-8")
    except OSError:  # a cache that others fill may not be ours to write; half a note would be kept for ever
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def check_seen(path: Path) -> None:
    """Refuse a file that is no longer what it was when it was of use.

    Raises:
        WeightsError: Saying what differs, and what to remove.
    """
    try:
        kept = json.loads(_note(path).read_text(encoding="utf-8"))
        size, digest, time = kept["size"], kept["sha256"], kept["time"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    fix = f"remove {path} and {_note(path).name} beside it to download it again"
    if path.stat().st_size != size:
        raise WeightsError(f"{path} has {amount(path.stat().st_size)} instead of the {amount(size)} it had: {fix}")
    if path.stat().st_mtime_ns != time and sha256_of(path) != digest:
        raise WeightsError(f"{path} is not the file that it was, its SHA-256 was {digest}: {fix}")


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.seen")
