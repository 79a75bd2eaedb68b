"""Decisions of earlier processes on this machine, in a file of the user's cache.

The file is a cache: one that cannot be read, is damaged or belongs to another machine is passed by, and where nothing
can be written each process decides for itself. It is written as a whole and put in place at once, so that processes
side by side see old decisions or new ones; of two that write at one time one may lose some, which are made again.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from visionattn.kernels.common.machine import machine

__all__ = ["everything", "file", "forget", "recall", "remember", "write"]

FOLDER_VARIABLE = "VISIONATTN_TUNE_DIR"
LARGEST = 8 * 2**20  # bytes of a file that is read
PAUSE = 1.0  # seconds between two writes

_known: dict[str, dict[str, tuple[str, dict[str, float]]]] | None = None
_new: dict[str, dict[str, tuple[str, dict[str, float]]]] = {}
_written = 0.0


def file() -> Path:
    """The file of this machine: processor, instructions, versions of PyTorch and of this library are in its name."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionattn" / "tuning"
    return Path(folder) / f"{hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]}.json"


def everything() -> dict[str, dict[str, tuple[str, dict[str, float]]]]:
    """By choice and key, as a text of numbers and words, the form that was chosen and the milliseconds of each."""
    global _known
    if _known is None:
        _known = _read()
        atexit.register(write)
    return _known


def forget() -> None:
    """Know nothing of what was found before; what is found from now on replaces it in the file."""
    everything().clear()


def recall(choice: str, key: tuple) -> tuple[str, dict[str, float]] | None:
    """The form that was chosen, and the milliseconds of each; None if nothing is known."""
    return everything().get(choice, {}).get(_text(key))


def remember(choice: str, key: tuple, form: str, ms: dict[str, float]) -> None:
    """Keep a decision for later processes."""
    for kept in (_known, _new):
        if kept is not None:
            kept.setdefault(choice, {})[_text(key)] = (form, ms)
    if time.monotonic() - _written > PAUSE:
        write()


def write() -> None:
    """Add the decisions of this process to the file, if it can be written."""
    global _written
    if not _new:
        return
    _written = time.monotonic()
    choices = _read()
    for choice, decisions in _new.items():
        choices.setdefault(choice, {}).update(decisions)
    data = {name: {k: {"form": form, "ms": ms} for k, (form, ms) in found.items()} for name, found in choices.items()}
    with contextlib.suppress(OSError, RuntimeError):  # read-only, full, or a user without a home
        target = file()
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump({"machine": machine(), "choices": data}, out, indent=1)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
        _new.clear()


def _text(key: tuple) -> str:
    return " ".join(map(str, key))


def _read() -> dict[str, dict[str, tuple[str, dict[str, float]]]]:
    """What the file says and is well formed in it."""
    try:
        path = file()
        if not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["machine"] != machine():
            return {}
        return {
            name: {key: (str(d["form"]), {f: float(ms) for f, ms in d["ms"].items()}) for key, d in decisions.items()}
            for name, decisions in data["choices"].items()
        }
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
